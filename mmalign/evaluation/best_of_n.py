"""The best of N images of a prompt, with all of them sampled to the end, or the worst pruned early.

Early pruning looks at one-step predictions: each trajectory takes a few steps and jumps to the clean latent that its
velocity points at; the images that score worst there are not continued. With S survivors it costs
`N (after + 1) + S (steps - after)` forwards a prompt instead of `N steps`, and N + S judgements instead of N. A value
head (`mmalign.training.values`) looks at the features of the same forwards instead: S judgements, and nothing decoded.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import comb
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.utils import save_image

from mmalign.evaluation.generate import image_file, initial_noise, trajectories
from mmalign.evaluation.toward import Toward
from mmalign.flow.sample import Features
from mmalign.policy.protocol import Policy
from mmalign.rewards.judge import score
from reward_models import Prompt, RewardModel


def expected_best(scores: Float[Tensor, "N"]) -> list[float]:
    """The expected best of k of the N scores, k = 1..N, each choice of k being as likely; exact:
    `sum_i s_(i) C(i - 1, k - 1) / C(N, k)` over the scores in rising order. Scores that are NaN are left out."""
    ranked = scores[~scores.isnan()].double().sort().values.tolist()
    n = len(ranked)
    return [sum(s * comb(i, k - 1) for i, s in enumerate(ranked)) / comb(n, k) for k in range(1, n + 1)]


def curve(scores: Float[Tensor, "P N"]) -> list[float]:
    """`expected_best`, averaged over the prompts that have a score, up to the least number of scores of one of them."""
    curves = [values for values in map(expected_best, scores) if values]
    return [sum(column) / len(curves) for column in zip(*curves, strict=False)]


@runtime_checkable
class ValueHead(Protocol):
    """What it expects of states, from features of their forward: the difference from the mean reward of the prompt."""

    def observed(self, policy: Any) -> AbstractContextManager[Features]: ...

    def value(self, features: Float[Tensor, "M F"], t: Float[Tensor, "M"]) -> Float[Tensor, "M"]: ...


@dataclass(frozen=True)
class Best:
    """The best image of each prompt, the index of its seed (`member`), and its score, NaN if no seed has one.

    `scores` has all of them, NaN where an image was pruned or could not be scored; `failures` the reasons, by row of
    `P N`; then what it took: network forwards, and images scored."""

    images: Float[Tensor, "P 3 H W"]
    member: Int[Tensor, "P"]
    score: Float[Tensor, "P"]
    scores: Float[Tensor, "P N"]
    failures: Mapping[int, str]
    forwards: int
    judgements: int

    def save(self, prompts: Sequence[Prompt], seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
        """Write each prompt's best image as a PNG into the folder `out`, which is there. Returns for each its file
        `image`, its `prompt`, `seed` and `score`, None if it has none."""
        rows = []
        for i, (member, value) in enumerate(zip(self.member.tolist(), self.score.tolist(), strict=True)):
            file = image_file(out, prompts[i], seeds[member])
            save_image(self.images[i], file)
            row = {"image": str(file), "prompt": prompts[i].text, "seed": seeds[member]}
            rows.append(row | {"score": None if value != value else value})
        return rows


def best_of(
    policy: Policy,
    prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
    steps: int,
    scorer: RewardModel,
    component: str,
    batch: int = 64,
    survivors: int | None = None,
    after: int | None = None,
    toward: Toward | None = None,
    head: ValueHead | None = None,
) -> Best:
    """The best of each prompt's N seeds by a component of the scorer. With `survivors`, only that many continue after
    step `after`, chosen by their predicted images, or by a value `head`; with `toward`, all are guided. The image of a
    seed does not depend on the other seeds."""
    drawn = partial(trajectories, policy, prompts, batch=batch, toward=toward)
    count, forwards = len(seeds[0]), policy.counts["forwards"]
    x, owner = initial_noise(policy, seeds)
    times, judgements = policy.times(steps), 0
    alive = torch.arange(len(x)).view(-1, count)
    if survivors is not None and survivors < count:
        peek = torch.cat([times[: after + 1], torch.zeros(1)])
        if head is None:
            parts = [(paths.finals, paths.x[:, after]) for paths in drawn(x, owner, peek)]
            predicted, x = (torch.cat(column) for column in zip(*parts, strict=True))
            _, scores, _ = _scored(policy, predicted, owner, prompts, scorer, component, batch)
            judgements += len(x)
        else:
            with head.observed(policy) as features:
                peeks = [*drawn(x, owner, peek, features=features)]
            noted, x = torch.cat([p.features[:, after] for p in peeks]), torch.cat([p.x[:, after] for p in peeks])
            scores = head.value(noted, times[after].expand(len(noted)))
        alive = alive.gather(1, _ranked(scores.view(-1, count))[:, :survivors].sort(1).values)
        x, times = x[alive.flatten()], times[after:]
    rows = alive.flatten()
    finals = torch.cat([paths.finals for paths in drawn(x, owner[rows], times)])
    images, values, failures = _scored(policy, finals, owner[rows], prompts, scorer, component, batch)
    scores = torch.full((len(owner),), torch.nan)
    scores[rows] = values
    best = _ranked(values.view(alive.shape))[:, 0] + torch.arange(len(prompts)) * alive.shape[1]
    return Best(
        images[best], rows[best] % count, values[best], scores.view(-1, count),
        {int(rows[k]): reason for k, reason in failures.items()},
        policy.counts["forwards"] - forwards, judgements + len(rows),
    )  # fmt: skip


def _ranked(scores: Float[Tensor, "P N"]) -> Int[Tensor, "P N"]:
    """Columns from best to worst, those without a score last, equals in order."""
    return scores.nan_to_num(-torch.inf).sort(dim=1, descending=True, stable=True).indices


def _scored(
    policy: Policy,
    latents: Float[Tensor, "N C h w"],
    owner: Int[Tensor, "N"],
    prompts: Sequence[Prompt],
    scorer: RewardModel,
    component: str,
    batch: int,
) -> tuple[Float[Tensor, "N 3 H W"], Float[Tensor, "N"], Mapping[int, str]]:
    """Images, scores, and the reasons of missing scores by row."""
    images = torch.cat([policy.decode(part).cpu() for part in latents.split(batch)])
    scored = score(images, [prompts[p] for p in owner.tolist()], {"the scorer": scorer})
    return images, scored.parts[f"the scorer.{component}"], scored.failures
