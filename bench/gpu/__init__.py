"""What one NVIDIA card does: what is exact, and what it costs. See `__main__.py`."""
