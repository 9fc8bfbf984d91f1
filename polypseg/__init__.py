"""Colon-polyp segmentation with deep equilibrium models. Research use only, not a medical device."""
