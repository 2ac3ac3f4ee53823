"""The nouns that pass between the rooms: frozen dataclasses without JAX."""
