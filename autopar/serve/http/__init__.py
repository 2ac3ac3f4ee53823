"""Serving over HTTP: the OpenAI interface, limits, metrics and the page, over an engine."""
