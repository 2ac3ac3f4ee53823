"""The choices as numbers: seconds per choice and pair of choices, bytes over time; and their solution."""
