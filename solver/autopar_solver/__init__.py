"""Choice problems."""
