"""Reward models: scorers for generated images. `load("shapes")` gives a scorer; call it with images and prompts."""

from typing import TYPE_CHECKING, Any

from reward_models.prompt import Prompt

if TYPE_CHECKING:
    from reward_models.functions import FunctionScorer
    from reward_models.registry import load
    from reward_models.tools.score_files import score_files
    from reward_models.types import Card, RewardModel, Scores

__all__ = ["Card", "FunctionScorer", "Prompt", "RewardModel", "Scores", "load", "score_files"]


def __getattr__(name: str) -> Any:
    """A public name other than `Prompt`, at its first use, because its module imports torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reward_models import functions, registry, types
    from reward_models.tools import score_files

    homes = {"load": registry, "FunctionScorer": functions, "score_files": score_files}
    return getattr(homes.get(name, types), name)
