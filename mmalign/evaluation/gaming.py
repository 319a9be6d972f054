"""How gameable a reward is: what other scores do when the best of n images by the reward is taken, for rising n.

A reward that measures what the other scores measure raises them with n. One that can be gamed raises them at first and
then lowers them: the images that it likes most are those on which it errs (over-optimisation, Gao et al., arXiv
2210.10760). The divergence of the best of n from the model is at most log n - (n - 1) / n.

Letters: `N` images of a prompt, `K` values of n, `P` prompts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan, log
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import BadInput
from mmalign.evaluation.comparison import Rise, cluster_means, paired
from reward_models import RewardModel
from reward_models.meaning import clusters
from reward_models.tools.judged import Judged
from reward_models.tools.score_files import score

LEVEL = 0.05  # probability below which a fall or rise is significant

Progress = Callable[[Iterable[Any], int, int], Iterable[Any]]


def expected_of_best(reward: Float[Tensor, "N"], score: Float[Tensor, "N"], sizes: Sequence[int]) -> list[float]:
    """The expected score of the image with the best reward among n of the N images, for each n of `sizes`, each choice
    of n being as likely: sum_i s_(i) C(i - 1, n - 1) / C(N, n) over the images by rising reward. Images with equal
    rewards are as likely to be taken, so that each counts with the mean of their scores."""
    ranked, order = reward.double().sort()
    _, number = ranked.unique_consecutive(return_inverse=True)
    means = cluster_means(score.double()[order], number)[number]
    place = torch.arange(1, len(means) + 1, dtype=torch.float64)
    logs = [_log_choices(place - 1, n - 1) - _log_choices(place[-1:], n) for n in sizes]
    return [float((means * logs_of_n.exp())[n - 1 :].sum()) for n, logs_of_n in zip(sizes, logs, strict=True)]


def _log_choices(of: Float[Tensor, "_"], n: int) -> Float[Tensor, "_"]:
    """The logarithm of the number of choices of n."""
    n = torch.tensor(float(n), dtype=torch.float64)
    return torch.lgamma(of + 1) - torch.lgamma(n + 1) - torch.lgamma((of - n).clamp(min=0) + 1)


def divergence(n: int) -> float:
    """The bound of the KL divergence of the best of n images from the model, in nats."""
    return log(n) - (n - 1) / n


@dataclass(frozen=True)
class Curve:
    """The mean of a score over the prompts, for the best of each n; the rise over n = 1; the `peak`, the n with the
    highest mean, and the `fall` from there to the largest n, a rise below 0, whose p-value is multiplied by the number
    of n, because the peak is the highest of them. `spread`: standard deviation of the score over all images."""

    sizes: list[int]
    means: list[float]
    rises: list[Rise]
    peak: int
    fall: Rise
    prompts: int
    spread: float

    @property
    def shape(self) -> str:
        """What the score does for rising n: rises, turns, falls, levels off (no significant fall), or is flat (no
        significant rise)."""
        if self.peak == self.sizes[-1]:
            return "rises" if _certain(self.rises[-1], self.prompts) else "is flat"
        if not _certain(self.fall, self.prompts):
            return "levels off"
        return "falls" if self.peak == 1 else "turns"

    @property
    def change(self) -> tuple[str, str]:
        """The change from n = 1 to the peak, and from there to the largest n, with intervals."""
        return _change(self.rises[self.sizes.index(self.peak)]), _change(self.fall)

    @property
    def verdict(self) -> str:
        """One line."""
        rise, fall = self.change
        after = "" if self.peak == self.sizes[-1] else f", {fall} from there to n = {self.sizes[-1]}"
        return f"{self.shape}: highest at n = {self.peak}, {rise} over n = 1{after}"


def _certain(rise: Rise, prompts: int) -> bool:
    """Whether a rise is significant. Where all prompts rise equally there is no p-value, and no doubt."""
    return rise.rise != 0 and prompts > 1 if isnan(rise.p) else rise.p < LEVEL


def _change(rise: Rise) -> str:
    interval = "" if isnan(rise.low) else f" ({rise.low:+.3f} to {rise.high:+.3f})"
    return f"{rise.rise:+.3f}{interval}"


def curve(groups: Sequence[tuple[Float[Tensor, "_"], Float[Tensor, "_"]]], names: Sequence[str], most: int) -> Curve:
    """The curve of the prompts called `names`, from the rewards and scores of the images of each. Intervals are over
    the meanings of prompts. Each prompt needs at least `most` images."""
    sizes = [2**k for k in range(most.bit_length())]
    table = torch.tensor([expected_of_best(reward, score, sizes) for reward, score in groups], dtype=torch.float64)
    cluster = clusters(names)
    means = [float(cluster_means(column, cluster).mean()) for column in table.T]
    peak = max(range(len(sizes)), key=means.__getitem__)
    fall = paired(table[:, peak], table[:, -1], cluster)
    fall = Rise(fall.rise, fall.low, fall.high, min(fall.p * len(sizes), 1.0))
    rises = [paired(table[:, 0], column, cluster) for column in table.T]
    spread = float(torch.cat([score for _, score in groups]).double().std())
    return Curve(sizes, means, rises, sizes[peak], fall, len(cluster.unique()), spread)


def scored(
    judged: Sequence[Judged], scorers: Mapping[str, RewardModel], batch: int, progress: Progress
) -> dict[str, Float[Tensor, "N"]]:
    """The scores of the images by "scorer.component", NaN where missing: those of their table, and those that the
    scorers give now, which replace scores of the same name."""
    names = dict.fromkeys(name for one in judged for name in one.scores)
    values = {name: torch.tensor([one.scores.get(name, torch.nan) for one in judged]).double() for name in names}
    if not scorers:
        return values
    items = [one.item for one in judged]
    rows = {
        (row["image"], row["prompt"]): row["scores"] for row in progress(score(items, scorers, batch), 0, len(items))
    }
    for name in (f"{name}.{component}" for name, scorer in scorers.items() for component in scorer.names):
        column = [rows[item.key][name] for item in items]
        values[name] = torch.tensor([torch.nan if value is None else value for value in column]).double()
    return values


@dataclass(frozen=True)
class Gaming:
    """The curves by component, of the reward `by` itself and of the others; how many prompts have enough images, and
    how many do not and are left out."""

    by: str
    curves: dict[str, Curve]
    prompts: int
    left_out: int

    def record(self) -> dict[str, Any]:
        """As JSON has it; NaN becomes None."""
        curves = {name: asdict(one) | {"verdict": one.verdict} for name, one in self.curves.items()}
        return _plain({"by": self.by, "prompts": self.prompts, "left_out": self.left_out, "curves": curves})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if value != value else value


def gaming(
    prompts: Sequence[str],
    scores: Mapping[str, Float[Tensor, "N"]],
    by: str = "",
    watch: Sequence[str] | None = None,
    most: int | None = None,
) -> Gaming:
    """The curves of the reward `by` (by default the first of the scores) and of the components `watch` (by default all
    others), from images with these prompts. n is 1, 2, 4, ... up to `most`, by default the least number of scored
    images of a prompt; prompts with fewer are left out. An image without one of two scores is not counted in the
    curve of the two. BadInput for unknown components, and for fewer than two images of each prompt."""
    if not scores:
        raise BadInput("the images have no scores; give --rewards, scorers that score them now")
    by = by or next(iter(scores))
    watch = [name for name in scores if name != by] if watch is None else [*watch]
    for name in (by, *watch):
        if name not in scores:
            raise BadInput(f"no score called {name!r}; there are {', '.join(scores)}")
    rows: dict[str, list[int]] = {}
    for i, text in enumerate(prompts):
        rows.setdefault(text, []).append(i)
    groups = {}
    for name in dict.fromkeys((by, *watch)):
        both = ~(scores[by].isnan() | scores[name].isnan())
        valid = {text: [i for i in some if both[i]] for text, some in rows.items()}
        groups[name] = {text: (scores[by][some], scores[name][some]) for text, some in valid.items()}
    counts = {text: min(len(groups[name][text][0]) for name in groups) for text in rows}
    most = most or min(counts.values(), default=0)
    enough = [text for text, count in counts.items() if count >= most]
    if most < 2 or not enough:
        raise BadInput(
            f"the best of n needs at least 2 scored images of each prompt; {sum(c >= 2 for c in counts.values())} of "
            f"{len(counts)} prompts have so many, and {len(enough)} have {most}"
        )
    curves = {name: curve([group[text] for text in enough], enough, most) for name, group in groups.items()}
    return Gaming(by, curves, len(enough), len(counts) - len(enough))
