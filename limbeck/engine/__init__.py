"""Sampling of completions from models: rollouts for training, continuous batching for serving, and a client
of remote OpenAI-compatible endpoints."""
