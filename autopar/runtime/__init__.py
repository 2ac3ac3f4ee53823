"""Runs plans: lowers segments to compiled functions and interprets each worker's program, here or on a
cluster."""
