"""Everything a run needs, loaded and checked before anything is written."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mmalign import config as configs, planner, policy as policies, prompts as prompt_files, references
from mmalign.config import BadInput, Config
from mmalign.fit import Fit
from mmalign.flow.plan import Noise
from mmalign.flow.sample import seed_of
from mmalign.guards import Skips
from mmalign.judge import Combination
from mmalign.ranks import Ranks, join
from mmalign.records import Records, read as read_records
from mmalign.types import Judgement, Policy
from mmalign.zero import Zero2
from reward_models import Prompt, RewardModel, combine, load as load_scorer
from reward_models.cache import Cached


@dataclass
class Clock:
    """Seconds by name, and `total`, all that passed, since the last reading. What a thread does beside counts too."""

    now: Callable[[], float] = time.perf_counter
    seconds: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.last = self.now()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args):
            with self.of(name):
                return function(*args)

        return run

    def read(self) -> dict[str, float]:
        before, self.last = self.last, self.now()
        out, self.seconds = dict(self.seconds), Counter()
        return out | {"total": self.last - before}


@dataclass(frozen=True)
class Session:
    """Everything a run needs, built once by `open_session`.

    `config` is as the budget left it, `levels` the noise of each step, `ema` the averaged adapter by name,
    `multipliers` the constraints' by component, `reference` the frozen one's mean and standard deviation by component.
    `records` are the judged images that are learnt from instead of rollouts, if any. `origin` names by hash what the
    run is made of, which must not change under it. `fits` are the rows at once of the config's `batch`, `micro_batch`
    and `decode_batch`, as memory allows, `skips` the steps left out (`mmalign.guards`). `ranks` are the
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
            row |= {f"judge/{name}/{key}": count for key, count in dict(judge.spent).items()} if judge else {}
        row = self.ranks.added(row, "counts") if row else row
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


def load_scorers(c: Config, names) -> dict[str, RewardModel]:
    unused = sorted(set(c.scorers) - {*c.trained, *c.watch})
    if unused:
        raise BadInput(f"scorers: settings for {unused[0]!r}, which is neither in rewards nor in watch")
    scorers = {name: load_scorer(name, **c.scorers.get(name, {})) for name in dict.fromkeys(names)}
    for key, named in (("rewards", c.rewards), ("at_least", c.at_least), ("keep_best", filter(None, [c.keep_best]))):
        for reward in named:
            name, part = configs.component(reward)
            if part not in scorers[name].names:
                raise BadInput(f"{key}: no component {part!r}; {name} gives {', '.join(scorers[name].names)}")
    _check_factors(c, scorers)
    if c.region and not scorers[c.region].card.places:
        raise BadInput(f"region: {c.region} says nothing about where; credit by place needs a scorer with a map")
    return scorers


def _check_factors(c: Config, scorers: dict[str, RewardModel]) -> None:
    """Raises BadInput unless the cards of the scorers rule out a factor below 0: a product has no root of it, and it
    turns what a gate opens the other way round."""

    def least(reward: str, weight: float | combine.Ramp) -> float:
        card = scorers[configs.component(reward)[0]].card
        ends = (weight.start, weight.end) if isinstance(weight, combine.Ramp) else (weight,)
        return min(end * bound for end in ends for bound in (card.low, card.high) if end) if any(ends) else 0.0

    if c.combine == "product":
        factors = {name: least(name, weight) for name, weight in c.rewards.items()}
    elif c.combine == "gate":
        factors = {c.gate: least(c.gate, 1.0)}
        factors["1 + the weighted sum of the others"] = 1 + sum(
            least(name, weight) for name, weight in c.rewards.items() if name != c.gate
        )
    else:
        factors = {}
    for what, bound in factors.items():
        if bound < 0:
            raise BadInput(
                f"combine: {c.combine} needs scores of at least 0; {what} may be as low as {bound:g}, by the `low` and "
                "`high` of its scorer's card; use sum, mrn or gdpo"
            )


def _origin(
    weights: str, scorers: dict[str, RewardModel], prompts: list[Prompt], held_out: list[Prompt], records
) -> dict[str, str]:
    texts = {"prompts": prompts, "held-out prompts": held_out, "records": records.records if records else []}
    hashes = {name: hashlib.sha256(repr(own).encode()).hexdigest()[:16] for name, own in texts.items()}
    return {"model": weights} | hashes | {f"scorer {name}": own.card.version for name, own in scorers.items()}


def open_session(c: Config, ranks: Ranks | None = None) -> Session:
    """Load and check everything a config names, before anything is written."""
    ranks = ranks or join(c.patience)
    if c.prompts_per_iteration < ranks.size:
        raise BadInput(f"prompts_per_iteration: {c.prompts_per_iteration} for {ranks.size} processes; each needs one")
    if ranks.sharded:
        _check_sharded(c, ranks.size)
    if ranks.zero:
        acting = {name: bool(getattr(c, name)) for name in ("compile", "quantize", "offload")}
        _refuse(c, acting | {"optimizer": c.optimizer != "adamw"}, "DeepSpeed")
    prompts = [] if c.records else prompt_files.read(configs.locate(c.prompts))
    held_out = prompt_files.read(configs.locate(c.held_out)) if c.held_out else []
    with configs.refusing():
        scorers = load_scorers(c, [*c.trained, *c.watch])
        policy = policies.load(
            configs.locate(c.model), dtype=c.precision, device=str(ranks.accelerator.device), guidance=c.guidance,
            size=c.size, quantize=c.quantize, offload=c.offload,
        )  # fmt: skip
        policy.save_memory(gradients=c.gradient_checkpointing, tiling=c.vae_tiling, texts=c.text_cache)
        if c.attention:
            policy.attend(c.attention)
        weights = policy.fingerprint()
        known = references.load(c, weights, scorers) if c.reference else None
        records = read_records(configs.locate(c.records), policy.image_size) if c.records else None
        policy.attach_lora(c.lora_rank, c.lora_alpha, c.lora_targets, seed_of(c.seed, "adapter"))
        c, times, levels, cost = planner.settled(c, policy)
    prompts = records.prompts if records else prompts
    prompt_files.batch(prompts, c.prompts_per_iteration, 0, c.seed)
    shared = {p.text for p in prompts} & {p.text for p in held_out}
    if shared:
        raise BadInput(f"held_out: {len(shared)} prompts are training prompts too, e.g. {min(shared)!r}")
    if c.compile:
        policy.compile()
    if not policy.parameters():
        raise BadInput(f"lora_targets {c.lora_targets}: nothing is trained; is the adapter switched off?")
    optimizer = optimizer_of(c)(policy.parameters(), lr=c.learning_rate, weight_decay=c.weight_decay)
    if ranks.sharded:
        ranks.shard(policy.pipe.transformer)
    if ranks.zero:
        optimizer = Zero2(policy.pipe.transformer, optimizer, ranks)
    multipliers = dict.fromkeys(c.at_least, 0.0)
    if c.cache:  # last, for it makes the file
        with configs.refusing():
            scorers = {name: Cached(scorer, c.cache) for name, scorer in scorers.items()}
    return Session(
        c,
        policy,
        scorers,
        prompts,
        held_out,
        times,
        levels,
        cost,
        optimizer,
        policy.adapter(),
        multipliers,
        known,
        records,
        _origin(weights, scorers, prompts, held_out, records),
        Clock(),
        {name: Fit(getattr(c, name), ranks.sharded) for name in ("batch", "micro_batch", "decode_batch")},
        ranks,
        Skips(c.max_skips, partial(ranks.tell, what="what is finite")),
    )


def _check_sharded(c: Config, processes: int) -> None:
    """Raises BadInput unless all processes of a sharded network ask it the same number of times."""
    if c.prompts_per_iteration % processes:
        raise BadInput(
            f"prompts_per_iteration: {c.prompts_per_iteration} does not divide among {processes} processes, which must "
            "all ask a sharded network (FSDP2) as often"
        )
    acting = {"window_moves": c.window_moves == "random", "objective": c.objective != "grpo"}
    acting |= {name: bool(getattr(c, name)) for name in ("records", "compile", "quantize", "offload")}
    _refuse(c, acting, "a sharded network (FSDP2)")


def _refuse(c: Config, acting: dict[str, bool], what: str) -> None:
    for name, acts in acting.items():
        if acts:
            raise BadInput(f"{name}: {getattr(c, name)} does not go with {what}")


def optimizer_of(c: Config) -> type[torch.optim.Optimizer]:
    """The class of a config's optimiser. BadInput where its package is not there."""
    if c.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise BadInput(f"optimizer: adamw8bit: {error}; pip install 'mmalign[gpu]'") from None
    return AdamW8bit
