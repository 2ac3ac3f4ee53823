"""Sharding: how one region of the graph is spread over one mesh, chosen by an integer program."""
