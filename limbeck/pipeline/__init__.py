"""Runs of recipes: the graph of stages, the store of artifacts, worker processes, reviews and provenance."""
