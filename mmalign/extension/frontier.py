"""A frontier: branch again where it promises most, until a budget of images is spent (after DeepSearch, arXiv
2509.25454).

A state's value is the mean reward of the finished images below it, so that every image drawn is also learnt from and
nothing is decoded for the search alone. The image that a state was chosen by is one of those its new siblings are
compared with, which a fixed tree does not do: the estimate is no longer unbiased. Left out: the replay buffer; updates
of values along a path; the choice of confident failures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Bool, Int
from torch import Tensor

from mmalign.credit.groups import Credit, dead, group_std
from mmalign.extension.extension import Draws, Extension
from mmalign.types import Judgement, Plan, Tree


@dataclass(frozen=True)
class Frontier(Extension):
    """Until a prompt has `leaves` images: branch into `children` from each of the `expand` states, of those before a
    stochastic step that have one child, with the largest `value` tanh(V) + `spread` S + `depth` sqrt(d / D). V is the
    mean reward of the images below the state, from the mean of the prompt, and S the standard deviation of those below
    the state it came from, both in standard deviations of the prompt; d is the number of stochastic steps before the
    state, of D. Of equal rewards the depth alone counts."""

    leaves: Annotated[int, Ge(2)] = 18
    expand: Annotated[int, Ge(1)] = 2
    children: Annotated[int, Ge(2)] = 3
    value: Annotated[float, Ge(0)] = 1.0
    spread: Annotated[float, Ge(0)] = 0.5
    depth: Annotated[float, Ge(0)] = 0.25
    type, rounds = "frontier", None

    def __call__(self, tree: Tree, judged: Judgement, requests: Sequence[str]) -> Draws:
        reward, draws = judged.reward[:, -1].double(), Draws([], [])
        for number in tree.prompt.unique():
            group = (tree.prompt == number).nonzero()[:, 0]
            images = reward[group]
            mean, unit = images.nanmean(), scale(images)
            ranked = []
            for row, k, before in unexpanded(tree.node[group], tree.std[group] > 0):
                noisy = (tree.std[group[row]] > 0).nonzero()[:, 0]
                here = tree.node[group, k] == tree.node[group[row], k]
                worth = self.value * torch.tanh((images[here].nanmean() - mean) / unit)
                worth = worth + self.spread * deviation(images[before]) / unit
                depth = float((noisy < k).sum()) / len(noisy)
                ranked.append((-float((worth + self.depth * depth**0.5).nan_to_num(-1e9)), k, int(group[row])))
            room = self.leaves - len(group)
            for _, k, row in sorted(ranked)[: self.expand]:
                new = max(0, min(self.children - 1, room))
                room -= new
                draws.row.extend([row] * new)
                draws.step.extend([k] * new)
        return draws

    def most(self, plan: Plan, seeds: int) -> tuple[int, int]:
        free = [k for _, k, _ in unexpanded(plan.state[: plan.trained], plan.noise[: plan.trained] > 0)]
        return max(0, self.leaves - seeds * plan.trained), min(free, default=0)

    def check(self, plan: Plan, seeds: int, credit: Credit) -> None:
        images = seeds * plan.trained
        if not [*unexpanded(plan.state[: plan.trained], plan.noise[: plan.trained] > 0)]:
            raise ValueError("extend: frontier finds no state with a single child; use a plan with several noisy steps")
        if self.leaves <= images:
            raise ValueError(f"extend: leaves: {self.leaves}; the plan gives {images} images of a prompt already")


def deviation(values: Tensor) -> Tensor:
    """The population standard deviation of those that are not NaN; NaN of none."""
    return group_std(values, torch.zeros(len(values), dtype=torch.long))[0]


def scale(values: Tensor) -> Tensor:
    """The deviation of values that differ; of others infinite, so that nothing is made of rounding."""
    flat = dead(values, torch.zeros(len(values), dtype=torch.long)).bool().all()
    return torch.full_like(values[0], torch.inf) if flat else deviation(values)


def unexpanded(
    node: Int[Tensor, "N states"], noisy: Bool[Tensor, "N T"]
) -> Iterator[tuple[int, int, Bool[Tensor, "N"]]]:
    """The states before a stochastic step with a single child: the first trajectory through each, its column, and the
    trajectories below the state that it came from by its last stochastic step."""
    for k in range(noisy.shape[1]):
        for number in node[:, k].unique():
            below = (node[:, k] == number) & noisy[:, k]
            if bool(below.any()) and len(node[below, k + 1].unique()) == 1:
                row = int(below.nonzero()[0, 0])
                steps = (noisy[row, :k]).nonzero()[:, 0]
                last = int(steps[-1]) if len(steps) else k
                yield row, k, node[:, last] == node[row, last]
