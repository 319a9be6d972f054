"""Reward models trained from preferences: `fit` trains one, `evaluate` measures any scorer on pairs."""

from reward_models.training.evaluation import evaluate
from reward_models.training.fitting import FITS, fit

__all__ = ["FITS", "evaluate", "fit"]
