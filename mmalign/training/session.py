"""Everything a run needs, loaded and checked before anything is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.config.schema import Config
from mmalign.data.judged_images import Records
from mmalign.distributed.processes import Ranks
from mmalign.flow.plan import Noise
from mmalign.rewards.combination import Combination
from mmalign.training import planning as planner
from mmalign.training.clock import Clock
from mmalign.training.finite import Skips
from mmalign.training.microbatch import Fit
from mmalign.types import Judgement, Policy
from reward_models import Prompt, RewardModel, combine
from reward_models.cache import Cached


@dataclass(frozen=True)
class Session:
    """Everything a run needs, built once by `open_session`.

    `config` is as the budget left it, `levels` the noise of each step, `ema` the averaged adapter by name,
    `multipliers` the constraints' by component, `reference` the frozen one's mean and standard deviation by component.
    `records` are the judged images that are learnt from instead of rollouts, if any. `origin` names by hash what the
    run is made of, which must not change under it. `fits` are the rows at once of the config's `batch`, `micro_batch`
    and `decode_batch`, as memory allows, `skips` the steps left out (`mmalign.training.finite`). `ranks` are the
    processes it runs in.
    """

    config: Config
    policy: Policy
    scorers: dict[str, RewardModel]
    prompts: list[Prompt]
    held_out: list[Prompt]
    times: Tensor
    levels: Noise
    cost: planner.Cost
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    multipliers: dict[str, float]
    reference: dict[str, tuple[float, float]] | None
    records: Records | None
    origin: dict[str, str]
    clock: Clock
    fits: dict[str, Fit]
    ranks: Ranks
    skips: Skips

    def combination(self, iteration: int) -> Combination:
        """The weights as they stand: ramps by how much of the run is done, constraints by their multipliers."""
        c, progress = self.config, iteration / max(1, self.config.iterations - 1)
        weights = {name: w.at(progress) if isinstance(w, combine.Ramp) else w for name, w in c.rewards.items()}
        weights |= {name: weights.get(name, 0.0) + u for name, u in self.multipliers.items()}
        return Combination(weights, c.combine, c.gate, self.reference, c.dead_spread)

    def move_multipliers(self, judged: Judgement) -> dict[str, float]:
        """Move each constraint's multiplier by how far its mean score is from the bound; as a row for the metrics."""
        for name, limit in self.config.at_least.items():
            mean = float(judged.parts[name].nanmean())
            self.multipliers[name] = combine.multiplier(self.multipliers[name], limit.bound, mean, limit.rate)
        return {f"multiplier/{name}": u for name, u in self.multipliers.items()}

    def asked(self) -> dict[str, int | float]:
        """What scorers have been asked so far in all processes, evaluations included: the share of scores that were
        had before, and of judges that are models the calls, failed ones and tokens."""
        cached = [scorer for scorer in self.scorers.values() if isinstance(scorer, Cached)]
        row = {"hits": sum(s.hits for s in cached), "asked": sum(s.asked for s in cached)} if cached else {}
        for name, scorer in self.scorers.items():
            judge = getattr(getattr(scorer, "scorer", scorer), "judge", None)
            row |= {f"judge/{name}/{key}": count for key, count in dict(judge.usage).items()} if judge else {}
        row = self.ranks.all_reduce_sum(row, "counts") if row else row
        return {"cache_hits": row.pop("hits") / max(1, row.pop("asked"))} | row if cached else row

    def pace(self, forwards: int) -> dict[str, float]:
        """Seconds of each part since they were last read, and network forwards per second of rollout and learning."""
        seconds = self.clock.read()
        rate = forwards / (seconds.get("rollout", 0.0) + seconds["learn"])
        return {"nfe_per_second": rate} | {f"seconds/{name}": spent for name, spent in seconds.items()}

    def set_rate(self, iteration: int) -> None:
        """The learning rate of an iteration: linear warm-up and cool-down."""
        c = self.config
        up = (iteration + 1) / c.warmup if c.warmup else 1.0
        down = (c.iterations - iteration) / c.cooldown if c.cooldown else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate * min(1.0, up, down)

    def average(self) -> None:
        """Move the averaged adapter towards the one in training."""
        for name, value in self.policy.adapter().items():
            self.ema[name].lerp_(value, 1 - self.config.ema)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The policy with its averaged adapter."""
        kept = self.policy.adapter()
        self.policy.load_adapter(self.ema)
        try:
            yield
        finally:
            self.policy.load_adapter(kept)
