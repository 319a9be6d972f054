"""How well scorers agree with preferences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.prompt import Prompt
from reward_models.scoring import score_pictures
from reward_models.training import data
from reward_models.training.data import Progress, silent
from reward_models.training.statistics import (
    accuracies,
    agreement,
    calibration,
    mcnemar,
    same_verdicts,
    subsets,
    thirds,
)
from reward_models.types import RewardModel

Request = tuple[Stored, Prompt]


def evaluate(
    pairs: Sequence[Pair],
    scorers: Mapping[str, RewardModel],
    batch: int = 64,
    progress: Progress = silent,
    swap: bool = False,
) -> dict[str, Any]:
    """The agreement of each component ("scorer.component") of the scorers with the pairs.

    `rewards`: by component, the figures of `statistics.accuracies`; the same `by_tag` of the prompt's ground truth and
    `by_aspect`, and for an ensemble `by_spread`, thirds of the pairs by the spread of both images; `calibration`
    for a scorer that gives probabilities; `failures`, reasons and how many images have them. With `swap` groupwise
    scorers compare each pair a second time with the images exchanged; `swapped` is the share of equal verdicts.
    `compared`: by two components "one ~ other", `statistics.mcnemar`. `pairs`, `prompts`, `ties`: how many there are.
    A picture that cannot be read has no scores. ValueError for pairs without a prompt.
    """
    data.check(pairs)
    values, failures = scores(pairs, scorers, batch, progress)
    groupwise = {name: scorer for name, scorer in scorers.items() if swap and scorer.card.groupwise}
    exchanged = [replace(pair, a=pair.b, b=pair.a) for pair in pairs]
    other_order = scores(exchanged, groupwise, batch, progress)[0] if groupwise else {}
    preference = data.preferences(pairs).numpy().astype(float)
    cluster = data.cluster(pairs)
    labels = {
        "by_tag": subsets([str(pair.prompt.wants.get("tag", "")) for pair in pairs]),
        "by_aspect": subsets([pair.aspect for pair in pairs]),
    }
    rows, agreements = {}, {}
    for name, scorer in scorers.items():
        for k, component in enumerate(scorer.names):
            difference = (values[name][0][:, k] - values[name][1][:, k]).double().numpy()
            row = accuracies(difference, preference, cluster)
            for label, parts in labels.items():
                row[label] = {
                    one: accuracies(difference[rows_], preference[rows_], cluster[rows_])
                    for one, rows_ in parts.items()
                }
            if k == 0 and "spread" in scorer.names:
                column = scorer.names.index("spread")
                third = thirds(torch.hypot(*(side[:, column] for side in values[name])).numpy())
                row["by_spread"] = {
                    one: accuracies(difference[rows_], preference[rows_], cluster[rows_])
                    for one, rows_ in third.items()
                }
            if name in other_order:
                b, a = (side[:, k].double().numpy() for side in other_order[name])
                row["swapped"] = same_verdicts(difference, a - b, cluster)
            row["failures"] = failures[name]
            preferred = getattr(getattr(scorer, "scorer", scorer), "preferred", None)  # `Cached` wraps another
            if preferred is not None and k == 0:
                probability = preferred(*values[name]).double().numpy()
                row["calibration"] = calibration(probability, preference)
            rows[f"{name}.{component}"] = row
            agreements[f"{name}.{component}"] = agreement(difference, preference)
    return {
        "pairs": len(pairs),
        "prompts": len(np.unique(cluster)),
        "ties": int((preference == 0.5).sum()),
        "rewards": rows,
        "compared": {f"{a} ~ {b}": mcnemar(agreements[a], agreements[b]) for a, b in combinations(agreements, 2)},
    }


def scores(
    pairs: Sequence[Pair], scorers: Mapping[str, RewardModel], batch: int, progress: Progress
) -> tuple[dict[str, tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]], dict[str, dict[str, int]]]:
    """By scorer, the scores of the images a and b of each pair, NaN where missing; and how many images have which
    reason. An image is scored once for each prompt; but a groupwise scorer compares the two images of each pair."""
    groupwise = any(scorer.card.groupwise for scorer in scorers.values())
    number: dict[Any, int] = {}
    requested: list[Request] = []

    def row_of(picture: Stored, prompt: Prompt, pair: int) -> int:
        key = (picture, prompt.text, pair if groupwise else prompt.id)
        if key not in number:
            number[key] = len(requested)
            requested.append((picture, replace(prompt, id=pair) if groupwise else prompt))
        return number[key]

    sides = torch.tensor([[row_of(p.a, p.prompt, i), row_of(p.b, p.prompt, i)] for i, p in enumerate(pairs)])
    values: dict[str, list[list[float]]] = {name: [] for name in scorers}
    failures: dict[str, dict[str, int]] = {name: {} for name in scorers}
    batches = [*_batches(requested, batch, groupwise)]
    for some in progress(batches, 0, len(batches), "scoring", "batches"):
        rows = score_pictures([_picture(picture) for picture, _ in some], [prompt for _, prompt in some], scorers)
        for row in rows:
            for name, scorer in scorers.items():
                of_row = [row["scores"][f"{name}.{component}"] for component in scorer.names]
                values[name].append([float("nan") if value is None else value for value in of_row])
                if reason := row["failures"].get(name) or row["failures"].get("image"):
                    failures[name][reason] = failures[name].get(reason, 0) + 1
    of_side = {name: torch.tensor(rows).view(len(requested), -1)[sides] for name, rows in values.items()}
    return {name: (both[:, 0], both[:, 1]) for name, both in of_side.items()}, failures


def _batches(requested: Sequence[Request], batch: int, groupwise: bool) -> Iterator[list[Request]]:
    """At most `batch` images, at least one; with `groupwise`, those of a pair stay together."""
    some: list[Request] = []
    for one in requested:
        if len(some) >= batch and not (groupwise and some[-1][1].id == one[1].id):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _picture(picture: Stored) -> Any:
    try:
        return picture.read()
    except ValueError as error:
        return str(error)
