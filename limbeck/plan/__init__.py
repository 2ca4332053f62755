"""Forecasts of a training run's time, memory, energy and cost before it is started.

Nothing here imports torch.
"""
