"""Reward models trained from preferences: `fit` trains one, `calibrate` calibrates it on other pairs, and `evaluate`
measures any scorer on pairs."""

from reward_models.training.calibrating import calibrate
from reward_models.training.evaluation import evaluate
from reward_models.training.fitting import FITS, fit

__all__ = ["FITS", "calibrate", "evaluate", "fit"]
