"""Estimate a run's cost from its config, before any weight is loaded.

Counts are those of `metrics.jsonl` and equal the run's; where they cannot, `bounds` says why.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import astuple

from mmalign import errors
from mmalign.checks import footprint
from mmalign.config import paths
from mmalign.config.schema import Config
from mmalign.data import prompts as prompt_files
from mmalign.data.prompts import PromptBatches
from mmalign.errors import BadInput
from mmalign.policy import meta
from mmalign.rewards import self_reward
from mmalign.run import in_between
from mmalign.training import planning
from mmalign.training.planning import Cost
from mmalign.types import Plan
from reward_models import Prompt

COUNTS = ("forwards", "replay_forwards", "transitions", "decodes", "rewards")  # the fields of a Cost in metrics.jsonl


def estimate(c: Config, gpus: int = 1) -> dict:
    """All figures of a config on `gpus` processes, as JSON has them. BadInput for what a run would refuse too.

    `iteration` and `ranks` are what one iteration takes at most, wherever its plan stands; `run` is what all of them
    take together, each plan where it will be.
    """
    if c.records:
        raise BadInput("estimate counts what is sampled; with records nothing is, and replay follows the file")
    prompts = prompt_files.read(paths.locate(c.prompts))
    held_out = prompt_files.read(paths.locate(c.held_out)) if c.held_out else []
    batches = PromptBatches(prompts, c.prompts_per_iteration, c.seed, c.draw)
    batches(0)
    with errors.refusing():
        policy = meta.load(folder(c.model), dtype=c.precision, guidance=c.guidance, size=c.size)
        parts = meta.weights(policy)
        policy.attach_lora(c.lora_rank, c.lora_alpha, c.lora_targets, 0)
        c, times, whole = planning.settled(c, policy)
    one = c.model_copy(update={"prompts_per_iteration": 1})
    plans = {position: planning.plan_for(c, times, position) for position in c.plan.positions(c.steps)}
    costs = {position: planning.cost_of(one, plan, policy.true_guidance) for position, plan in plans.items()}
    ranks = [
        planning.cost(c.model_copy(update={"prompts_per_iteration": prompts}), times, policy.true_guidance)
        for prompts in shares(c, gpus)
    ]
    siblings = c.seeds * max(plan.trained for plan in plans.values())
    steps = c.epochs * min(c.minibatches, whole.rows)
    totals = [total(costs, groups) for groups in groups_at(c, batches, gpus)]
    trained = [p.numel() for p in policy.parameters()]
    head = footprint.values(c, policy, plans.values())
    return {
        "model": c.model,
        "plan": planning.describe(c, whole),
        "size": [*policy.image_size],
        "latent": [*policy.latent_shape],
        "bounds": bounds(c, plans.values()),
        "iteration": geometry(whole, c.prompts_per_iteration, siblings, steps),
        "ranks": [geometry(cost, n, siblings, steps) for cost, n in zip(ranks, shares(c, gpus), strict=True)],
        "run": {name: sum(rank[name] for rank in totals) for name in COUNTS} | {"iterations": c.iterations},
        "run_ranks": totals,
        "evaluations": evaluations(c, held_out, policy.true_guidance),
        "refreshes": refreshes(c, policy.true_guidance),
        "parameters": parts | {"adapter": sum(trained)},
        "memory": footprint.memory(c, policy, plans.values(), shares(c, gpus)[0], parts, sum(trained), len(prompts)),
        "disk": footprint.disk(c, len(held_out), policy.image_size, trained, head),
    }


def folder(model: str) -> str:
    """Where a model's configs are: in its folder, shipped for its hub id, or on the hub."""
    known = meta.ARCHITECTURES.get(model)
    return paths.locate(f"assets/architectures/{known}" if known else model)


def shares(c: Config, gpus: int) -> list[int]:
    """Prompts of each rank, which takes every `gpus`-th of an iteration's from its own number on: groups are never
    split, and ranks differ by one at most."""
    return [len(range(rank, c.prompts_per_iteration, gpus)) for rank in range(gpus)]


def geometry(cost: Cost, prompts: int, siblings: int, steps: int) -> dict[str, int]:
    """An iteration of so many prompts, with `siblings` trajectories each; all ranks take the optimiser's `steps`."""
    row = {"prompts": prompts, "groups": prompts, "trajectories": prompts * siblings} | counts(cost)
    return row | {"optimizer_steps": steps}


def counts(cost: Cost) -> dict[str, int]:
    return dict(zip(COUNTS, astuple(cost), strict=True))


def groups_at(c: Config, batches: PromptBatches, gpus: int) -> list[Counter[int]]:
    """For each rank, how many groups of the whole run have their plan at each position."""
    positions = c.plan.positions(c.steps)
    if len(positions) == 1:
        return [Counter({positions[0]: groups * c.iterations}) for groups in shares(c, gpus)]
    ranks: list[Counter[int]] = [Counter() for _ in range(gpus)]
    for iteration in range(c.iterations):
        for number, prompt in enumerate(batches(iteration)):
            ranks[number % gpus][planning.position_of(c, iteration, prompt.id)] += 1
    return ranks


def total(costs: Mapping[int, Cost], groups: Mapping[int, int]) -> dict[str, int]:
    """The cost of so many groups at each position."""
    return {name: sum(n * counts(costs[position])[name] for position, n in groups.items()) for name in COUNTS}


def bounds(c: Config, plans: Collection[Plan]) -> list[str]:
    """Where a run may take less than the estimate, and why."""
    fewer = [part.fewer for part in c.objective.summands if part.fewer]
    shared = any(part.states(p, c.seeds) < part.rows(p, c.seeds) for part in c.objective.summands for p in plans)
    if shared and not c.reuse and (c.minibatches > 1 or c.select):
        fewer.append("replay_forwards: fewer where the steps of a minibatch share a forward")
    extends = ["all counts: fewer where `extend` draws less than it may"] if c.extend else []
    learns = c.credit is not None and c.credit.learner is not None
    extends += ["forwards: fewer where `credit` has no outcome of an image to learn from"] if learns else []
    moves = len(c.plan.positions(c.steps)) > 1
    at_most = "an iteration: the most over all positions of the plan; the run: each plan where it will be"
    selects = ["transitions, replay_forwards: fewer where too few images have a score"] if c.select else []
    drawn = "the run: windows move with the prompts, which `draw` takes by rewards that are not known yet"
    fewer += selects + extends + ([at_most] if moves else [])
    return fewer + ([drawn] if c.draw.learns and c.plan.uneven else [])


def evaluations(c: Config, held_out: list[Prompt], guided: bool) -> dict[str, int]:
    """All evaluations of a run: before and after on all held-out prompts, `eval_seeds` each; in between on some,
    `eval_siblings` each; after the first in each direction that is measured. Every image is shown to rewards and
    `watch` too."""
    between = (c.iterations - 1) // c.eval_every if c.eval_every and held_out else 0
    some = len(held_out[:: in_between(c, len(held_out))])
    trained = len(held_out) * c.eval_seeds + between * c.eval_siblings * some
    images = len(held_out) * c.eval_seeds + trained * c.combine.measured(len(c.rewards))
    scorers = len({*c.trained, *c.watch})
    return {
        "evaluations": between + (2 if held_out else 0),
        "decodes": images,
        "forwards": images * (c.eval_steps * (2 if guided else 1) + self_reward.forwards(c, (*c.trained, *c.watch))),
        "rewards": images * scorers,
    }


def refreshes(c: Config, guided: bool) -> dict[str, int]:
    """All refreshes of a reward: their images, each shown to one judge. The fits are not counted."""
    times = c.refresh.times(c.iterations) if c.refresh else 0
    images = times * c.refresh.prompts * c.refresh.seeds if times else 0
    return {
        "refreshes": times,
        "decodes": images,
        "forwards": images * c.eval_steps * (2 if guided else 1),
        "rewards": images,
    }
