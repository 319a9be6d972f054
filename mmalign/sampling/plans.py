"""The plans of `mmalign.flow.plan` with the settings of a run: what a config can name.

Add one: a frozen dataclass that derives from `Fixed`, whose call makes a table, and its name in `PLANS`.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le, MinLen

from mmalign.flow import plan
from mmalign.flow.plan import Times
from mmalign.types import Kernel, Plan

Step = Annotated[int, Ge(0)]
Children = Annotated[int, Ge(1), Le(1000)]


class Fixed:
    """A plan with one position, `children` trained routes per start and nothing to leave out: what most plans are."""

    stochastic: ClassVar[bool] = True
    children: ClassVar[int] = 1  # siblings that a start gives at a step
    routes: int = 1  # trained routes of a start, which are siblings
    uneven: bool = False  # whether groups of one iteration differ in how many forwards they take

    def positions(self, steps: int) -> range:
        """Where the plan may stand; the call takes one of these."""
        return range(1)

    def position(self, iteration: int, steps: int, seed: int) -> int:
        """Where it stands for one prompt's group; siblings must share it to be compared. `seed` is the group's."""
        return self.positions(steps)[0]

    def thinner(self) -> Iterator["Fixed"]:
        """Cheaper plans of the same kind, the most expensive first, for a budget."""
        return iter(())


@dataclass(frozen=True)
class Ode(Fixed):
    """No stochastic step, for objectives that need finished images alone."""

    type, stochastic = "ode", False

    def __call__(self, t: Times, kernel: Kernel, position: int = 0) -> Plan:
        return plan.ode(t, kernel)


@dataclass(frozen=True)
class Sde(Fixed):
    """Every step stochastic but the last (Flow-GRPO)."""

    type = "sde"

    def __call__(self, t: Times, kernel: Kernel, position: int = 0) -> Plan:
        return plan.sde(t, kernel)


@dataclass(frozen=True)
class Window(Fixed):
    """Stochastic from step `steps[0]` to before `steps[1]` (MixGRPO), with `children` routes that part at its start.

    `moves` "progressive": one step later every `every` iterations, and back to the start after the last position
    (MixGRPO); "random": each prompt's group draws a window within the first half of the steps (Flow-GRPO-Fast), or
    stays where there is no room; None: it stays.
    """

    steps: tuple[Step, Step] = (0, 2)
    children: Children = 1
    moves: Literal["progressive", "random"] | None = None
    every: Annotated[int, Ge(1)] = 1
    type = "window"

    def __post_init__(self):
        if not self.steps[0] < self.steps[1]:
            raise ValueError(f"steps: {list(self.steps)}; the first stochastic step and the first after it are needed")
        if self.every > 1 and self.moves != "progressive":
            raise ValueError(f"every: {self.every} acts only with moves: progressive")

    @property
    def routes(self) -> int:
        return self.children

    @property
    def uneven(self) -> bool:
        return self.moves == "random"

    def __call__(self, t: Times, kernel: Kernel, position: int | None = None) -> Plan:
        start = self.steps[0] if position is None else position
        return plan.window(t, kernel, start, start + self.steps[1] - self.steps[0], self.children)

    def positions(self, steps: int) -> range:
        first, size = self.steps[0], self.steps[1] - self.steps[0]
        last = {"progressive": steps - 1 - size, "random": steps // 2 - size}
        return range(first, max(first, last.get(self.moves, first)) + 1)

    def position(self, iteration: int, steps: int, seed: int) -> int:
        positions = self.positions(steps)
        if self.moves == "progressive":
            return positions[iteration // self.every % len(positions)]
        return random.Random(seed).choice(positions)


@dataclass(frozen=True)
class Branch(Fixed):
    """`children` routes leave a deterministic trunk at each of `steps` (TempFlow-GRPO)."""

    steps: Annotated[tuple[Step, ...], MinLen(1)] = (0, 1)
    children: Children = 4
    type = "branch"

    def __post_init__(self):
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(f"steps: {list(self.steps)}; a step is there twice")

    @property
    def routes(self) -> int:
        return len(self.steps) * self.children

    def __call__(self, t: Times, kernel: Kernel, position: int = 0) -> Plan:
        return plan.branch(t, kernel, sorted(self.steps), self.children)

    def thinner(self) -> Iterator["Branch"]:
        """Fewer steps, the latest first, because the layout is decided early; then fewer children, down to two."""
        early = tuple(sorted(self.steps))
        yield from (replace(self, steps=early[:n]) for n in range(len(early) - 1, 0, -1))
        yield from (replace(self, steps=early[:1], children=n) for n in range(self.children - 1, 1, -1))


@dataclass(frozen=True)
class Tree(Fixed):
    """At each of `steps` every state branches into `children` (TreeGRPO, DeepSearch): children^len(steps) images of a
    starting noise."""

    steps: Annotated[tuple[Step, ...], MinLen(1)] = (0, 2)
    children: Annotated[int, Ge(2), Le(1000)] = 3
    type = "tree"

    def __post_init__(self):
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(f"steps: {list(self.steps)}; a step is there twice")

    @property
    def routes(self) -> int:
        return self.children ** len(self.steps)

    def __call__(self, t: Times, kernel: Kernel, position: int = 0) -> Plan:
        return plan.tree(t, kernel, self.steps, self.children)

    def thinner(self) -> Iterator["Tree"]:
        """Fewer steps, the latest first, because the layout is decided early; then fewer children, down to two."""
        early = tuple(sorted(self.steps))
        yield from (replace(self, steps=early[:n]) for n in range(len(early) - 1, 0, -1))
        yield from (replace(self, steps=early[:1], children=n) for n in range(self.children - 1, 1, -1))


PLANS = (Ode, Sde, Window, Branch, Tree)
