"""The registry of scorers. A new built-in scorer needs one line here; a user's own needs only its import path."""

import inspect
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from reward_models.allowlist import import_allowed
from reward_models.cache import Cached
from reward_models.files import home
from reward_models.functions import FunctionScorer, is_function, name_of
from reward_models.types import Differentiable, RewardModel

SCORERS: dict[str, str] = {
    "shapes": "reward_models.scorers.shapes:Shapes",
    "jpeg_size": "reward_models.scorers.jpeg_size:JpegSize",
    "clip": "reward_models.scorers.clip:clip",
    "image_stats": "reward_models.scorers.image_stats:ImageStats",
    "pickscore": "reward_models.scorers.pickscore:PickScore",
    "hpsv2": "reward_models.scorers.hpsv2:hpsv2",
    "aesthetic": "reward_models.scorers.aesthetic:Aesthetic",
    "image_reward": "reward_models.scorers.image_reward:ImageReward",
    "ocr": "reward_models.scorers.ocr:Ocr",
    "geneval": "reward_models.scorers.geneval:geneval",
    "grounded": "reward_models.scorers.grounded:grounded",
    "places": "reward_models.scorers.places:Places",
    "remote": "reward_models.service.client:Remote",
    "vqa": "reward_models.scorers.vqa:Vqa",
    "rational": "reward_models.scorers.rational:Rational",
    "vlm_yes_no": "reward_models.scorers.vlm_yes_no:VlmYesNo",
    "checklist": "reward_models.scorers.checklist:Checklist",
    "pairwise": "reward_models.scorers.pairwise:Pairwise",
    "unified": "reward_models.scorers.unified:Unified",
    "visual_erm": "reward_models.scorers.visual_erm:VisualErm",
    "shapes_critic": "reward_models.scorers.shapes_critic:ShapesCritic",
    "things": "reward_models.scorers.things:Things",
    "things_critic": "reward_models.scorers.things_critic:ThingsCritic",
    "shapes_classifier": "reward_models.scorers.shapes_classifier:ShapesClassifier",
    "things_classifier": "reward_models.scorers.things_classifier:ThingsClassifier",
    "hpsv3": "reward_models.scorers.hpsv3:Hpsv3",
    "fitted": "reward_models.scorers.fitted:Fitted",
    "context": "reward_models.scorers.context:Context",
    "likeness": "reward_models.scorers.likeness:Likeness",
    "natural": "reward_models.scorers.natural:Natural",
    "voted": "reward_models.scorers.voted:Voted",
    "zoomed": "reward_models.scorers.zoomed:Zoomed",
}

# with `in_graph`: `vlm_yes_no` if its model is in this process, `zoomed` of one of the others at a grid
GRADIENTS = (
    "clip", "pickscore", "hpsv2", "aesthetic", "image_reward", "hpsv3", "vqa", "vlm_yes_no", "fitted", "natural",
    "image_stats", "shapes_classifier", "things_classifier", "zoomed", "context",
)  # fmt: skip

WORDS = Sequence[str], Sequence[str] | None  # annotations of settings that one text would be cut into letters for
HOME = re.compile(r"~[\w.-]*(/|\Z)")


def load(name: str, /, scorer: str | None = None, **settings: Any) -> RewardModel:
    """A `RewardModel` of `SCORERS`, or the user's own as `my_module:MyScorer`, built with `settings`; or, as
    `my_module:my_function`, a function of images and prompts (`reward_models.functions.FunctionScorer`). With `scorer`,
    `name` is only a label, so that one scorer can be used twice with different settings.

    ValueError, in one line: an unknown name (similar names are listed), a module that is not allowed
    (`reward_models.allowlist`), a missing module or attribute, unknown settings, or invalid ones. A scorer's module is
    imported only when it is loaded. A setting that begins with `~/` is a path in the home folder.

        scores = load("clip")(torch.rand(2, 3, 32, 32), [Prompt("a red circle"), Prompt("two squares")])
        scores.column("cosine")  # [2]
    """
    settings = {
        key: home(value) if isinstance(value, str) and HOME.match(value) else value for key, value in settings.items()
    }
    name = scorer or name
    if name not in SCORERS and ":" not in name:
        near = get_close_matches(name, SCORERS, cutoff=0.4) or SCORERS
        raise ValueError(f"no scorer called {name!r}; near names: {', '.join(near)}; your own is 'my_module:MyScorer'")
    factory = import_allowed(SCORERS.get(name, name), f"scorer {name!r}", ours=name in SCORERS)
    if is_function(factory):
        factory = partial(FunctionScorer, factory, name_of(factory))
    signature = inspect.signature(factory)
    try:
        signature.bind(**settings)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no settings"
        raise ValueError(f"scorer {name!r}: {error}; it takes {takes}") from error
    for key, parameter in signature.parameters.items():
        if parameter.annotation in WORDS and isinstance(value := settings.get(key), str):
            raise ValueError(f"scorer {name!r}: {key} is a list, [{value}], not {value!r}")
    try:
        return factory(**settings)
    except (TypeError, AttributeError, RuntimeError, OSError, OverflowError) as error:
        if not settings:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"scorer {name!r}: not with these {', '.join(settings)}: {reason[:300]}") from error


def differentiable(scorer: RewardModel) -> Differentiable:
    """The scorer, without its cache, if it has gradients. ValueError, in one line, if not."""
    scorer = scorer.scorer if isinstance(scorer, Cached) else scorer
    if not isinstance(scorer, Differentiable):
        raise ValueError(f"{scorer.card.scorer} has no gradients here; those that have: {', '.join(GRADIENTS)}")
    return scorer


def given(scorer: Any, setting: str) -> RewardModel:
    """The scorer that another one wraps: a scorer, a name for `load`, or {"scorer": name, setting: value}. ValueError
    that begins with the name of the `setting`."""
    if isinstance(scorer, RewardModel):
        return scorer
    rest = {"scorer": scorer} if isinstance(scorer, str) else scorer
    if not isinstance(rest, Mapping) or not isinstance(rest.get("scorer"), str):
        raise ValueError(
            f"{setting}: {str(scorer)[:80]!r} is neither a scorer, nor its name, nor {{scorer: NAME, ...}}"
        )
    try:
        return load(rest["scorer"], **{key: value for key, value in rest.items() if key != "scorer"})
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None
