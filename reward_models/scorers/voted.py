"""`voted`: another scorer asked several times, for judges whose answers vary (a server at a temperature above 0).

The components are the means of the answers, and for each of them `COMPONENT_error`, the standard error of that mean:
the standard deviation of the answers over the root of their number. It is a statistic, not a reward; as `advantage:
{floor: voted.share_error}` it keeps differences between siblings that are noise of the judge from being enlarged. An
image with fewer than `least` answers has no score, and the reason is that of the missing ones. Critique, request, reply
and regions are those of the answer whose first component is closest to the mean. Cost: `times` scores for each image.
Licence: the scorer's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from reward_models.registry import given
from reward_models.scoring import TEXTS, each, score_isolated
from reward_models.types import Images, Prompt, RewardModel, Scores


class Voted:
    """The scorer. `of`: a scorer, its name, or {"scorer": name, setting: value}. `times`: how often it is asked.
    `least`: the answers that are needed. ValueError for a scorer that compares images, or an invalid setting."""

    def __init__(self, of: str | Mapping[str, Any] | RewardModel, times: int = 5, least: int = 3):
        if not 2 <= least <= times <= 100:
            raise ValueError(f"voted: 2 <= least <= times <= 100 is needed, got least {least}, times {times}")
        self.scorer, self.times, self.least = given(of, "voted: of"), times, least
        card = self.scorer.card
        if card.groupwise:
            raise ValueError(f"voted: {card.scorer} compares the images of a prompt; one that scores each is needed")
        self.names = (*self.scorer.names, *(f"{name}_error" for name in self.scorer.names))
        settings = {"of": card.version, "times": times, "least": least}
        self.card = replace(card, scorer="voted", settings=settings)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        count = len(images)
        repeated = [prompt for prompt in prompts for _ in range(self.times)]
        scores = score_isolated(self.scorer, images.repeat_interleave(self.times, 0), repeated)
        values = scores.values.view(count, self.times, -1).double()
        answers = (~values.isnan()).sum(1)
        mean = values.nanmean(1).masked_fill(answers < self.least, torch.nan)
        variance = ((values - mean[:, None]) ** 2).nansum(1) / (answers - 1)
        error = torch.where(mean.isnan(), torch.nan, (variance / answers).sqrt())
        distance = (values[:, :, 0] - mean[:, :1]).abs()
        typical = distance.nan_to_num(torch.inf).argmin(1) + self.times * torch.arange(count)
        failures = {}
        for i in range(count):
            reasons = [scores.failures[k] for k in range(i * self.times, (i + 1) * self.times) if k in scores.failures]
            if reasons and self.times - len(reasons) < self.least:
                failures[i] = f"{self.times - len(reasons)} of {self.times} answers, {self.least} needed: {reasons[0]}"
        texts = {name: tuple(column[k] for k in typical) for name in TEXTS if (column := getattr(scores, name))}
        return Scores(
            self.names,
            torch.cat([mean, error], 1).float(),
            regions=None if scores.regions is None else scores.regions[typical],
            failures=failures,
            boxes=tuple(scores.boxes[k] for k in typical) if scores.boxes else (),
            **texts,
        )
