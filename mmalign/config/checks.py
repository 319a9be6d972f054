"""What the settings of a config must have in common, beside the type of each."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from pydantic import BaseModel

from mmalign.config.methods import named
from mmalign.config.secrets import secret_in
from mmalign.rewards import self_reward
from mmalign.rewards.refresh import REFITTED
from mmalign.sampling.kernels import FlowSde
from reward_models.combine import Ramp

MOST = 10**7  # states of an iteration's trajectories
SMALLEST, LARGEST = 1e-12, 1e6  # of the numbers of a config that are not 0
OPTIONAL = ("credit", "loss", "advantage", "mask", "max_kl", "region", "records")  # an objective `uses` some of them
SAMPLING = (
    "region", "combine", "at_least", "reference", "steps", "seeds", "plan", "kernel", "max_forwards", "max_rewards",
    "cache", "rollout_parts", "draw", "refresh", "scouts", "select", "extend", "reuse",
)  # fmt: skip


def component(reward: str) -> tuple[str, str]:
    """The name of a scorer and of its component, of `scorer.component`. A module's dots come before its colon
    (`my.module:Scorer.part`); a component may have its own (`remote.clip.cosine`)."""
    module, colon, rest = reward.rpartition(":")
    scorer, _, part = rest.partition(".")
    return module + colon + scorer, part


def check(c: BaseModel) -> None:
    """ValueError, in one line that names the setting, unless the settings of a `Config` go together."""
    for suits in (
        _numbers, _secrets, _settings_act, _rewards, _credit, _learnt_rewards, _refresh, _schedule, c.objective.check,
        _plan,
    ):  # fmt: skip
        suits(c)


def _numbers(c: BaseModel) -> None:
    """Squared or multiplied in float32, other numbers would become 0 or infinite."""
    for name, value in c:
        for number in _floats(value) if name != "scorers" else ():
            if number and not SMALLEST <= abs(number) <= LARGEST:
                raise ValueError(f"{name}: {number:g} is out of range; 0, or {SMALLEST:g} to {LARGEST:g} in size")


def _secrets(c: BaseModel) -> None:
    """A run's folder is passed on, and its config with it."""
    for name, settings in c.scorers.items():
        if (secret := secret_in(settings)) is not None:
            raise ValueError(
                f"scorers: {name}: {secret} is a secret, and a config is stored and passed on; put it into the "
                "environment (OPENAI_API_KEY for judges, MMALIGN_TOKEN for remote)"
            )


def _settings_act(c: BaseModel) -> None:
    """Refuse what the objective, the plan or the records leave without effect, and what is missing."""
    objective, name = c.objective, named(c.objective)
    idle = {f"objective: {name}": [key for key in OPTIONAL if key not in objective.uses]}
    if not c.plan.stochastic:
        idle[f"plan: {named(c.plan)}"] = ["kernel"]
    if c.records:
        idle["records"] = SAMPLING
    if c.held_out is None or c.eval_every == 0:
        idle["held_out: null or eval_every: 0"] = ["keep_best"]
    for owner, keys in idle.items():
        for key in keys:
            default = type(c).model_fields[key].get_default()
            if getattr(c, key) not in (default, None):
                raise ValueError(f"{key} does not act with {owner}; remove it")
    for key in ("credit", "loss", "advantage"):
        if key in objective.uses and getattr(c, key) is None:
            raise ValueError(f"{key}: null; objective: {name} needs one")
    if "region" in objective.needs and not c.records and c.region is None:
        raise ValueError(f"objective: {name} needs region, a scorer with a map, or records")
    if c.draw.weigh and "advantage" not in objective.uses:
        raise ValueError(f"draw: weigh acts on advantages, which objective: {name} does not have; remove it")
    if objective.stochastic and not c.plan.stochastic:
        raise ValueError(
            f"plan: {named(c.plan)} has no stochastic step, and objective: {name} learns from those; use another "
            "plan, or an objective on finished images"
        )
    if c.region is None and c.mask is not None and c.mask.region:
        raise ValueError(f"mask: {named(c.mask)} needs region, a scorer with a map")
    if c.region is None and not c.records and c.region_grid is not None:
        raise ValueError("region_grid acts only with region or records; remove it")
    weights = (1, 1) if c.advantage is None else (c.advantage.whole, c.advantage.regional)
    if c.region is None and weights != (1, 1):
        raise ValueError("advantage: whole and regional act only with region; remove them")
    if not c.rewards and not c.records:
        raise ValueError("rewards: at least one is needed; only training on records does without")


def _learnt_rewards(c: BaseModel) -> None:
    """A credit that learns rewards of steps has its map from them, and its labels from a trained component."""
    learner = c.credit and c.credit.learner
    if learner is None:
        return
    if c.region is not None:
        raise ValueError(f"region: credit: {named(c.credit)} has a map of its rewards (grid); remove one of the two")
    if learner.label is not None and learner.label not in c.rewards:
        raise ValueError(f"credit: label: {learner.label!r} is not among the rewards: {', '.join(c.rewards)}")


def _rewards(c: BaseModel) -> None:
    rule, name = c.combine, f"combine: {named(c.combine)}"
    if c.reference and not rule.below_0:
        raise ValueError(
            f"reference: in standard deviations above a mean about half of all scores are below 0, and {name} needs "
            "scores of at least 0; use sum, mrn or gdpo with it"
        )
    for setting, reason in rule.refuses.items():
        if getattr(c, setting):
            raise ValueError(f"{setting}: it does not go with {name}: {reason}; remove it")
    if rule.scale and c.advantage is not None and c.advantage.scale != rule.scale:
        raise ValueError(f"{name} needs advantage: {{scale: {rule.scale}}}; it has normalised in groups already")
    if c.at_least and not rule.below_0:
        raise ValueError(f"at_least adds to a sum; with {name} it cannot act")
    idle = first_without_weight(c.weights, c.iterations) if c.rewards else None
    if idle is not None and not (rule.weightless or c.at_least or c.records):
        raise ValueError(
            f"rewards: all weights are 0 in iteration {idle + 1}, which could not train anything; give one a "
            "weight, or let a ramp begin, end and pass elsewhere than at 0"
        )
    if c.rewards:
        ends = {k: (w.start, w.end) if isinstance(w, Ramp) else (w, w) for k, w in c.weights.items()}
        rule.check({k: (float(start), float(end)) for k, (start, end) in ends.items()})
    floor = c.advantage.floor if c.advantage is not None else 0.0
    if isinstance(floor, str) and (list(c.weights.values()) != [1] or rule.scale or c.reference or c.at_least):
        raise ValueError(
            f"advantage: floor: {floor!r} is in the unit of one score; it needs a single reward of weight 1, without "
            "reference, at_least or a rule that normalises"
        )
    if isinstance(floor, str) and component(floor)[0] not in c.trained:
        raise ValueError(
            f"advantage: floor: {floor!r} is not a component of the scorer of rewards: {', '.join(c.trained)}"
        )
    if c.region is not None and c.region not in c.trained:
        raise ValueError(f"region: {c.region!r} is not among the scorers of rewards: {', '.join(c.trained)}")
    if c.keep_best and component(c.keep_best)[0] not in (*c.trained, *c.watch):
        raise ValueError(f"keep_best: {c.keep_best!r} is not a component of the scorers of rewards or watch")


def _credit(c: BaseModel) -> None:
    """A sum of credits must have a weight at all times, rewards of finished images a credit for each of two kinds, and
    the unit of advantages a credit that has it."""
    parts = [] if c.credit is None else [*getattr(c.credit, "acting", (c.credit,))]
    weights = {str(number): weight for number, weight in enumerate(getattr(c.credit, "weights", ()))}
    idle = first_without_weight(weights, c.iterations) if weights else None
    if idle is not None:
        raise ValueError(f"credit: all weights are 0 in iteration {idle + 1}, which could not train anything")
    if parts and not c.credit.normalises and (c.advantage.scale, c.advantage.floor) != ("group", 0):
        raise ValueError(f"advantage: scale and floor do not act with credit: {named(c.credit)}; remove them")
    if not c.at_end:
        return
    name = c.at_end[0]
    if {part.dense for part in parts} != {True, False}:
        raise ValueError(
            f"rewards: {name}: density: end needs a sum of credits, one that reads states and one that does not, such "
            "as credit: [gain, terminal]"
        )
    if len(c.at_end) == len(c.rewards):
        raise ValueError(f"rewards: {name}: density: end; at least one reward must have density: step")
    if not c.combine.linear or c.region is not None:
        what = "region" if c.combine.linear else f"combine: {named(c.combine)}"
        raise ValueError(f"rewards: {name}: density: end does not go with {what}")


def _refresh(c: BaseModel) -> None:
    """The scorer must be one that can be fitted again, and nothing may rest on the scores of its first fit."""
    if c.refresh is None:
        return
    name, judge = c.refresh.scorer, component(c.refresh.by)
    settings = c.scorers.get(name, {})
    changing = [reward for reward in (*c.rewards, *c.at_least) if component(reward)[0] == name]
    if not changing:
        raise ValueError(f"refresh: scorer: {name!r} is not among the scorers of rewards: {', '.join(c.trained)}")
    if settings.get("scorer", name) != "fitted" or not isinstance(settings.get("folder"), str):
        raise ValueError(f"refresh: scorer: {name!r} is not a scorer of type fitted with a folder of its model")
    if not all(judge) or judge[0] == name:
        raise ValueError(f"refresh: by: {c.refresh.by!r}: the component of another scorer, scorer.component, is needed")
    if c.refresh.every >= c.iterations:
        raise ValueError(f"refresh: every: {c.refresh.every} of {c.iterations} iterations: it would never act")
    if settings.get("better"):
        raise ValueError(f"refresh: {name} gives `better`, which needs a calibration, and a refit has none")
    for reward in changing:
        if component(reward)[1] not in REFITTED:
            raise ValueError(f"refresh: {reward}: a refit has the components {', '.join(REFITTED)} alone")
    resting = {"reference": c.reference, "keep_best": c.keep_best and component(c.keep_best)[0] == name}
    resting["at_least"] = any(component(reward)[0] == name for reward in c.at_least)
    for setting, rests in resting.items():
        if rests:
            raise ValueError(
                f"{setting}: it is in the units of the first fit, and refresh changes those of {name}; remove it"
            )


def _schedule(c: BaseModel) -> None:
    if c.rollout_parts > 1 and self_reward.opened(c):
        raise ValueError("rollout_parts: scorer self takes the network that samples meanwhile; remove rollout_parts")
    if c.rollout_parts > c.prompts_per_iteration:
        raise ValueError(f"rollout_parts: {c.rollout_parts} of {c.prompts_per_iteration} prompts; each part needs one")
    if c.reuse:
        _reuse(c)
    if c.warmup + c.cooldown > c.iterations:
        raise ValueError(f"warmup {c.warmup} + cooldown {c.cooldown} exceed iterations {c.iterations}")


def _reuse(c: BaseModel) -> None:
    """Raises ValueError where an update needs other forwards than the rollout's, or does not hold activations."""
    if not all(part.reuses for part in c.objective.summands) or len(c.objective.summands) > 1:
        raise ValueError(f"reuse: objective: {named(c.objective)} does not learn from the steps of a rollout alone")
    credit = c.credit and (c.credit.observer or c.credit.learner)
    others = {"gradient_checkpointing": c.gradient_checkpointing, "extend": c.extend, "credit": credit}
    others |= {"epochs": c.epochs > 1, "minibatches": c.minibatches > 1, "max_kl or beta": c.measures_kl}
    for name, acts in others.items():
        if acts:
            raise ValueError(f"reuse does not go with {name}; remove one of the two")


def _plan(c: BaseModel) -> None:
    """Try the plan on an even schedule: its steps, its noise, and what the credit makes of it."""
    if c.records:
        return
    _size(c, 1)
    siblings = c.seeds * c.plan.children
    if siblings < c.objective.siblings:
        raise ValueError(
            f"seeds x children = {siblings}: objective: {named(c.objective)} compares siblings, at least "
            f"{c.objective.siblings} are needed"
        )
    if c.scouts is not None and c.seeds < 2:
        raise ValueError(
            f"scouts: the most contrastive of a prompt are at least 2 starting noises, got seeds: {c.seeds}"
        )
    if c.scouts is not None and c.scouts.by == "value" and (c.credit is None or c.credit.observer is None):
        raise ValueError(
            "scouts: by: value needs credit: value, whose head it reads, or a run's folder instead of value"
        )
    if c.scouts is not None and not c.scouts.images(c.seeds) and c.scouts.steps > c.steps:
        raise ValueError(f"scouts: steps: {c.scouts.steps}; by: {c.scouts.by} sees the run's {c.steps} steps at most")
    if c.select is not None:
        _select(c)
    if c.extend is not None and not all(part.stochastic for part in c.objective.summands):
        raise ValueError(f"extend adds stochastic steps, and objective: {named(c.objective)} does not learn from those")
    if c.extend is not None and c.scouts is not None:
        raise ValueError("extend does not go with scouts, whose correlation is of the images they chose; remove one")
    if c.extend is not None and c.credit is not None and (c.credit.forwards or c.credit.observer):
        raise ValueError(f"extend: its trajectories lack what credit: {named(c.credit)} measures; remove one")
    even = torch.linspace(1, 0, c.steps + 1)
    kernel = FlowSde() if isinstance(c.kernel.noise, str) else c.kernel
    for position in c.plan.positions(c.steps):
        try:
            table = c.plan(even, kernel, position)
        except ValueError as error:
            raise ValueError(f"plan: {named(c.plan)}: {error}") from None
        if c.credit is not None:
            c.credit.check(table)
            states, _ = c.credit.completions(table)
            if c.select is not None and c.select.dense and len(states) < 2:
                raise ValueError(f"select: {named(c.select)} needs a credit that completes at least two states")
            if states and not 0 <= min(states) <= max(states) < c.steps:
                raise ValueError(f"credit: states {states} must lie within 0 to {c.steps - 1}")
            _size(c, c.steps if states else 1)
            if c.reuse and states:
                raise ValueError(
                    f"reuse would hold the completions of credit: {named(c.credit)}; remove one of the two"
                )
            if c.extend is not None:
                c.extend.check(table, c.seeds, c.credit)


def _select(c: BaseModel) -> None:
    """It must leave something out, and as many images as the objective compares."""
    if not isinstance(getattr(c.select, "keep", None), int):
        raise ValueError(f"select: {named(c.select)} has no `keep`, the most images of a prompt that it leaves")
    keep, images, needed = c.select.keep, c.seeds * c.plan.routes, c.objective.siblings
    if keep >= images:
        raise ValueError(
            f"select: keep: {keep} of seeds x routes = {images} images leaves none out; lower it, or remove it"
        )
    if keep < needed:
        raise ValueError(f"select: keep: {keep}; objective: {named(c.objective)} compares at least {needed} images")
    if c.select.dense and c.credit is None:
        raise ValueError(f"select: {named(c.select)} needs a credit that completes states, such as gain")


def _size(c: BaseModel, completions: int) -> None:
    states = c.prompts_per_iteration * c.seeds * c.plan.routes * c.steps * completions
    scouts = 0 if c.scouts is None else c.prompts_per_iteration * c.scouts.starts(c.seeds) * c.scouts.steps
    if max(states, scouts) > MOST:
        raise ValueError(
            f"an iteration would hold {max(states, scouts):.2g} states in memory; lower prompts_per_iteration, seeds, "
            "steps, the plan's children or steps, or the scouts' ratio or steps"
        )


def first_without_weight(rewards: Mapping[str, float | Ramp], iterations: int) -> int | None:
    """The first iteration, from 0, in which all weights are 0. A ramp passes 0 once at most."""
    steady = [weight for weight in rewards.values() if not isinstance(weight, Ramp)]
    ramps = [weight for weight in rewards.values() if isinstance(weight, Ramp)]
    if any(steady):
        return None
    last = max(1, iterations - 1)
    passed = [
        bisect_left(range(iterations), True, key=lambda i: (ramp.end - ramp.start) * ramp.at(i / last) >= 0)
        for ramp in ramps
    ]
    places = sorted({0, iterations - 1, *passed})
    return next((i for i in places if i < iterations and not any(ramp.at(i / last) for ramp in ramps)), None)


def _floats(value: Any) -> Iterator[float]:
    """The numbers with a fraction in a setting, at any depth."""
    if isinstance(value, float):
        yield value
    elif is_dataclass(value) or isinstance(value, BaseModel | Mapping):
        fields = value if isinstance(value, Mapping) else vars(value)
        for part in fields.values():
            yield from _floats(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _floats(part)
