"""Reward statistics of the base model: mean and standard deviation of each reward on its images, measured once.

They belong to the weights of the model and to the versions of the scorers they were measured with, and are refused with
others: a drift of either would look like progress.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mmalign.config.checks import component
from mmalign.config.paths import locate
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.evaluation.evaluate import Evaluation
from reward_models import RewardModel, files

ENOUGH = 500  # images; the standard deviation is then known to about 3 %
LEAST, FARTHEST = 1e-12, 1e12  # of a standard deviation, and of a mean's size: float32 computes with them


class ComponentStats(BaseModel):
    """Mean and standard deviation of a component's scores of so many images."""

    model_config = ConfigDict(strict=True, frozen=True)

    mean: float
    std: float
    images: int


class RewardStats(BaseModel):
    """`components` by "scorer.component"; `model` is the fingerprint of the weights that generated the images,
    `scorers` the version of each scorer."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: str
    scorers: dict[str, str]
    components: dict[str, ComponentStats]

    @classmethod
    def measure(cls, result: Evaluation, model: str, scorers: Mapping[str, RewardModel]) -> "RewardStats":
        """The statistics of an evaluation. BadInput where a component has fewer than two scores."""
        components = {}
        for name, values in result.parts.items():
            valid = values[~values.isnan()]
            if len(valid) < 2:
                raise BadInput(f"--reference: {name} has {len(valid)} scores, at least 2 are needed")
            components[name] = ComponentStats(mean=float(valid.mean()), std=float(valid.std()), images=len(valid))
        versions = {name: scorer.card.version for name, scorer in scorers.items()}
        return cls(model=model, scorers=versions, components=components)

    def save(self, path: Path) -> None:
        files.write(path, json.dumps(self.model_dump(), indent=1) + "\n")


def ours(text: str) -> bool:
    """Whether `RewardStats.save` wrote a text."""
    return files.is_record(text, "model", "scorers", "components")


def load(c: Config, model: str, scorers: Mapping[str, RewardModel]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation by component, from the file that the config names. BadInput where they are of other
    weights or scorers, or where they lack a component of the rewards or it does not vary."""
    try:
        stats = RewardStats.model_validate(files.parsed(files.text(locate(c.reference))))
    except (OSError, ValueError):
        raise BadInput(f"reference: {c.reference} is not a file written by `mmalign evaluate --reference`") from None
    units = {name: (each.mean, each.std) for name, each in stats.components.items()}
    measured_with = {"model": stats.model, **stats.scorers}
    names = [*c.rewards, *c.at_least]
    needed = {"model": model} | {n: scorers[n].card.version for n in {component(name)[0] for name in names}}
    for name, version in needed.items():
        if measured_with.get(name) != version:
            raise BadInput(
                f"reference: {c.reference} was measured with {name} {measured_with.get(name)}, this run has {version}; "
                "measure it again"
            )
    for name in names:
        if name not in units:
            raise BadInput(f"reference: {c.reference} lacks {name}; it has {', '.join(units) or 'nothing'}")
        mean, std = units[name]
        if not (abs(mean) <= FARTHEST and LEAST <= std <= FARTHEST):
            raise BadInput(
                f"reference: {name} does not vary in {c.reference}, or is not a usable number; mean {mean!r:.40} and "
                f"std {std!r:.40} cannot be a unit"
            )
    return units
