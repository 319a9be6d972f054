"""Advantages of a batch, by the credit that the config chooses."""

from collections.abc import Callable
from functools import partial

from jaxtyping import Bool, Float
from torch import Tensor

from mmalign import credit
from mmalign.config.schema import Config
from mmalign.credit.groups import Units, group_mean
from mmalign.credit.region import by_place, maps
from mmalign.training.masks import within
from mmalign.types import Judgement, Trajectories, over


def choose_credit(c: Config) -> Callable:
    settings = {"baseline": c.baseline, "compare": c.compare, "control": c.control}
    units = Units(c.advantage_scale, c.advantage_floor, c.advantage_clip, c.dead_spread)
    return partial(credit.CREDITS[c.credit], units=units, **{k: v for k, v in settings.items() if v is not None})


def weights(c: Config) -> tuple[float, float]:
    """Of the whole image's advantage and of a place's own."""
    given = (c.whole_weight, c.region_weight) if c.region else (1.0, 0.0)
    return tuple(1.0 if weight is None else weight for weight in given)


def advantages(c: Config, paths: Trajectories, judged: Judgement) -> Float[Tensor, "N T a b"]:
    advantage = by_place(paths, judged, choose_credit(c), *weights(c))
    if c.saturated is not None:
        advantage = advantage * ~over(full(c, paths, judged), advantage)
    if c.focus == "map":
        advantage = within(advantage, ~maps(paths, judged)[:, -1, None].isnan())
    return advantage


def full(c: Config, paths: Trajectories, judged: Judgement) -> Bool[Tensor, "N"]:
    """Whether a walk's group has nothing more to learn: its mean reward is `saturated` (RationalRewards' filter)."""
    return group_mean(judged.reward[:, -1], paths.prompt.to(judged.reward.device)) >= c.saturated
