"""Measurements of solver speed; run with ``pytest benchmarks/ --benchmark``."""
