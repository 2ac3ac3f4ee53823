"""Nouns for people: tables, pictures, timelines and curves."""
