"""One model for many trade-offs: it reads how much each reward counts (DPA, arXiv 2402.18571).

Each prompt of an iteration has a direction in the space of rewards, a unit vector, and the reward of its images is the
one along it. The model reads the direction in words after the prompt, which scorers do not see; who uses the model
writes the same words.

Left out: negative weights of the paper, and its directions drawn from an arc. Those here are drawn from a lattice, so
that a few whole numbers describe each of them exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from types import MappingProxyType
from typing import Annotated

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from mmalign.rewards.rule import Groups, Rule, Values, Weights
from mmalign.seeds import seed_of
from reward_models import Prompt

MOST = 1000  # directions of a lattice

Counts = tuple[int, ...]


def lattice(kinds: int, parts: int) -> list[Counts]:
    """All `kinds` whole numbers of at least 0 that add up to `parts`."""
    if kinds == 1:
        return [(parts,)]
    return [(n, *rest) for n in range(parts, -1, -1) for rest in lattice(kinds - 1, parts - n)]


@dataclass(frozen=True)
class Directed(Rule):
    """The weighted sum along `v = n / |n|`: the reward of an image is `sum_k v_k w_k z_k` of its scores z and weights
    w. Each prompt draws whole numbers `n` that add up to `parts` in each iteration, all of them equally often.

    `suffix` has them in words: `{scorer.component}` in it stands for the number of that reward. Or it lists a text for
    each direction, from the first reward alone to the last alone. Null names each reward with its number. An evaluation
    measures the directions with whole numbers that add up to `fan`, which divides `parts`.
    """

    parts: Annotated[int, Ge(1), Le(100)] = 4
    fan: Annotated[int, Ge(1), Le(100)] = 2
    suffix: str | tuple[str, ...] | None = None
    type, linear = "directed", True
    refuses = MappingProxyType({
        "at_least": "a constraint would count the same in all directions",
        "extend": "a critic's request would lack the words for the direction",
        "refresh": "its images would be drawn without a direction",
    })  # fmt: skip

    def __post_init__(self):
        if self.parts % self.fan:
            raise ValueError(f"fan: {self.fan} does not divide parts: {self.parts}")
        if not "".join(self.suffix or ()).isprintable():
            raise ValueError(f"suffix: {self.suffix!r}: printable characters are needed")

    def check(self, weights: Mapping[str, tuple[float, float]]) -> None:
        names = [*weights]
        if len(names) < 2:
            raise ValueError(f"combine: directed: at least two rewards are needed, got {', '.join(names)}")
        if (number := comb(self.parts + len(names) - 1, self.parts)) > MOST:
            raise ValueError(
                f"combine: directed: parts: {self.parts} makes {number} directions, {MOST} at most; lower it"
            )
        if isinstance(self.suffix, tuple) and len(self.suffix) != number:
            raise ValueError(f"combine: directed: suffix: {len(self.suffix)} texts for {number} directions")
        each = [self.words(names, counts) for counts in lattice(len(names), self.parts)]
        if len({*each}) < len(each):
            named = " ".join(f"{{{name}}}" for name in names[:-1])
            raise ValueError(
                f"combine: directed: suffix: {self.suffix!r} is the same for two directions; use {named} in a text, or "
                "different ones in a list"
            )

    def words(self, names: Sequence[str], counts: Counts) -> str:
        """A direction in words."""
        if self.suffix is None:
            return " | " + ", ".join(f"{name.rpartition('.')[2]} {n}" for name, n in zip(names, counts, strict=True))
        if isinstance(self.suffix, tuple):
            return self.suffix[lattice(len(names), self.parts).index(tuple(counts))]
        text = self.suffix
        for name, n in zip(names, counts, strict=True):
            text = text.replace(f"{{{name}}}", str(n))
        return text

    def measured(self, rewards: int) -> int:
        return comb(self.fan + rewards - 1, self.fan)

    def opened(self, names: Sequence[str], versions: Mapping[str, str]) -> "OpenDirected":
        return OpenDirected(self, tuple(names))

    def __call__(self, values: Values, names: Sequence[str], group: Groups, weights: Weights, floor: float) -> Tensor:
        raise ValueError("a direction is that of a prompt, and no prompts are given")


@dataclass(frozen=True)
class OpenDirected(Rule):
    """`Directed` with the `names` of its rewards, and the directions of some prompts."""

    rule: Directed
    names: tuple[str, ...]
    directions: Float[Tensor, "P K"] | None = None
    type, linear = "directed", True

    def drawn(self, prompts: Sequence[Prompt], seed: int, iteration: int) -> list[Counts]:
        """The whole numbers of each prompt in an iteration."""
        every = lattice(len(self.names), self.rule.parts)
        return [every[seed_of(seed, "direction", iteration, prompt.id) % len(every)] for prompt in prompts]

    def suffixes(self, prompts: Sequence[Prompt], seed: int, iteration: int) -> list[str]:
        return [self.rule.words(self.names, counts) for counts in self.drawn(prompts, seed, iteration)]

    @property
    def fanned(self) -> list[Counts]:
        """The whole numbers of an evaluation's directions, the most even ones first."""
        times = self.rule.parts // self.rule.fan
        return sorted((tuple(times * n for n in counts) for counts in lattice(len(self.names), self.rule.fan)), key=max)

    @property
    def fan(self) -> dict[str, str]:
        width = len(str(self.rule.parts))  # so that names sort by their numbers
        return {":".join(f"{n:0{width}}" for n in each): self.rule.words(self.names, each) for each in self.fanned}

    def for_prompts(self, prompts: Sequence[Prompt], seed: int, iteration: int | None) -> "OpenDirected":
        if not prompts:
            return self
        every = [self.fanned[0]] * len(prompts) if iteration is None else self.drawn(prompts, seed, iteration)
        counts = torch.tensor(every, dtype=torch.float64)
        return replace(self, directions=(counts / counts.norm(dim=1, keepdim=True)).float())

    def __call__(self, values: Values, names: Sequence[str], group: Groups, weights: Weights, floor: float) -> Tensor:
        """A score that does not count in a direction may be missing."""
        columns = [self.names.index(name) for name in names]
        along = self.directions[:, columns][group] * weights
        return torch.where(along != 0, values * along, 0.0).sum(1)
