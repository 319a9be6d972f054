"""Group statistics, in one place: who is compared with whom, and on what scale.

Only valid (non-NaN) values enter a mean or a spread. A value without an opinion gets advantage 0, and so does every
member of a group with fewer than two valid values or too little spread: such a group is *dead*, it carries no
gradient. The rule is that of `reward_models.combine`: no more spread than rounding makes in numbers of that size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.types import Judgement, Plan, Tree
from reward_models.combine import alive, mean_and_std

Scale = Literal["group", "batch", "none"]


def group_mean(values: Float[Tensor, "N *cells"], group: Int[Tensor, "N"]) -> Float[Tensor, "N *cells"]:
    """The mean of the valid values of each row's group, cell by cell; NaN where a group has none."""
    return mean_and_std(values, group)[0]


def group_std(values: Float[Tensor, "N"], group: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The (population) standard deviation of the valid values of each row's group."""
    return mean_and_std(values, group)[1]


def dead(values: Float[Tensor, "N"], group: Int[Tensor, "N"], spread: float = 0.0) -> Float[Tensor, "N"]:
    """1 for members of a group whose standard deviation is at most `spread`, or no more than rounding, else 0."""
    return (~alive(values, group, spread)).float()


@dataclass(frozen=True)
class Units:
    """How advantages are measured: in units of `scale`, which never counts as less than `floor` (in the reward's own
    unit), and within `[-clip, clip]`.

    `scale` "group" is the standard deviation of the value's own group (GRPO); "batch" the root mean variance within all
    groups that are measured together, which does not blow up groups that hardly differ: with credit gain those of all
    steps (one unit), with credit branch those of one step (a unit for each); "none" the reward's own unit (GARDO,
    arXiv 2512.24138, reports less reward hacking), which the clip does not touch. The noise of the reward model is a
    good `floor`, one for all or one for each trajectory.
    A group whose standard deviation is at most `dead` is dead; with 0, one that differs by rounding alone.
    """

    scale: Scale = "group"
    floor: float | Float[Tensor, "N"] = 0.0
    clip: float = 5.0
    dead: float = 0.0

    def __post_init__(self):
        if self.scale not in ("group", "batch", "none"):
            raise ValueError(f"no scale called {self.scale!r}; known: group, batch, none")

    def of(self, rows: Int[Tensor, "M"]) -> "Units":
        """Those of the trajectories `rows`."""
        return replace(self, floor=self.floor[rows]) if isinstance(self.floor, Tensor) else self


GRPO = Units()


class Credit:
    """What a credit may say of itself; only the call is required.

    `dense`: whether it reads the rewards of states before the last one. `normalises`: whether its advantages are in the
    `Units` that it is called with. `drifts`: whether it needs `Judgement.log_ratio`.
    """

    dense: ClassVar[bool] = False
    normalises: ClassVar[bool] = True
    drifts: ClassVar[bool] = False
    observer: "Credit | None" = None  # it or its part that reads a value head, whose settings it has
    learner: "Credit | None" = None  # it or its part that an adapter learns rewards of steps for

    @property
    def forwards(self) -> int:
        """Network evaluations of each stochastic step at the rollout."""
        return int(self.drifts)

    def at(self, progress: float) -> "Credit":
        """The credit at `progress`, from 0 at the beginning of the run to 1 at its end."""
        return self

    def completions(self, plan: Plan) -> tuple[list[int], int | tuple[int, ...] | None]:
        """The states it needs completed, and in how many ODE steps (`mmalign.flow.plan.complete`)."""
        return [], None

    def check(self, plan: Plan) -> None:
        """ValueError where the plan gives it nothing to compare."""

    def thinner(self, plan: Plan | None, steps: int) -> Iterator["Credit"]:
        """Itself and cheaper credits of its kind for a budget, the most expensive first; `plan` is None if it moves."""
        return iter([self])

    def statistics(self, tree: Tree, judged: Judgement) -> dict[str, float]:
        """What it adds to the metrics of an iteration."""
        return {}


def as_grid(advantage: Float[Tensor, "N T *cells"]) -> Float[Tensor, "N T a b"]:
    """1x1 for a reward that is one number."""
    return advantage if advantage.ndim == 4 else advantage[:, :, None, None]


def normalise(
    values: Float[Tensor, "N *cells"],
    group: Int[Tensor, "N"],
    units: Units = GRPO,
    size: Float[Tensor, "N *cells"] | None = None,
) -> Float[Tensor, "N *cells"]:
    """Advantages `A = (R - mean R) / std R` within each group, in `units` (GRPO, arXiv 2402.03300).

    Of maps, all valid cells of a group's members are compared with one another, wherever they lie: a map that was
    only centred within its image would push every sibling the same way. `size`: that of the numbers that the values are
    differences of, whose rounding they carry."""
    if values.ndim > 1:
        cells, sizes = values[0].numel(), None if size is None else size.flatten()
        units = units.of(torch.arange(len(values)).repeat_interleave(cells))
        return normalise(values.flatten(), group.repeat_interleave(cells), units, sizes).view_as(values)
    valid = ~values.isnan()
    mean, spread = mean_and_std(values.double(), group)
    advantage = values - mean
    if units.scale != "none":
        unit = spread if units.scale == "group" else (spread[valid] ** 2).mean().sqrt()
        advantage = (advantage / unit.clamp(min=units.floor)).clamp(-units.clip, units.clip)
    return torch.where(valid & alive(values, group, units.dead, size), advantage, 0.0).to(values.dtype)
