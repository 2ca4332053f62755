"""Recipes: their settings as pydantic models, reading them from YAML, and checking them. No torch."""
