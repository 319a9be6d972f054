"""Combine the components of several scorers into one reward per image.

A rule is called as `rule(values [N, K], names, group [N], weights [K], floor) -> reward [N]`, where `values` are raw
scores, NaN where missing, and `group` numbers each image's prompt; the maths is that of `reward_models.combine`. Add
one: a frozen dataclass that derives from `Rule`, and its name in `COMBINATIONS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.errors import Failed
from reward_models import combine

Values = Float[Tensor, "N K"]
Groups = Int[Tensor, "N"]
Weights = Float[Tensor, "K"]


class Rule:
    """Defaults of what a rule says of itself.

    `scale`: the unit that advantages must be measured in, because the rule has normalised within groups already (None:
    any). `below_0`: whether it works with scores below 0, and so with constraints and a reference. `weightless`:
    whether it gives a reward while all weights are 0.
    """

    scale: ClassVar[str | None] = None
    below_0: ClassVar[bool] = True
    weightless: ClassVar[bool] = False

    def check(self, weights: Mapping[str, tuple[float, float]]) -> None:
        """ValueError where the components, with the ends of each weight over the run, do not suit the rule."""

    def factors(self, low: Mapping[str, float], weighted: Mapping[str, float]) -> dict[str, float]:
        """The smallest value of each factor that must not be below 0, by name, from the smallest score of each
        component and the smallest product of weight and score."""
        return {}


@dataclass(frozen=True)
class Sum(Rule):
    """Sum of weight x score (Flow-GRPO). The widest range decides."""

    type = "sum"

    def __call__(self, values: Values, names: Sequence[str], group: Groups, weights: Weights, floor: float) -> Tensor:
        return combine.weighted(values, weights)


@dataclass(frozen=True)
class Product(Rule):
    """Product of score ^ weight (VIEScore, arXiv 2312.14867): one component at 0 takes everything."""

    type, below_0 = "product", False

    def check(self, weights: Mapping[str, tuple[float, float]]) -> None:
        for name, ends in weights.items():
            if min(ends) < 0:
                raise ValueError(
                    f"rewards: {name}: a weight below 0 under combine: product divides by the score, which may be "
                    f"0; use sum, mrn or gdpo with it, got {min(ends):g}"
                )

    def factors(self, low: Mapping[str, float], weighted: Mapping[str, float]) -> dict[str, float]:
        return dict(weighted)

    def __call__(self, values: Values, names: Sequence[str], group: Groups, weights: Weights, floor: float) -> Tensor:
        return combine.product(values, weights)


@dataclass(frozen=True)
class Gate(Rule):
    """The component `by` times (1 + the weighted sum of the others)."""

    by: str = ""
    type, below_0, weightless = "gate", False, True

    def check(self, weights: Mapping[str, tuple[float, float]]) -> None:
        if self.by not in weights:
            raise ValueError(f"combine: gate: by: one of the rewards is needed, {', '.join(weights)}; got {self.by!r}")

    def factors(self, low: Mapping[str, float], weighted: Mapping[str, float]) -> dict[str, float]:
        others = sum(value for name, value in weighted.items() if name != self.by)
        return {self.by: low[self.by], "1 + the weighted sum of the others": 1 + others}

    def __call__(self, values: Values, names: Sequence[str], group: Groups, weights: Weights, floor: float) -> Tensor:
        return combine.gated(values, weights, [*names].index(self.by))


@dataclass(frozen=True)
class Mrn(Rule):
    """Normalise each component within groups, then add (MRN; ReFine-RFT)."""

    type, scale = "mrn", "none"

    def __call__(self, values: Values, names: Sequence[str], group: Groups, weights: Weights, floor: float) -> Tensor:
        return combine.normalised(values, group, weights, floor)


class Gdpo(Mrn):
    """The same, then whitened over the batch (GDPO, arXiv 2601.05242), where advantages are scaled."""

    type, scale = "gdpo", "batch"


COMBINATIONS = (Sum, Product, Gate, Mrn, Gdpo)


@dataclass(frozen=True)
class Combination:
    """How the components named by `weights` become one reward, by `rule`.

    `reference`, mean and standard deviation by component, puts scores in its units first. A component that spreads by
    `floor` or less within a prompt counts as dead.
    """

    weights: Mapping[str, float]
    rule: Callable[..., Tensor] = field(default_factory=Sum)
    reference: Mapping[str, tuple[float, float]] | None = None
    floor: float = 0.0

    def __call__(self, parts: Mapping[str, Float[Tensor, "E"]], owner: Int[Tensor, "E"]) -> Float[Tensor, "E"]:
        """The reward of each image; `owner` is the row of its prompt. Failed where the scores do not suit the rule."""
        weights = torch.tensor([*self.weights.values()])
        if not weights.any() and not self.rule.weightless:  # constraints that hold, and nothing else
            return torch.zeros(len(next(iter(parts.values()))))
        try:
            return self.rule(self._values(parts), [*self.weights], owner, weights, self.floor)
        except ValueError as error:
            raise Failed(f"combine: {getattr(self.rule, 'type', self.rule)}: {error}") from error

    def level(self, parts: Mapping[str, Float[Tensor, "N"]], reward: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """The progress of images with this `reward`: the reward itself, or for rules whose mean is 0 in every group the
        weighted sum of the scores before they are normalised. NaN where a component is missing."""
        if self.rule.scale is None:
            return reward
        return combine.weighted(self._values(parts), torch.tensor([*self.weights.values()]))

    def _values(self, parts: Mapping[str, Float[Tensor, "N"]]) -> Values:
        """Raw scores, or those in the reference's units."""
        values = torch.stack([parts[name] for name in self.weights], 1)
        if self.reference is None:
            return values
        mean, std = torch.tensor([self.reference[name] for name in self.weights]).T
        return combine.referenced(values, mean, std)
