"""Generations of a model: each repeats stages of a recipe with the last promoted model as the teacher, and
is promoted if it passes a gate."""
