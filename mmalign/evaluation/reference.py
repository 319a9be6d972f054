"""A frozen reference: mean and standard deviation of each reward on images of the base model, measured once.

It belongs to the weights of the model and to the versions of the scorers it was measured with, and is refused with
others: a drift of either would look like progress.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from mmalign.config.paths import locate
from mmalign.config.schema import Config, component
from mmalign.errors import BadInput
from mmalign.evaluation.evaluate import Evaluation
from reward_models import RewardModel, files

ENOUGH = 500  # images; the standard deviation is then known to about 3 %
LEAST, FARTHEST = 1e-12, 1e12  # of a standard deviation, and of a mean's size: float32 computes with them


def save(path: Path, model: str, result: Evaluation, scorers: Mapping[str, RewardModel]) -> None:
    """Write the reference of an evaluation of the model whose weights have the fingerprint `model`. BadInput where a
    component has fewer than two scores."""
    components = {}
    for name, values in result.parts.items():
        valid = values[~values.isnan()]
        if len(valid) < 2:
            raise BadInput(f"--reference: {name} has {len(valid)} scores, at least 2 are needed")
        components[name] = {"mean": float(valid.mean()), "std": float(valid.std()), "images": len(valid)}
    versions = {name: scorer.card.version for name, scorer in scorers.items()}
    record = {"model": model, "scorers": versions, "components": components}
    files.write(path, json.dumps(record, indent=1) + "\n")


def ours(text: str) -> bool:
    """Whether a text is one that `save` wrote."""
    return files.is_record(text, "model", "scorers", "components")


def load(c: Config, model: str, scorers: Mapping[str, RewardModel]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation by component. BadInput where the reference is of other weights or scorers, or a
    component of the rewards does not vary in it."""
    try:
        record = files.parsed(files.text(locate(c.reference)))
        known = {name: (own["mean"], own["std"]) for name, own in record["components"].items()}
        belongs = {"model": record["model"], **record["scorers"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"reference: {c.reference} is no file written by `mmalign evaluate --reference`") from None
    names = [*c.rewards, *c.at_least]
    needed = {"model": model} | {n: scorers[n].card.version for n in {component(name)[0] for name in names}}
    for what, version in needed.items():
        if belongs.get(what) != version:
            raise BadInput(
                f"reference: {c.reference} was measured with {what} {belongs.get(what)}, this run has {version}; "
                "measure it again"
            )
    for name in names:
        if name not in known:
            raise BadInput(f"reference: {c.reference} says nothing of {name}; it has {', '.join(known) or 'nothing'}")
        mean, std = known[name]
        if not (type(mean) is type(std) is float and abs(mean) <= FARTHEST and LEAST <= std <= FARTHEST):
            raise BadInput(
                f"reference: {name} does not vary in {c.reference}, or not as numbers do; mean {mean!r:.40} and std "
                f"{std!r:.40} cannot be a unit"
            )
    return known
