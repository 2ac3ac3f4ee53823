"""What users call: the decorator, the methods, and clusters and plans with their verbs."""
