"""Reward models trained from preferences: `fit` trains one, `evaluate` measures any scorer on pairs."""

from reward_models.training.evaluate import evaluate
from reward_models.training.fit import FITS, fit

__all__ = ["FITS", "evaluate", "fit"]
