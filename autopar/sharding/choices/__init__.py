"""A region as choices: equations that choose, that follow, and that are computed where they are read."""
