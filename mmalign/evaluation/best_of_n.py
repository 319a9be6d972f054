"""The best of N images of a prompt, all of them drawn to the end or the hopeless ones given up early.

Early pruning looks at one-step predictions: each walk takes a few steps, jumps to the clean latent its velocity points
at, and the images that look worst there are not walked on. It costs `N (after + 1) + kept (steps - after)` forwards a
prompt instead of `N steps`, and N + kept judgements instead of N.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.evaluation.generate import starts, walked
from mmalign.rewards.judge import score
from reward_models import Prompt, RewardModel


def expected_best(scores: Float[Tensor, "N"]) -> list[float]:
    """The expected best of k of the N scores, k = 1..N, each choice of k being as likely; exact:
    `sum_i s_(i) C(i - 1, k - 1) / C(N, k)` over the scores in rising order. Scores that are NaN are left out."""
    ranked = scores[~scores.isnan()].double().sort().values.tolist()
    n = len(ranked)
    return [sum(s * comb(i, k - 1) for i, s in enumerate(ranked)) / comb(n, k) for k in range(1, n + 1)]


def curve(scores: Float[Tensor, "P N"]) -> list[float]:
    """`expected_best`, the mean over prompts; as far as every prompt that has a score at all goes."""
    each = [own for own in map(expected_best, scores) if own]
    return [sum(column) / len(each) for column in zip(*each, strict=False)]


@dataclass(frozen=True)
class Best:
    """`images` of each prompt's best, which of its seeds that was (`member`), its score, NaN if none of them has one;
    all `scores`, NaN where an image was given up or could not be scored, and why by row; what it took."""

    images: Float[Tensor, "P 3 H W"]
    member: Int[Tensor, "P"]
    score: Float[Tensor, "P"]
    scores: Float[Tensor, "P N"]
    failures: dict[int, str]
    forwards: int
    judgements: int


def best_of(
    policy,
    prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
    steps: int,
    scorer: RewardModel,
    component: str,
    batch: int = 64,
    kept: int | None = None,
    after: int | None = None,
) -> Best:
    """The best of each prompt's N seeds by a component of the scorer. With `kept`, only so many go on after step
    `after`. A seed gives the image it gives without the others."""
    count, before = len(seeds[0]), policy.counts["forwards"]
    x, owner = starts(policy, seeds)
    times, judgements = policy.times(steps), 0
    alive = torch.arange(len(x)).view(-1, count)
    if kept is not None and kept < count:
        peek = torch.cat([times[: after + 1], torch.zeros(1)])
        seen = [(paths.ends, paths.x[:, after]) for paths in walked(policy, prompts, x, owner, peek, batch)]
        ends, x = (torch.cat(own) for own in zip(*seen, strict=True))
        _, guess, _ = _scored(policy, ends, owner, prompts, scorer, component, batch)
        judgements += len(x)
        alive = alive.gather(1, _ranked(guess.view(-1, count))[:, :kept].sort(1).values)
        x, times = x[alive.flatten()], times[after:]
    going = alive.flatten()
    ends = torch.cat([paths.ends for paths in walked(policy, prompts, x, owner[going], times, batch)])
    images, values, failures = _scored(policy, ends, owner[going], prompts, scorer, component, batch)
    scores = torch.full((len(owner),), torch.nan)
    scores[going] = values
    winner = _ranked(values.view(alive.shape))[:, :1]
    chosen = (winner + torch.arange(len(prompts))[:, None] * alive.shape[1])[:, 0]
    return Best(
        images[chosen], going[chosen] % count, values[chosen], scores.view(-1, count),
        {int(going[k]): why for k, why in failures.items()},
        policy.counts["forwards"] - before, judgements + len(going),
    )  # fmt: skip


def _ranked(scores: Float[Tensor, "P N"]) -> Int[Tensor, "P N"]:
    """Columns from best to worst, those without a score last, equals in order."""
    return scores.nan_to_num(-torch.inf).sort(dim=1, descending=True, stable=True).indices


def _scored(policy, latents, owner, prompts, scorer, component: str, batch: int):
    """Images, scores, and reasons by row."""
    images = torch.cat([policy.decode(part).cpu() for part in latents.split(batch)])
    seen = score(images, [prompts[p] for p in owner.tolist()], {"by": scorer})
    return images, seen.parts[f"by.{component}"], seen.failures
