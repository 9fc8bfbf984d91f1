"""Fixtures of the application's tests, for pages and examples that use a trained run."""

from tests.polypseg.conftest import synthetic_data, tiny_run

__all__ = ["synthetic_data", "tiny_run"]
