"""Load and check everything that a config names, before anything is written."""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from mmalign import policy as policies
from mmalign.activity import doing
from mmalign.config.checks import component
from mmalign.config.methods import named
from mmalign.config.paths import locate
from mmalign.config.schema import TRAINING, TRAINING_MOST, Config
from mmalign.data import judged_images, prompts as prompt_files
from mmalign.data.prompts import PromptBatches
from mmalign.distributed.deepspeed import ZeroOptimizer
from mmalign.distributed.processes import Ranks, join
from mmalign.errors import BadInput, refusing
from mmalign.evaluation import reference
from mmalign.policy.protocol import (
    Attributing,
    ChoosesAttention,
    Compiles,
    DecodesInGraph,
    EncodesImages,
    HoldsAdapters,
    Movable,
    SavesMemory,
    Trainable,
)
from mmalign.rewards import self_reward
from mmalign.rewards.rewards import Rewards
from mmalign.runs import adapters
from mmalign.seeds import seed_of
from mmalign.training import planning, refit as refits, step_rewards, values
from mmalign.training.clock import Clock
from mmalign.training.finite import Skips
from mmalign.training.learner import Learner, optimizer_class
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.training.session import Session
from reward_models import Prompt, RewardModel, combine, load as load_scorer
from reward_models.cache import Cached
from reward_models.meaning import meaning
from reward_models.registry import differentiable
from reward_models.weights import fingerprint


@dataclass(frozen=True)
class Given:
    """What a caller hands over as objects, instead of naming it in the config: the policy, some of the scorers by the
    names that the config has for them, and the prompts. None: loaded as the config says."""

    policy: Trainable | None = None
    scorers: Mapping[str, RewardModel] = field(default_factory=dict)
    prompts: Sequence[Prompt] | None = None
    held_out: Sequence[Prompt] | None = None


NOTHING = Given()


def open_session(c: Config, ranks: Ranks | None = None, given: Given = NOTHING) -> Session:
    """Load and check everything a config names and nobody has `given`, before anything is written. Raises BadInput."""
    ranks = ranks or join(c.patience)
    _check_ranks(c, ranks)
    if c.compile and c.credit is not None and c.credit.observer is not None:
        raise BadInput(f"compile: credit: {named(c.credit)} reads features, which a compiled network does not show")
    prompts = _prompts(None if c.records else c.prompts, given.prompts)
    with refusing(), doing("loading model and scorers"):
        by_policy = self_reward.opened(c)
        scorers = load_scorers(c, c.judging, {**by_policy, **given.scorers})
        policy, weights = load_policy(c, str(ranks.accelerator.device), given.policy)
        for scorer in by_policy.values():
            scorer.bind(policy)
        known = reference.load(c, weights, scorers) if c.reference else None
        rule = c.combine.opened([*c.rewards], {name: scorer.card.version for name, scorer in scorers.items()})
        records = judged_images.read(locate(c.records), policy.image_size) if c.records else None
        policy.attach_lora(c.lora_rank, c.lora_alpha, c.lora_targets, seed_of(c.seed, "adapter"))
        guide = _guide(c, policy)
        c, times, cost = planning.settled(c, policy)
        head, scouting = values.opened(c, policy), values.scouting(c, policy)
    batches = PromptBatches(records.prompts if records else prompts, c.prompts_per_iteration, c.seed, c.draw)
    batches(0)
    refit = _refit(c, scorers, batches.all)
    held_out = _held_out(c, given.held_out, batches.all)
    _check_suffix(policy, max(rule.fan.values(), key=len), [*batches.all, *held_out])
    fits = {name: AdaptiveBatch(getattr(c, name), ranks.sharded) for name in ("batch", "micro_batch", "decode_batch")}
    with refusing():
        rewards_of_steps = step_rewards.opened(c, policy)
    learner = _learner(c, policy, fits.pop("micro_batch"), ranks)
    if c.cache:  # last, because it creates the file
        with refusing():
            scorers = {name: Cached(scorer, c.cache) for name, scorer in scorers.items()}
    shown = {name: scorers[name] for name in dict.fromkeys([*c.trained, *c.watch])}
    rewards = Rewards(c, shown, dict.fromkeys(c.at_least, 0.0), known, rule)
    origin = _origin(weights, scorers, batches.all, held_out, [] if records is None else records.records)
    origin |= rule.origin() | guide
    if scouting is not None:
        origin |= {"scouts": fingerprint(scouting.state_dict(), digits=16)}
    if refit is not None:
        refit.judge = scorers[component(c.refresh.by)[0]]
        origin |= {"refit": refit.origin()}
    return Session(
        config=c, policy=policy, prompts=batches, held_out=held_out, times=times, cost=cost, rewards=rewards,
        learner=learner, records=records, origin=origin, clock=Clock(), fits=fits, ranks=ranks, refit=refit,
        values=head, scouting=scouting, step_rewards=rewards_of_steps,
    )  # fmt: skip


def _guide(c: Config, policy: Trainable) -> dict[str, str]:
    """Put the guide of a config's objective on the network, as a frozen adapter; its hash, if there is one. BadInput
    where it is no adapter, or another model's."""
    path = c.objective.guide
    if path is None:
        return {}
    if not isinstance(policy, HoldsAdapters):
        raise BadInput(f"objective: guide: model {c.model!r} holds one adapter alone; remove it")
    guide = adapters.read(Path(locate(path)))
    if guide.model is not None and locate(guide.model) != locate(c.model):
        raise BadInput(f"objective: guide: {path} was trained for {guide.model}; this run has {c.model}")
    guide.attach(policy, "guide")
    return {"guide": fingerprint(policy.adapter("guide"), digits=16)}


def _refit(c: Config, scorers: Mapping[str, RewardModel], prompts: Sequence[Prompt]) -> refits.Refit | None:
    """What a refresh needs, and whether there are prompts for it."""
    if c.refresh is None:
        return None
    with refusing():
        c.refresh.groups(prompts, c.seed)
        return refits.opened(c, scorers, lambda line: print(f"mmalign: {line}", file=sys.stderr))


def _prompts(source: str | None, given: Sequence[Prompt] | None) -> list[Prompt]:
    return [*given] if given is not None else prompt_files.read(locate(source)) if source else []


def _held_out(c: Config, given: Sequence[Prompt] | None, training: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of evaluations: those of a source, or some of the training prompts where the config says so."""
    if given is None and c.held_out == TRAINING:
        return [*training[:: max(1, -(-len(training) // TRAINING_MOST))]]
    held_out = _prompts(c.held_out, given)
    _check_apart(training, held_out)
    return held_out


def _check_suffix(policy: Trainable, suffix: str, prompts: Sequence[Prompt]) -> None:
    """Raises BadInput for prompts at whose end no text encoder of the model would read a suffix."""
    readers = getattr(policy, "readers", list)() if suffix else []
    lost = sum(all(reader.cuts(p.text + suffix) for reader in readers) for p in prompts) if readers else 0
    if lost:
        most = max(reader.tokens for reader in readers)
        raise BadInput(
            f"combine: {lost} of {len(prompts)} prompts, with {suffix!r} after them, are longer than the {most} tokens "
            "that the model reads, so that the direction is lost; shorten the suffix, or use other prompts"
        )


def _check_apart(training: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Raises BadInput for held-out prompts that have the meaning of a training prompt."""
    held = {meaning(p.text): p.text for p in held_out}
    shared = {held[same]: p.text for p in training if (same := meaning(p.text)) in held}
    if shared:
        text = min(shared)
        raise BadInput(
            f"held_out: {len(shared)} meanings are those of training prompts too, e.g. {text!r} and {shared[text]!r} "
            "in training; remove such prompts from one of the two files"
        )


def load_policy(c: Config, device: str, policy: Trainable | None = None) -> tuple[Trainable, str]:
    """A config's policy without an adapter, or the one given, and the fingerprint of its weights. ValueError for one
    that cannot be trained, or that a setting does not suit."""
    if policy is None:
        policy = policies.load(
            locate(c.model), dtype=c.precision, device=device, guidance=c.guidance, size=c.size, quantize=c.quantize,
            offload=c.offload,
        )  # fmt: skip
    elif isinstance(policy, Movable):
        policy.to(device)
    if not isinstance(policy, Trainable):
        missing = [name for name in dir(Trainable) if name[0] != "_" and not hasattr(policy, name)]
        raise ValueError(f"model {c.model!r} cannot be trained: it has no {', '.join(missing)}")
    needs = (
        (SavesMemory, {"gradient_checkpointing": c.gradient_checkpointing, "vae_tiling": c.vae_tiling}),
        (ChoosesAttention, {"attention": c.attention}),
        (Compiles, {"compile": c.compile}),
        (EncodesImages, {"records": c.records}),
        (DecodesInGraph, {"objective": c.objective.decoded > 0}),
        (Attributing, {"mask": c.mask is not None and c.mask.forwards > 0}),
    )
    for ability, acting in needs:
        for setting, acts in acting.items():
            if acts and not isinstance(policy, ability):
                raise ValueError(f"{setting}: model {c.model!r} cannot do that; remove it")
    if isinstance(policy, SavesMemory):
        policy.save_memory(gradients=c.gradient_checkpointing, tiling=c.vae_tiling, texts=c.text_cache)
    if c.attention:
        policy.attend(c.attention)
    return policy, policy.fingerprint()


def load_scorers(
    c: Config, names: Iterable[str], given: Mapping[str, RewardModel] = MappingProxyType({})
) -> dict[str, RewardModel]:
    """The scorers of a config by name, loaded unless `given`. BadInput for settings of others, and for components that
    they do not have."""
    unused = sorted(set(c.scorers) - {*c.judging})
    if unused:
        raise BadInput(f"scorers: settings for {unused[0]!r}, which is neither in rewards nor in watch")
    scorers = {
        name: given[name] if name in given else load_scorer(name, **c.scorers.get(name, {}))
        for name in dict.fromkeys(names)
    }
    floor = [c.advantage.floor] if c.advantage is not None and isinstance(c.advantage.floor, str) else []
    components = {"rewards": c.rewards, "at_least": c.at_least, "advantage.floor": floor}
    components["keep_best"] = filter(None, [c.keep_best])
    components["refresh.by"] = [] if c.refresh is None else [c.refresh.by]
    for key, rewards in components.items():
        for reward in rewards:
            name, part = component(reward)
            if part not in scorers[name].names:
                raise BadInput(f"{key}: no component {part!r}; {name} gives {', '.join(scorers[name].names)}")
    _check_factors(c, scorers)
    for name in c.trained if c.objective.decoded else ():
        try:
            differentiable(scorers[name])
        except ValueError as error:
            raise BadInput(f"rewards: objective: {named(c.objective)}: {error}") from None
    if c.region and not scorers[c.region].card.has_map:
        raise BadInput(f"region: {c.region} has no map; regional credit needs a scorer with one")
    return scorers


def _check_factors(c: Config, scorers: dict[str, RewardModel]) -> None:
    """Raises BadInput unless the cards of the scorers rule out a factor below 0, where the rule cannot have one."""

    def least(reward: str, weight: float | combine.Ramp) -> float:
        card = scorers[component(reward)[0]].card
        ends = (weight.start, weight.end) if isinstance(weight, combine.Ramp) else (weight,)
        return float(min(end * bound for end in ends for bound in (card.low, card.high) if end)) if any(ends) else 0.0

    low = {name: least(name, 1.0) for name in c.rewards}
    factors = c.combine.factors(low, {name: least(name, weight) for name, weight in c.weights.items()})
    for what, bound in factors.items():
        if bound < 0:
            raise BadInput(
                f"combine: {named(c.combine)} needs scores of at least 0; {what} may be as low as {bound:g}, by the "
                "`low` and `high` of its scorer's card; use sum, mrn or gdpo"
            )


def _origin(
    weights: str, scorers: dict[str, RewardModel], prompts: list[Prompt], held_out: list[Prompt], records: Sequence
) -> dict[str, str]:
    texts = {"prompts": prompts, "held-out prompts": held_out, "records": records}
    hashes = {name: hashlib.sha256(repr(items).encode()).hexdigest()[:16] for name, items in texts.items()}
    return {"model": weights} | hashes | {f"scorer {name}": scorer.card.version for name, scorer in scorers.items()}


def _learner(c: Config, policy: Trainable, micro_batch: AdaptiveBatch, ranks: Ranks) -> Learner:
    if c.compile:
        policy.compile()
    if not any(p.requires_grad for p in policy.parameters()):
        raise BadInput(f"lora_targets {c.lora_targets}: nothing is trained; is the adapter switched off?")
    optimizer = optimizer_class(c)(policy.parameters(), lr=c.learning_rate, weight_decay=c.weight_decay)
    if ranks.sharded:
        ranks.shard(policy.pipe.transformer)
    if ranks.zero:
        optimizer = ZeroOptimizer(policy.pipe.transformer, optimizer, ranks)
    skips = Skips(c.max_skips, partial(ranks.all_gather_object, what="what is finite"))
    old = policy.adapter() if c.objective.lag.most else None
    return Learner(c, policy, optimizer, policy.adapter(), old, micro_batch, skips, ranks)


def _check_ranks(c: Config, ranks: Ranks) -> None:
    """Raises BadInput for settings that do not suit many ranks: all ranks of a sharded network must take part in every
    forward, and so need as many."""
    if c.prompts_per_iteration < ranks.size:
        raise BadInput(f"prompts_per_iteration: {c.prompts_per_iteration} for {ranks.size} processes; each needs one")
    memory = {name: bool(getattr(c, name)) for name in ("compile", "quantize", "offload", "reuse")}
    learns = c.credit is not None and c.credit.learner is not None
    if ranks.sharded:
        if c.refresh is not None:
            raise BadInput("refresh: one process draws its images, which a sharded network (FSDP2) cannot; remove it")
        if c.prompts_per_iteration % ranks.size:
            raise BadInput(
                f"prompts_per_iteration: {c.prompts_per_iteration} does not divide among {ranks.size} processes, which "
                "must all call a sharded network (FSDP2) equally often"
            )
        uneven = {
            "extend": c.extend is not None,
            "plan": c.plan.uneven,
            "objective": not c.objective.even,
            "records": bool(c.records),
            "credit": learns or (c.credit is not None and c.credit.observer is not None),
        }
        if self_reward.opened(c):
            raise BadInput("rewards: self does not go with a sharded network (FSDP2)")
        _refuse(c, uneven | memory, "a sharded network (FSDP2)")
    if ranks.zero:
        others = {"credit": learns, "objective": c.objective.guide is not None, "optimizer": c.optimizer != "adamw"}
        _refuse(c, memory | others, "DeepSpeed")


def _refuse(c: Config, acting: dict[str, bool], what: str) -> None:
    for name, acts in acting.items():
        if acts:
            value = getattr(c, name)
            raise BadInput(f"{name}: {named(value) if is_dataclass(value) else value} does not go with {what}")
