"""What an extension says of itself, and what it wants drawn."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.credit.groups import Credit
from mmalign.learn.loss import Loss, Step
from mmalign.types import Judgement, Plan, Tree


class Draws(NamedTuple):
    """The rest of trajectory `row[i]` from its state `step[i]`, under the text `request[i]` (None: its prompt)."""

    row: list[int]
    step: list[int]
    request: list[str] | None = None


class Extension:
    """Defaults: `rounds` is how often it is called at most; `off_loss` the loss of steps drawn under another text."""

    rounds: int | None = 1  # None: until it wants nothing
    off_loss: Callable[[Step], Loss] | None = None

    def __call__(self, tree: Tree, judged: Judgement, requests: Sequence[str]) -> Draws:
        """What to draw; `requests` has the revised request of each trajectory's image, empty where there is none."""
        raise NotImplementedError

    def accepted(
        self, reward: Float[Tensor, "n"], before: Float[Tensor, "n"], best: Float[Tensor, "n"]
    ) -> Bool[Tensor, "n"]:
        """Which of the new trajectories join their groups, by their `reward`, that of the trajectory each starts from,
        and the best of its group."""
        return torch.ones_like(reward, dtype=torch.bool)

    def most(self, plan: Plan, seeds: int) -> tuple[int, int]:
        """The most trajectories of a prompt that it draws, and the earliest state that they start from."""
        raise NotImplementedError

    def check(self, plan: Plan, seeds: int, credit: Credit) -> None:
        """ValueError, in one line, where the plan or the credit does not suit it."""
