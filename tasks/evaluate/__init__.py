"""Stage evaluate: metrics with intervals, curves and pictures."""
