"""What `autopar bench NAME` runs: figures and ratios, side by side in one run."""
