"""Files: checkpoints of training, and models to serve in the formats others publish them in."""
