"""How much scores rose: the mean over meanings, with its 95 % interval and p-value.

Images of one prompt, and prompts of one meaning, are not independent: their rises are averaged, and each meaning counts
once. The interval is of the mean over all such meanings, and includes the noise of the few images made for each.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan, nan

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_models.combine import ROUNDING

LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Rise:
    """A mean rise, the interval from `low` to `high` that covers it at 95 %, and the two-sided p-value of no rise. The
    last three are NaN where the spread is unknown."""

    rise: float
    low: float = nan
    high: float = nan
    p: float = nan


def cluster_means(values: Float[Tensor, "N"], cluster: Int[Tensor, "N"]) -> Float[Tensor, "M"]:
    """The mean of each cluster in float64, in the order of their numbers; NaN where one of its values is."""
    _, number = cluster.unique(return_inverse=True)
    count = torch.bincount(number)
    return torch.zeros(len(count), dtype=torch.float64).index_add(0, number, values.double()) / count


def rises(
    before: Mapping[str, Float[Tensor, "N"]],
    after: Mapping[str, Float[Tensor, "N"]],
    cluster: Int[Tensor, "N"],
    rounding: float = 0.0,
) -> dict[str, dict[str, float]]:
    """For each score `before`, `after`, `rise`, `low`, `high` and `p` of `paired`. `before` and `after` are, like the
    rise, means over clusters, of the images that have the score on both sides."""
    rows = {}
    for name in before:
        valid = ~(before[name].isnan() | after[name].isnan())
        means = (float(cluster_means(side[name][valid], cluster[valid]).mean()) for side in (before, after))
        rise = paired(before[name], after[name], cluster, rounding)
        rows[name] = dict(zip(("before", "after"), means, strict=True)) | asdict(rise)
    return rows


def cells(row: Mapping[str, float]) -> tuple[str, ...]:
    """One of the `rises` as texts for a table: before, after, rise, interval, p."""
    interval = "nan" if isnan(row["low"]) else f"{row['low']:+.3f} to {row['high']:+.3f}"
    return f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['rise']:+.3f}", interval, f"{row['p']:.2g}"


def paired(
    before: Float[Tensor, "N"], after: Float[Tensor, "N"], cluster: Int[Tensor, "N"], rounding: float = 0.0
) -> Rise:
    """The rise of the images' scores, over clusters (`reward_models.meaning.clusters`), by a paired t-test.

    The mean is that of the clusters' mean rises, to which interval and p-value refer. These are NaN with fewer than two
    clusters, and where all clusters rise equally up to rounding: by `rounding`, the largest error of a score, or by
    that of float32. Images without a score on either side are left out.
    """
    valid = ~(before.isnan() | after.isnan())
    before, after = before[valid].double(), after[valid].double()
    rises = cluster_means(after - before, cluster[valid])
    mean, count = float(rises.mean()), len(rises)
    if count < 2:
        return Rise(mean)
    floor = max(2 * rounding, ROUNDING * float(torch.cat([before, after]).abs().max()))
    spread = float(rises.std())
    return _rise(mean, spread / count**0.5, count - 1) if spread > floor else Rise(mean)


def over_runs(rises: Float[Tensor, "R M"]) -> Rise:
    """The mean rise over `R` training runs (seeds) that are evaluated on the same `M` meanings; `rises[r, m]` is the
    mean rise of the images of meaning m in run r. Meanings without a rise in some run are left out.

    The interval is of another run and other meanings: it includes the spread between runs and the evaluation's error.
    With r = mean + run + meaning + rest, the variance of the mean is var(row means) / R + var(column means) / M -
    var(rest) / RM, because both of the first two include the last; it is at least the larger of the two. Degrees of
    freedom: Satterthwaite's, at least the smaller of R - 1 and M - 1. NaN as in `paired`, and with fewer than two runs.
    """
    rises = rises[:, ~rises.isnan().any(0)].double()
    (runs, meanings), mean = rises.shape, float(rises.mean())
    if min(runs, meanings) < 2:
        return Rise(mean)
    rows, columns = rises.mean(1), rises.mean(0)
    rest = (rises - rows[:, None] - columns + mean).square().sum() / ((runs - 1) * (meanings - 1))
    of_runs, of_meanings = float(rows.var()) / runs, float(columns.var()) / meanings
    variance = max(of_runs + of_meanings - float(rest) / (runs * meanings), of_runs, of_meanings)
    if variance**0.5 <= ROUNDING * float(rises.abs().max()):
        return Rise(mean)
    freedom = variance**2 / (of_runs**2 / (runs - 1) + of_meanings**2 / (meanings - 1))
    return _rise(mean, variance**0.5, max(freedom, min(runs, meanings) - 1))


def _rise(mean: float, error: float, freedom: int | float) -> Rise:
    """By the t distribution, from the standard error of the mean."""
    from scipy import stats  # half a second of imports

    reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Rise(mean, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, freedom)))
