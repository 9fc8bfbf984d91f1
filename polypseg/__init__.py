"""Colon-polyp segmentation with deep equilibrium models, for research only."""
