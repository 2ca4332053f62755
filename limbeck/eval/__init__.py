"""Evaluation: accuracy with intervals, judges and their calibration, arena ratings and their voters."""
