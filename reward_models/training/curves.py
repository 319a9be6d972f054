"""The course of a training: losses and accuracies after each epoch, and when to stop."""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """After `epoch` of `member`: the loss of the pairs trained on, and loss and pair accuracy of those to stop by."""

    member: int
    epoch: int
    train_loss: float
    stop_loss: float
    stop_accuracy: float

    def record(self) -> dict[str, float]:
        return asdict(self)


def accuracy(difference: Float[Tensor, "N"], preference: Float[Tensor, "N"]) -> float:
    """The share of the pairs that are no tie in which the scores agree; equal scores count half. NaN without any."""
    decided = preference != 0.5
    return float((0.5 + 0.5 * difference.sign() * (preference - 0.5).sign())[decided].mean())


def best(points: list[Point]) -> Point:
    """The point with the least loss to stop by, the earliest of equal ones."""
    return min(points, key=lambda point: point.stop_loss)


def stopped(points: list[Point], patience: int) -> bool:
    """Whether the loss to stop by has not fallen for `patience` epochs."""
    return bool(points) and points[-1].epoch - best(points).epoch >= patience
