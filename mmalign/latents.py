"""Which latents of trajectories are kept, and the tensors that they lie in."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """The columns of trajectories whose latents are kept: numbers of states, and of the steps whose means are."""

    states: tuple[int, ...] = ()
    means: tuple[int, ...] = ()

    @classmethod
    def all(cls, steps: int) -> "Columns":
        return cls(tuple(range(steps + 1)), tuple(range(steps)))

    @classmethod
    def around(cls, steps: Iterable[int]) -> "Columns":
        """What a replay of these steps reads: the state before and after each, and its mean."""
        means = sorted({*steps})
        return cls(tuple(sorted({*means, *(k + 1 for k in means)})), tuple(means))

    def __or__(self, other: "Columns") -> "Columns":
        pairs = (self.states, other.states), (self.means, other.means)
        return Columns(*(tuple(sorted({*one, *two})) for one, two in pairs))


@dataclass(frozen=True)
class Room:
    """Tensors that a rollout writes its latents into: the fields of `Trajectories` of the same names."""

    x: Float[Tensor, "N states C h w"]
    mean: Float[Tensor, "N means C h w"]
    finals: Float[Tensor, "E C h w"]

    @classmethod
    def of(
        cls, trajectories: int, images: int, keep: Columns, shape: tuple[int, ...], device: torch.device | None = None
    ) -> "Room":
        """Room for so many trajectories and finished images of latents of a `shape`."""
        counts = (trajectories, len(keep.states)), (trajectories, len(keep.means)), (images,)
        return cls(*(torch.empty(*count, *shape, device=device) for count in counts))

    def part(self, trajectories: slice, images: slice) -> "Room":
        return Room(self.x[trajectories], self.mean[trajectories], self.finals[images])


def places_of(present: tuple[int, ...], columns: Int[Tensor, "*M"], what: str) -> Int[Tensor, "*M"]:
    """The place of each column among those `present`. ValueError for one that is not."""
    place = {column: i for i, column in enumerate(present)}
    if missing := sorted({*columns.flatten().tolist()} - {*present}):
        raise ValueError(f"{what} {missing[0]} of the trajectories was not kept; kept are {[*present]}")
    places = [place[column] for column in columns.flatten().tolist()]
    return torch.tensor(places, dtype=torch.long, device=columns.device).view(columns.shape)
