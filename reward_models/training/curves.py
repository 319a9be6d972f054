"""The course of a training: losses and accuracies after each epoch, and when to stop."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """After `epoch` of `member`: the loss of the pairs trained on, and loss and pair accuracy of those to stop by."""

    member: int
    epoch: int
    train_loss: float
    stop_loss: float
    stop_accuracy: float | None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def accuracy(difference: Float[Tensor, "N"], preference: Float[Tensor, "N"]) -> float | None:
    """The share of the pairs with a preference in which the scores agree; equal scores count half. None without any."""
    decided = preference != 0.5
    values = (0.5 + 0.5 * difference.sign() * (preference - 0.5).sign())[decided]
    return float(values.mean()) if len(values) else None


def best(points: list[Point]) -> Point:
    """The point with the least loss to stop by, the earliest of equal ones. ValueError where the last
    loss is not finite."""
    if not math.isfinite(points[-1].train_loss + points[-1].stop_loss):
        raise ValueError(f"the loss is not finite after epoch {points[-1].epoch}; a lower learning rate may help")
    return min(points, key=lambda point: point.stop_loss)


def stopped(points: list[Point], patience: int) -> bool:
    """Whether the loss to stop by has not fallen for `patience` epochs."""
    return bool(points) and points[-1].epoch - best(points).epoch >= patience
