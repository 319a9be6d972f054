"""Combine the components of several scorers into one reward per image.

A rule is called as `rule(values [N, K], names, group [N], weights [K], floor) -> reward [N]`, where `values` are raw
scores, NaN where missing, and `group` numbers each image's prompt; the maths is that of `reward_models.combine`. Add
one: a frozen dataclass that derives from `Rule`, and its name in `COMBINATIONS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.errors import Failed
from mmalign.rewards.directions import Directed
from mmalign.rewards.rule import Groups, Rule, Values, Weights
from reward_models import Prompt, combine, files


@dataclass(frozen=True)
class Sum(Rule):
    """Sum of weight x score (Flow-GRPO). The widest range decides."""

    type, linear = "sum", True

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


@dataclass(frozen=True)
class Potential(Rule):
    """The potential `1.5 a c + 0.5 a - c` in [-1, 1] of a state (SPAE), where `a` is the component `correct`, and `c =
    |2 p - 1|` how sure a judge is whose probability of yes `p` is the component `confidence`; both in [0, 1]. Sure and
    right is 1, unsure and right 1/2, unsure and wrong 0, sure and wrong -1. With credit gain a step is credited with
    its difference."""

    correct: str = ""
    confidence: str = ""
    type, below_0 = "potential", False

    def check(self, weights: Mapping[str, tuple[float, float]]) -> None:
        names = (self.correct, self.confidence)
        if self.correct == self.confidence or {*names} != {*weights}:
            raise ValueError(
                "combine: potential: correct and confidence: two components are needed, which are the rewards, "
                f"{', '.join(weights)}; got {self.correct!r}, {self.confidence!r}"
            )
        for name, ends in weights.items():
            if ends != (1, 1):
                raise ValueError(f"rewards: {name}: combine: potential has no weights; give 1, got {ends[0]:g}")

    def __call__(self, values: Values, names: Sequence[str], group: Groups, weights: Weights, floor: float) -> Tensor:
        correct, p = (values[:, [*names].index(name)] for name in (self.correct, self.confidence))
        outside = values[(values < 0) | (values > 1)]
        if len(outside):
            raise ValueError(f"scores in [0, 1] are needed, got {float(outside[0]):.3g}")
        sure = (2 * p - 1).abs()
        return 1.5 * correct * sure + 0.5 * correct - sure


@dataclass(frozen=True)
class Experts(Rule):
    """Weights that depend on the prompt, from a `file` that `mmalign reward experts` has fitted to preferences
    (MJ-VIDEO, arXiv 2502.01719). Scores are in the units of the file. `base`: the folder of its CLIP model, if it is
    one. A component that no image of a prompt has does not count there."""

    file: str = ""
    base: str | None = None
    type = "experts"
    refuses = MappingProxyType({
        "reference": "the scores are in the units of the experts' file",
        "at_least": "the weights are those of the experts' file, and a constraint would change them",
        "refresh": "the experts' file is for the first fit of its scorers",
    })  # fmt: skip

    def check(self, weights: Mapping[str, tuple[float, float]]) -> None:
        if not self.file:
            raise ValueError("combine: experts: file: a file of `mmalign reward experts` is needed")
        for name, ends in weights.items():
            if ends != (1, 1):
                raise ValueError(f"rewards: {name}: combine: experts has weights of its file; give 1, got {ends[0]:g}")

    def opened(self, names: Sequence[str], versions: Mapping[str, str]) -> "OpenExperts":
        from reward_models.training import base as bases, experts

        mixture, about = experts.read(Path(files.home(self.file)))
        if {*names} != {*about.components}:
            raise ValueError(f"{self.file} is for {', '.join(about.components)}; the rewards are {', '.join(names)}")
        experts.check_scorers(self.file, about, versions)
        clip = bases.reopened(about.base.model_dump(), self.base, "cpu", 1)
        if mixture.centre.shape != bases.encode_texts(clip, ["a"])[0].shape:
            raise ValueError(
                f"{self.file}: its embeddings have {len(mixture.centre)} numbers, unlike those of its model"
            )
        return OpenExperts(mixture, tuple(about.components), clip, experts.hash_of(mixture, about))


@dataclass(frozen=True)
class OpenExperts(Rule):
    """`Experts` with their file and text model. The embedding of a prompt is computed once, by itself, and kept: it
    depends on nothing else."""

    mixture: Any
    components: tuple[str, ...]
    clip: Any
    digest: str
    embeddings: dict[str, Float[Tensor, "D"]] = field(default_factory=dict)
    texts: Sequence[str] = ()
    type = "experts"

    def origin(self) -> dict[str, str]:
        return {"experts": self.digest}

    def for_prompts(self, prompts: Sequence[Prompt], seed: int, iteration: int | None) -> "OpenExperts":
        return replace(self, texts=[prompt.text for prompt in prompts])

    def __call__(self, values: Values, names: Sequence[str], group: Groups, weights: Weights, floor: float) -> Tensor:
        from reward_models.training import base as bases

        for text in {self.texts[row] for row in group.tolist()} - self.embeddings.keys():
            with torch.no_grad():
                self.embeddings[text] = bases.encode_texts(self.clip, [text])[0].float()
        embedding = torch.stack([self.embeddings[self.texts[row]] for row in group.tolist()])
        ordered = values[:, [[*names].index(name) for name in self.components]].float()
        present = combine.group_sum((~ordered.isnan()).float(), group) > 0
        return self.mixture.score(ordered, embedding, present)


COMBINATIONS = (Sum, Product, Gate, Mrn, Gdpo, Potential, Experts, Directed)


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
