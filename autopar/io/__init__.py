"""Files: checkpoints now; weights in other formats when serving is built."""
