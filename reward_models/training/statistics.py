"""Figures of a reward model on pairs: accuracy with its interval, comparison of two models, calibration.

Letters: `N` pairs. Pairs of one prompt are not independent, so intervals are clustered by prompt.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

LEVEL = 0.95
BINS = 10  # of the calibration curve

Column = Float[np.ndarray, "N"]


@dataclass(frozen=True)
class Share:
    """A mean of values in [0, 1] over `pairs` of `prompts`, None without any, and the interval that covers it at 95 %,
    None with fewer than two prompts."""

    mean: float | None
    low: float | None
    high: float | None
    pairs: int
    prompts: int


def share(values: Column, cluster: Int[np.ndarray, "N"]) -> Share:
    """The mean of `values` and Wilson's interval for the number of independent pairs that would have the same standard
    error. The standard error is that of a ratio with clusters; with t instead of the normal quantile."""
    from scipy import stats

    count, (names, number) = len(values), np.unique(cluster, return_inverse=True)
    if not count:
        return Share(None, None, None, 0, 0)
    mean = float(values.mean())
    if len(names) < 2:
        return Share(mean, None, None, count, len(names))
    sums = np.bincount(number, values - mean)
    variance = float((sums**2).sum()) * len(names) / (len(names) - 1) / count**2
    known = variance > 1e-12 and 0 < mean < 1  # where all agree, a prompt is what is independent
    effective = min(count, mean * (1 - mean) / variance) if known else len(names)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(names) - 1)) ** 2 / effective
    middle = (mean + quantile / 2) / (1 + quantile)
    reach = math.sqrt(max(0.0, quantile * (mean * (1 - mean) + quantile / 4))) / (1 + quantile)
    return Share(mean, max(0.0, middle - reach), min(1.0, middle + reach), count, len(names))


def agreement(difference: Column, preference: Column) -> Column:
    """For each pair 1 if the scores prefer the image that the judges prefer, 0 if they prefer the other, 0.5 for a tie
    on either side, NaN without a score."""
    return 0.5 + 0.5 * np.sign(difference) * np.sign(preference - 0.5)


def accuracies(difference: Column, preference: Column, cluster: Int[np.ndarray, "N"]) -> dict[str, Any]:
    """The pair accuracy in both conventions: `accuracy` leaves out pairs with a tie on either side, `with_ties` counts
    them half. `missing`: pairs without a score, which neither counts."""
    scored = ~np.isnan(difference)
    values = agreement(difference, preference)[scored]
    decided = values != 0.5
    return {
        "accuracy": asdict(share(values[decided], cluster[scored][decided])),
        "with_ties": asdict(share(values, cluster[scored])),
        "missing": int((~scored).sum()),
    }


def same_verdicts(one: Column, other: Column, cluster: Int[np.ndarray, "N"]) -> dict[str, Any]:
    """The `share` of pairs for which two differences of scores prefer the same image, or neither; pairs without a score
    in one of them are left out."""
    scored = ~(np.isnan(one) | np.isnan(other))
    same = np.sign(one[scored]) == np.sign(other[scored])
    return asdict(share(same.astype(float), cluster[scored]))


def thirds(values: Column) -> dict[str, Bool[np.ndarray, "N"]]:
    """The `low`, `middle` and `high` third of the values; NaN in none, and equal values together."""
    bounds = np.nanquantile(values, [1 / 3, 2 / 3]) if (~np.isnan(values)).any() else [0, 0]
    return {
        "low": values <= bounds[0],
        "middle": (values > bounds[0]) & (values <= bounds[1]),
        "high": values > bounds[1],
    }


def mcnemar(one: Column, other: Column) -> dict[str, Any]:
    """McNemar's exact test of two models on the same pairs: `only_one` and `only_other`, the pairs that one of them
    alone gets right, and `p`, the two-sided probability of so uneven a split of equally good models. Pairs that are a
    tie (0.5) or have no score (NaN) in either are left out."""
    from scipy import stats

    both = np.isin(one, (0.0, 1.0)) & np.isin(other, (0.0, 1.0))
    first = int(((one == 1) & (other == 0) & both).sum())
    second = int(((one == 0) & (other == 1) & both).sum())
    p = float(stats.binomtest(first, first + second, 0.5).pvalue) if first + second else 1.0
    return {"pairs": int(both.sum()), "only_one": first, "only_other": second, "p": p}


def calibration(probability: Column, preference: Column) -> dict[str, Any]:
    """How far probabilities that a is preferred can be believed. Ties and missing values are left out.

    `brier`: mean squared error. `ece`: expected calibration error, the mean distance of probability and frequency over
    `curve`, ten bins of the probability of the preferred side (from 0.5). `temperature`: the number that log-odds
    should be divided by for the least loss, 1 for calibrated ones, above 1 for overconfident ones.
    """
    valid = ~np.isnan(probability) & (preference != 0.5)
    chosen, truth = probability[valid].clip(1e-7, 1 - 1e-7), (preference[valid] > 0.5).astype(float)
    if not len(truth):
        return {"pairs": 0}
    brier, ece = errors(chosen, truth)
    return {
        "pairs": len(truth),
        "brier": brier,
        "ece": ece,
        "temperature": temperature(np.log(chosen / (1 - chosen)), truth),
        "curve": _curve(chosen, truth),
    }


def errors(chosen: Column, truth: Column) -> tuple[float, float]:
    """The Brier score and the expected calibration error of probabilities that a is preferred; `truth` is 1 where it
    is, and 0 where b is."""
    return errors_of(sums(chosen, truth, np.zeros(len(truth), int))[0])


def sums(chosen: Column, truth: Column, number: Int[np.ndarray, "N"]) -> Float[np.ndarray, "C S"]:
    """What `errors_of` reads, for each of the C prompts that `number` has: pairs, probabilities of the preferred side
    and right ones in each bin, then the squared errors. Those of several prompts may be added."""
    sure, right = np.maximum(chosen, 1 - chosen), np.where(chosen >= 0.5, truth, 1 - truth)
    place = number * BINS + np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    count = int(number.max()) + 1
    in_bins = [np.bincount(place, w, count * BINS).reshape(count, BINS) for w in (np.ones(len(sure)), sure, right)]
    return np.concatenate([*in_bins, np.bincount(number, (chosen - truth) ** 2, count)[:, None]], 1)


def errors_of(row: Float[np.ndarray, "S"]) -> tuple[float, float]:
    """The Brier score and the expected calibration error of the pairs in a row of `sums`."""
    count, sure, right = row[:-1].reshape(3, BINS)
    return float(row[-1] / count.sum()), float(np.abs(sure - right).sum() / count.sum())


def _curve(chosen: Column, truth: Column) -> list[dict[str, Any]]:
    count, sure, right = sums(chosen, truth, np.zeros(len(truth), int))[0, :-1].reshape(3, BINS)
    return [
        {"probability": float(sure[k] / count[k]), "frequency": float(right[k] / count[k]), "pairs": int(count[k])}
        for k in range(BINS)
        if count[k]
    ]


def temperature(log_odds: Column, truth: Column) -> float:
    """The T > 0 with the least loss of sigmoid(log_odds / T), within 1/100 and 100."""
    from scipy import optimize

    def loss(log_temperature: float) -> float:
        odds = log_odds / math.exp(log_temperature)
        return float(np.mean(np.logaddexp(0, odds) - truth * odds))

    bound = math.log(100)
    return math.exp(optimize.minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x)


def subsets(labels: list[str]) -> dict[str, Bool[np.ndarray, "N"]]:
    """The pairs of each label that is not empty, in the order of first appearance."""
    return {label: np.array([other == label for other in labels]) for label in dict.fromkeys(labels) if label}
