"""Reward models: scorers for generated images. `load("shapes")` gives a scorer; call it with images and prompts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reward_models.prompt import Prompt

if TYPE_CHECKING:
    from reward_models.registry import load
    from reward_models.types import Card, RewardModel, Scores

__all__ = ["Card", "Prompt", "RewardModel", "Scores", "load"]

# these import torch, which takes seconds, and are imported by the first use of their names
LATER = {"load": "registry", "Card": "types", "RewardModel": "types", "Scores": "types"}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LATER[name]}"), name)
