"""Load and check everything that a config names, before anything is written."""

import hashlib
from functools import partial

import torch

from mmalign import errors, policy as policies
from mmalign.config import paths
from mmalign.config.schema import Config, component
from mmalign.data import prompts as prompt_files
from mmalign.data.judged_images import read as read_records
from mmalign.distributed.deepspeed import ZeroOptimizer
from mmalign.distributed.processes import Ranks, join
from mmalign.errors import BadInput
from mmalign.evaluation import reference as references
from mmalign.flow.sample import seed_of
from mmalign.training import planning as planner
from mmalign.training.clock import Clock
from mmalign.training.finite import Skips
from mmalign.training.microbatch import Fit
from mmalign.training.session import Session
from reward_models import Prompt, RewardModel, combine, load as load_scorer
from reward_models.cache import Cached


def load_scorers(c: Config, names) -> dict[str, RewardModel]:
    unused = sorted(set(c.scorers) - {*c.trained, *c.watch})
    if unused:
        raise BadInput(f"scorers: settings for {unused[0]!r}, which is neither in rewards nor in watch")
    scorers = {name: load_scorer(name, **c.scorers.get(name, {})) for name in dict.fromkeys(names)}
    for key, named in (("rewards", c.rewards), ("at_least", c.at_least), ("keep_best", filter(None, [c.keep_best]))):
        for reward in named:
            name, part = component(reward)
            if part not in scorers[name].names:
                raise BadInput(f"{key}: no component {part!r}; {name} gives {', '.join(scorers[name].names)}")
    _check_factors(c, scorers)
    if c.region and not scorers[c.region].card.has_map:
        raise BadInput(f"region: {c.region} says nothing about where; credit by place needs a scorer with a map")
    return scorers


def _check_factors(c: Config, scorers: dict[str, RewardModel]) -> None:
    """Raises BadInput unless the cards of the scorers rule out a factor below 0: a product has no root of it, and it
    turns what a gate opens the other way round."""

    def least(reward: str, weight: float | combine.Ramp) -> float:
        card = scorers[component(reward)[0]].card
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
    prompts = [] if c.records else prompt_files.read(paths.locate(c.prompts))
    held_out = prompt_files.read(paths.locate(c.held_out)) if c.held_out else []
    with errors.refusing():
        scorers = load_scorers(c, [*c.trained, *c.watch])
        policy = policies.load(
            paths.locate(c.model), dtype=c.precision, device=str(ranks.accelerator.device), guidance=c.guidance,
            size=c.size, quantize=c.quantize, offload=c.offload,
        )  # fmt: skip
        policy.save_memory(gradients=c.gradient_checkpointing, tiling=c.vae_tiling, texts=c.text_cache)
        if c.attention:
            policy.attend(c.attention)
        weights = policy.fingerprint()
        known = references.load(c, weights, scorers) if c.reference else None
        records = read_records(paths.locate(c.records), policy.image_size) if c.records else None
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
        optimizer = ZeroOptimizer(policy.pipe.transformer, optimizer, ranks)
    multipliers = dict.fromkeys(c.at_least, 0.0)
    if c.cache:  # last, for it makes the file
        with errors.refusing():
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
        Skips(c.max_skips, partial(ranks.all_gather_object, what="what is finite")),
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
