"""Measurements of speed, one module per subject; run with ``python -m benchmarks.NAME``."""
