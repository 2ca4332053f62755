"""Recipes: their settings as pydantic models, reading them from YAML, and checking them. This package does
not import torch.

A recipe is a YAML file that describes a training run as stages (pretrain, sample, SFT, RL and so on), each
of which produces one artifact."""
