"""Combine the components of several scorers into one reward per image."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.errors import Failed
from reward_models import combine


@dataclass(frozen=True)
class Combination:
    """How the components named by `weights` become one reward; the rules are those of `reward_models.combine`.

    `rule` is sum, product, gate, mrn or gdpo; `gate` the component that opens it. gdpo normalises like mrn here, and
    whitens where advantages are scaled over the batch. `reference`, mean and standard deviation by component, puts
    scores in its units first. A component that spreads by `floor` or less within a prompt counts as dead.
    """

    weights: Mapping[str, float]
    rule: str = "sum"
    gate: str | None = None
    reference: Mapping[str, tuple[float, float]] | None = None
    floor: float = 0.0

    def __call__(self, parts: Mapping[str, Float[Tensor, "E"]], owner: Int[Tensor, "E"]) -> Float[Tensor, "E"]:
        """The reward of each image; `owner` is the row of its prompt. Failed where the scores do not suit the rule."""
        try:
            return self._combined(parts, owner)
        except ValueError as error:
            raise Failed(f"combine: {self.rule}: {error}") from error

    def level(self, parts: Mapping[str, Float[Tensor, "N"]], reward: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """What shows the progress of images with this `reward`: the reward itself, or for mrn and gdpo, whose mean is 0
        in every group, the weighted sum of the scores before they are normalised, in the reference's units if there is
        one. NaN where a part is missing."""
        if self.rule not in ("mrn", "gdpo"):
            return reward
        return replace(self, rule="sum")(parts, torch.zeros(len(reward), dtype=torch.long))

    def _combined(self, parts: Mapping[str, Float[Tensor, "E"]], owner: Int[Tensor, "E"]) -> Float[Tensor, "E"]:
        names, weights = list(self.weights), torch.tensor(list(self.weights.values()))
        values = torch.stack([parts[name] for name in names], 1)
        if not weights.any() and self.rule != "gate":  # constraints that hold, and nothing else
            return torch.zeros(len(values))
        if self.reference is not None:
            mean, std = torch.tensor([self.reference[name] for name in names]).T
            values = combine.referenced(values, mean, std)
        if self.rule == "product":
            return combine.product(values, weights)
        if self.rule == "gate":
            return combine.gated(values, weights, names.index(self.gate))
        if self.rule in ("mrn", "gdpo"):
            return combine.normalised(values, owner, weights, self.floor)
        return combine.weighted(values, weights)
