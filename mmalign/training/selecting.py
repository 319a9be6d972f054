"""What is learnt from a rollout: the trajectories that a config selects, and their advantages."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.config.schema import Config
from mmalign.credit.groups import Credit, group_std
from mmalign.credit.terminal import Terminal
from mmalign.extension.rest import taken
from mmalign.selection.selection import compared
from mmalign.training.rollout import Rollout
from mmalign.types import Judgement, Tree, over

IMAGE = Terminal()  # the credit of objectives that learn from finished images


def choose(c: Config, tree: Tree, judged: Judgement) -> Bool[Tensor, "N"]:
    """Whether each trajectory of all ranks is learnt from: without a selection every one."""
    if c.select is None:
        return torch.ones_like(tree.prompt, dtype=torch.bool)
    return c.select.choose(tree, judged)


def advantages(
    c: Config,
    tree: Tree,
    judged: Judgement,
    selected: Bool[Tensor, "N"],
    iteration: int = 0,
    weights: Float[Tensor, "P"] | None = None,
) -> Float[Tensor, "N T a b"] | None:
    """The advantages of all trajectories, 0 for those that are not learnt from, by the credit as it stands in the
    iteration, times the `weights` of the prompts; None where the objective has none."""
    if c.advantage is None:
        return None
    measured = judged if c.select is None else compared(judged, c.select, selected)
    advantage = c.advantage(tree, measured, credit_at(c, iteration), c.mask, c.dead_spread)
    if weights is not None:
        advantage = advantage * over(weights[tree.prompt], advantage)
    return advantage * over(selected, advantage)


def credit_at(c: Config, iteration: int) -> Credit:
    return (c.credit or IMAGE).at(iteration / max(1, c.iterations - 1))


def part(
    rollout: Rollout, judged: Judgement, advantage: Float[Tensor, "N T a b"] | None, selected: Bool[Tensor, "N"]
) -> tuple[Rollout, Judgement, Float[Tensor, "n T a b"] | None]:
    """The selected trajectories of this rank, their rewards and advantages. Finished images keep their numbers."""
    if bool(selected.all()):
        return rollout, judged, advantage

    def rows(values: Tensor) -> Tensor:
        return values[selected]

    paths = taken(rollout.paths, selected.nonzero()[:, 0])
    parts = {name: rows(values) for name, values in judged.parts.items()}
    optional = {name: getattr(judged, name) for name in ("ends", "log_ratio", "values", "process")}
    optional = {name: None if values is None else rows(values) for name, values in optional.items()}
    return (
        replace(rollout, paths=paths, deviation=rows(rollout.deviation), log_ratio=optional["log_ratio"]),
        replace(judged, reward=rows(judged.reward), parts=parts, **optional),
        None if advantage is None else rows(advantage),
    )


def statistics(c: Config, tree: Tree, judged: Judgement, selected: Bool[Tensor, "N"]) -> dict[str, int | float]:
    """What a selection adds to the metrics of an iteration."""
    if c.select is None:
        return {}
    spread = group_std(torch.where(selected, judged.reward[:, -1], torch.nan), tree.prompt)
    return {"selected": int(selected.sum()), "selected_std": float(spread[selected].mean())}
