"""Sampling from models: rollouts for training, continuous batching for serving, and a client of remote
endpoints."""
