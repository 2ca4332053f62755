"""Forecasts of a run before anything is bought or started: time, memory, energy, cost. Imports no torch."""
