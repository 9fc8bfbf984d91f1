"""Bridges to other libraries; each needs its library to be installed."""
