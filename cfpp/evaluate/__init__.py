"""How good a model is, told from held-out episodes: metrics, a report, `run` for both."""

from cfpp.evaluate.job import is_reported, run
from cfpp.evaluate.measure import Settings, check, check_clips

__all__ = ["Settings", "check", "check_clips", "is_reported", "run"]
