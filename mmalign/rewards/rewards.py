"""The rewards of a run: its scorers, their weights as they stand, and the constraints' multipliers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.rewards.combination import Combination
from mmalign.rewards.judge import Scored, judge
from mmalign.rewards.rule import Rule
from mmalign.types import Judgement, Trajectories
from reward_models import Prompt, RewardModel, combine
from reward_models.cache import Cached
from reward_models.registry import differentiable
from reward_models.types import Differentiable


@dataclass
class InGraph:
    """What an iteration has scored in a graph so far, on this rank: `images`, `scores` (images times scorers), and
    the reasons of the images that failed, by number."""

    images: int = 0
    scores: int = 0
    failures: dict[int, str] = field(default_factory=dict)

    def clear(self) -> None:
        self.images, self.scores = 0, 0
        self.failures.clear()


@dataclass(frozen=True)
class Rewards:
    """`scorers` by name, trained and watched; `multipliers` of the constraints, the frozen `reference`'s mean and
    standard deviation by component, and the `rule` of combination, opened. `graph` counts what is scored in a graph."""

    config: Any
    scorers: dict[str, RewardModel]
    multipliers: dict[str, float]
    reference: dict[str, tuple[float, float]] | None
    rule: Rule
    graph: InGraph = field(default_factory=InGraph)

    @property
    def trained(self) -> dict[str, RewardModel]:
        return {name: self.scorers[name] for name in self.config.trained}

    def texts(self, prompts: Sequence[Prompt], iteration: int) -> list[str]:
        """What the model reads for these prompts, of which scorers see the prompt alone."""
        suffixes = self.rule.suffixes(prompts, self.config.seed, iteration)
        return [prompt.text + suffix for prompt, suffix in zip(prompts, suffixes, strict=True)]

    def combination(self, iteration: int, prompts: Sequence[Prompt] = (), evaluation: bool = False) -> Combination:
        """The weights as they stand: ramps by how much of the run is done, constraints by their multipliers; for
        these prompts, by row, of the iteration or of an evaluation."""
        c, progress = self.config, iteration / max(1, self.config.iterations - 1)
        weights = {name: w.at(progress) if isinstance(w, combine.Ramp) else w for name, w in c.weights.items()}
        weights |= {name: weights.get(name, 0.0) + u for name, u in self.multipliers.items()}
        rule = self.rule.for_prompts(prompts, c.seed, None if evaluation else iteration)
        return Combination(weights, rule, self.reference, c.dead_spread)

    def judge(
        self,
        paths: Trajectories,
        scored: Scored,
        size: tuple[int, int],
        iteration: int,
        prompts: Sequence[Prompt],
    ) -> Judgement:
        """The rewards of a rollout of these prompts, of images of this size (height, width), by the weights of the
        iteration."""
        c = self.config
        whole, at_end = self.combination(iteration, prompts), None
        if c.at_end:
            at_end = replace(whole, weights={name: whole.weights[name] for name in c.at_end})
            whole = replace(whole, weights={name: w for name, w in whole.weights.items() if name not in c.at_end})
        return judge(paths, scored, size, whole, c.region, c.region_grid, at_end)

    def in_graph(
        self, prompts: Sequence[Prompt], iteration: int
    ) -> Callable[[Float[Tensor, "M 3 H W"], Int[Tensor, "M"]], Float[Tensor, "M"]]:
        """The reward of images in a graph that reaches their pixels, by the weights of the iteration as they stand now,
        from the images and the row of each one's prompt. NaN where an image cannot be scored. On the CPU."""
        scorers = {name: differentiable(scorer) for name, scorer in self.trained.items()}
        combination = self.combination(iteration, prompts)

        def reward(images: Float[Tensor, "M 3 H W"], owner: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
            owner, parts, graph = owner.cpu(), {}, self.graph
            for name, scorer in scorers.items():
                values, failures = _scored(scorer, images, [prompts[p] for p in owner.tolist()])
                graph.failures |= {graph.images + i: f"{name}: {reason}" for i, reason in failures.items()}
                parts |= {f"{name}.{part}": values[:, k] for k, part in enumerate(scorer.names)}
            graph.images, graph.scores = graph.images + len(images), graph.scores + len(images) * len(scorers)
            return combination(parts, owner)

        return reward

    def move_multipliers(self, judged: Judgement) -> dict[str, float]:
        """Move each constraint's multiplier by how far its mean score is from the bound; as a row for the metrics."""
        for name, limit in self.config.at_least.items():
            mean = float(judged.parts[name].nanmean())
            self.multipliers[name] = combine.multiplier(self.multipliers[name], limit.bound, mean, limit.rate)
        return {f"multiplier/{name}": u for name, u in self.multipliers.items()}

    def usage(self) -> dict[str, int]:
        """Counts of this rank so far, evaluations included: scores requested and those that were cached, and for VLM
        judges the number of calls, failures and tokens."""
        cached = [scorer for scorer in self.scorers.values() if isinstance(scorer, Cached)]
        row = {"hits": sum(s.hits for s in cached), "asked": sum(s.lookups for s in cached)} if cached else {}
        for name, scorer in self.scorers.items():
            judging = getattr(getattr(scorer, "scorer", scorer), "judge", None)
            row |= {f"judge/{name}/{key}": count for key, count in dict(judging.usage).items()} if judging else {}
        return row


def _scored(
    scorer: Differentiable, images: Float[Tensor, "M 3 H W"], prompts: Sequence[Prompt]
) -> tuple[Float[Tensor, "M K"], dict[int, str]]:
    """The scores in a graph; where they fail, image by image, with NaN for those that cannot be scored, and why."""
    try:
        return scorer.in_graph(images, prompts).float().cpu(), {}
    except ValueError as error:
        if len(images) == 1:
            return torch.full((1, len(scorer.names)), torch.nan), {0: " ".join(str(error).split())}
    each = [_scored(scorer, images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))]
    return torch.cat([values for values, _ in each]), {i: reasons[0] for i, (_, reasons) in enumerate(each) if reasons}


def shares(usage: dict[str, int | float]) -> dict[str, int | float]:
    """`usage` of all ranks with the share of cached scores instead of its counts."""
    row = dict(usage)
    if "asked" not in row:
        return row
    return {"cache_hits": row.pop("hits") / max(1, row.pop("asked"))} | row
