"""What the compiler makes of a region: which results reach memory, when, and how many bytes they take."""
