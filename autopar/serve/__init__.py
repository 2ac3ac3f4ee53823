"""Serving: sequences, a scheduler and KV blocks over a model that the compiler has spread."""
