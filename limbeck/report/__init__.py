"""Telling what runs left behind: read from their folders, never from a model."""
