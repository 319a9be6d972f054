"""Calibrate a fitted reward model on pairs that it was not trained on, and measure what that changes.

Letters: `N` pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from reward_models import files, limits
from reward_models.meaning import meaning
from reward_models.pairs import Pair
from reward_models.scoring import score_pictures
from reward_models.tools.picture_files import Item, picture
from reward_models.training import data, folder as folders
from reward_models.training.calibration import FILE, Calibration, Reference
from reward_models.training.data import Progress, silent
from reward_models.training.evaluation import scores
from reward_models.training.statistics import LEVEL, errors, errors_of, sums, temperature

LEAST = 4  # images of a prompt; with fewer they do not say what is typical
POOLED = 1000  # images that stand for all of them, for prompts without images
FOLDS = 5  # of the prompts: figures are of prompts that the maps were not fitted to
DRAWS = 1000  # of the bootstrap

Column = Float[np.ndarray, "N"]


@dataclass(frozen=True)
class Maps:
    """What is fitted to pairs: the temperature, and the knots of the monotone map."""

    temperature: float
    log_odds: Column
    probability: Column


def fit_maps(log_odds: Column, truth: Column) -> Maps:
    """The maps for pairs of which a is preferred (1) or b (0). The monotone map is that of isotonic regression on the
    pairs and the same pairs with their sides exchanged, so that it is antisymmetric; its knots are the means of the
    regression's blocks, and its values stay half a pair away from 0 and 1."""
    from scipy import optimize

    both, right = np.concatenate([log_odds, -log_odds]), np.concatenate([truth, 1 - truth])
    places, number, count = np.unique(both, return_inverse=True, return_counts=True)
    fit = optimize.isotonic_regression(np.bincount(number, right) / count, weights=count)
    starts = fit.blocks[:-1]
    values = fit.x[starts].clip(0.5 / (len(truth) + 1), 1 - 0.5 / (len(truth) + 1))
    middles = np.add.reduceat(places * count, starts) / np.add.reduceat(count, starts)
    return Maps(temperature(log_odds, truth), middles, values)


def cross_fitted(log_odds: Column, truth: Column, cluster: Int[np.ndarray, "N"]) -> dict[str, Column]:
    """The probability that a is preferred: `raw`, and by maps fitted to the pairs of other prompts, by `temperature`
    and by the monotone map, `isotonic`."""
    names, number = np.unique(cluster, return_inverse=True)
    fold = np.random.default_rng(0).permutation(len(names))[number] % min(FOLDS, len(names))
    of_method = {name: np.zeros(len(truth)) for name in ("raw", "temperature", "isotonic")}
    of_method["raw"] = _sigmoid(log_odds)
    for k in np.unique(fold):
        here = fold == k
        maps = fit_maps(log_odds[~here], truth[~here])
        of_method["temperature"][here] = _sigmoid(log_odds[here] / maps.temperature)
        of_method["isotonic"][here] = _calibration(maps).probabilities(log_odds[here])
    return of_method


def _sigmoid(log_odds: Column) -> Column:
    return np.exp(-np.logaddexp(0, -log_odds))


def _calibration(maps: Maps, **rest: Any) -> Calibration:
    empty = {"weights": "", "reference": None, "pairs": 0, "prompts": 0, "left_out": 0, "data": "", "figures": {}}
    knots = {"log_odds": maps.log_odds.tolist(), "probability": maps.probability.tolist()}
    return Calibration(temperature=maps.temperature, **knots, **empty | rest)


def figures(
    probability: Mapping[str, Column], truth: Column, cluster: Int[np.ndarray, "N"]
) -> dict[str, dict[str, list[float]]]:
    """By method and by `brier` and `ece` (`statistics.errors`): the value, and the ends of its 95 % interval, by a
    bootstrap of the prompts, centred on the value. `change in ...` is the same for the value less that of the raw
    probabilities."""
    names, number = np.unique(cluster, return_inverse=True)
    of_prompt = {name: sums(one, truth, number) for name, one in probability.items()}
    generator, count = np.random.default_rng(0), len(names)
    values: dict[str, Any] = {name: [errors(one, truth)] for name, one in probability.items()}
    for _ in range(DRAWS):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        for name, rows in of_prompt.items():
            values[name].append(errors_of(times @ rows))
    values = {name: np.array(rows) for name, rows in values.items()}
    table = {}
    for name, column in values.items():
        table[name] = {key: _interval(column[:, k]).clip(0).tolist() for k, key in enumerate(("brier", "ece"))}
        if name != "raw":
            change = column - values["raw"]
            table[name] |= {
                f"change in {key}": _interval(change[:, k]).tolist() for k, key in enumerate(("brier", "ece"))
            }
    return table


def _interval(values: Column) -> Float[np.ndarray, "3"]:
    """The first value, and the quantiles of the others, moved by how far their mean is from it: a bootstrap overstates
    the calibration error, which is a mean of absolute values."""
    ends = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) + values[0] - values[1:].mean()
    return np.array([values[0], *ends])


def calibrate(
    folder: str | Path,
    pairs: Sequence[Pair],
    base_images: Sequence[Item] = (),
    *,
    base: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Calibration:
    """Calibrate the fitted model in a folder, and write `calibration.json` there. The scorer `fitted` then gives
    calibrated probabilities and, with `base_images`, the component `better`.

    `pairs`: those of prompts that the model was trained on are left out, and so are ties. `base_images`: pictures of
    the base model with their prompts. `base` is that of the scorer. ValueError where fewer than two prompts are left,
    or an image cannot be scored.
    """
    from reward_models.scorers.fitted import Fitted

    folder = Path(folder)
    data.check(pairs)
    scorer = Fitted(str(folder), base, device)
    if base_images and "better" in scorer.components:
        raise ValueError(
            f"{folder}: an aspect of the model is called better, which is the name of the calibrated score"
        )
    trained = folders.trained_prompts(folder)
    new = [pair for pair in pairs if folders.digest_of(pair.prompt.text) not in trained and pair.preference != 0.5]
    values, failures = scores(new, {"fitted": scorer}, scorer.batch, progress) if new else ({}, {})
    if new and failures["fitted"]:
        raise ValueError(f"{folder}: an image of the pairs has no score: {next(iter(failures['fitted']))}")
    cluster = data.cluster(new)
    if len(np.unique(cluster)) < 2:
        raise ValueError(
            f"{len(pairs)} pairs: {len(np.unique(cluster))} prompts are left without ties and prompts that the model "
            "was trained on; at least 2 are needed"
        )
    odds = scorer.loss.log_odds(*(scorer.outputs(side) for side in values["fitted"])).double().numpy()
    truth = (data.preferences(new).numpy() > 0.5).astype(float)
    calibration = _calibration(
        fit_maps(odds, truth),
        weights=scorer.weights,
        reference=_reference(scorer, base_images, progress) if base_images else None,
        pairs=len(new),
        prompts=len(np.unique(cluster)),
        left_out=len(pairs) - len(new),
        data=data.digest(new),
        figures=figures(cross_fitted(odds, truth, cluster), truth, cluster),
    )
    text = calibration.model_dump_json(indent=1) + "\n"
    if len(text) > limits.CONFIG:
        raise ValueError(f"{FILE} would have {len(text)} bytes, more than {limits.CONFIG}; give fewer images")
    files.replace(folder / FILE, text.encode())
    return calibration


def _reference(scorer: Any, images: Sequence[Item], progress: Progress) -> Reference:
    """The outputs for the base model's images. Prompts with fewer than `LEAST` images are among all of them only."""
    rows: list[list[float]] = []
    starts = range(0, len(images), scorer.batch)
    for start in progress(starts, 0, len(starts), "scoring images of the base model", "batches"):
        some = images[start : start + scorer.batch]
        prompts = [item.prompt for item in some]
        for item, row in zip(some, score_pictures([*map(_read, some)], prompts, {"fitted": scorer}), strict=True):
            if row["failures"]:
                raise ValueError(f"{item.name} has no score: {next(iter(row['failures'].values()))}")
            values = torch.tensor([[row["scores"][f"fitted.{name}"] for name in scorer.names]])
            rows += scorer.outputs(values).tolist()
    by_prompt: dict[str, list[list[float]]] = {}
    for row, item in zip(rows, images, strict=True):
        by_prompt.setdefault(meaning(item.prompt.text), []).append(row)
    every = sorted(rows)
    chosen = np.linspace(0, len(every) - 1, min(POOLED, len(every))).round().astype(int)
    enough = {name: sorted(some) for name, some in by_prompt.items() if len(some) >= LEAST}
    return Reference(by_prompt=enough, overall=[every[i] for i in chosen])


def _read(item: Item) -> Any:
    try:
        return picture(item)
    except ValueError as error:
        return str(error)
