"""Reward models: scorers for generated images. `load("shapes")` gives a scorer; call it with images and prompts."""

from reward_models.registry import load
from reward_models.types import Card, Prompt, RewardModel, Scores

__all__ = ["Card", "Prompt", "RewardModel", "Scores", "load"]
