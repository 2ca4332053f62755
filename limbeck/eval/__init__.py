"""Evaluation: accuracy with confidence intervals, judges and their calibration, arena ratings and the people
who vote.

An arena shows people two models' answers to one prompt; each vote says which of the two is better."""
