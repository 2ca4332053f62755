"""Sampling and grading on several seats, which are processes that each have an engine of their own."""
