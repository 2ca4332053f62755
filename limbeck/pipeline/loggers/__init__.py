"""Loggers of metrics: they write a run's metrics for tools that people look at, one file for each tool."""
