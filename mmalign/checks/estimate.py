"""What a run will take, told from its config and the model's configs, before any weight is there.

Counts are those of `metrics.jsonl` and equal the run's; where they cannot, `bounds` says why. Bytes are those of
tensors that are known to be there: what makes up each figure stands with its function. Not covered: fragmentation of
the allocator, activations of autoencoder and text encoders, reward models, copies while tensors are moved or stacked,
what CUDA and libraries take themselves (one to two GiB a process), and the communication between GPUs.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import astuple, dataclass
from math import ceil, prod

import torch

from mmalign import errors
from mmalign.config import paths
from mmalign.config.schema import Config
from mmalign.data import prompts as prompt_files
from mmalign.errors import BadInput
from mmalign.evaluation.evaluate import SHEET
from mmalign.policy import loading, meta
from mmalign.run import in_between
from mmalign.training import planning as planner, snapshots as exhibit
from mmalign.training.planning import Cost
from mmalign.training.session import Session
from mmalign.types import Plan
from reward_models import Prompt

COUNTS = ("forwards", "replay_forwards", "transitions", "decodes", "rewards")  # the fields of a Cost in metrics.jsonl
WEIGHT = {"float32": 4, "bfloat16": 2, "int8": 1, "llm_int8": 1, "nf4": 0.5}  # bytes of a frozen weight
MOMENTS = {"adamw": 8, "adamw8bit": 2}  # bytes the optimiser keeps of a trained parameter
HEADERS = 430  # bytes of a checkpoint's headers for each trained matrix: names, shapes and counters in three files


def estimate(c: Config, gpus: int = 1) -> dict:
    """All figures of a config on `gpus` processes, as JSON has them. BadInput for what a run would refuse too.

    `iteration` and `ranks` are what one iteration takes at most, wherever its windows stand; `run` is what all of them
    take together, each window where it will be.
    """
    if c.records:
        raise BadInput("estimate counts what is sampled; with records nothing is, and replay follows the file")
    prompts = prompt_files.read(paths.locate(c.prompts))
    held_out = prompt_files.read(paths.locate(c.held_out)) if c.held_out else []
    prompt_files.batch(prompts, c.prompts_per_iteration, 0, c.seed)
    with errors.refusing():
        policy = meta.load(folder(c.model), dtype=c.precision, guidance=c.guidance, size=c.size)
        parts = meta.weights(policy)
        policy.attach_lora(c.lora_rank, c.lora_alpha, c.lora_targets, 0)
        c, times, levels, whole = planner.settled(c, policy)
    one = c.model_copy(update={"prompts_per_iteration": 1})
    plans = {start: planner.plan_for(c, times, levels, start) for start in planner.window_starts(c)}
    costs = {start: planner.cost_of(one, plan, policy.true_guidance) for start, plan in plans.items()}
    ranks = [
        planner.cost(c.model_copy(update={"prompts_per_iteration": own}), times, levels, policy.true_guidance)
        for own in shares(c, gpus)
    ]
    siblings = c.seeds * max(plan.learnt for plan in plans.values())
    steps = c.epochs * min(c.minibatches, whole.rows)
    totals = [total(costs, groups) for groups in dealt(c, prompts, gpus)]
    trained = [p.numel() for p in policy.parameters()]
    return {
        "model": c.model,
        "plan": planner.describe(c, whole),
        "size": [*policy.image_size],
        "latent": [*policy.latent_shape],
        "bounds": bounds(c),
        "iteration": geometry(whole, c.prompts_per_iteration, siblings, steps),
        "ranks": [geometry(cost, own, siblings, steps) for cost, own in zip(ranks, shares(c, gpus), strict=True)],
        "run": {name: sum(own[name] for own in totals) for name in COUNTS} | {"iterations": c.iterations},
        "run_ranks": totals,
        "evaluations": evaluations(c, held_out, policy.true_guidance),
        "parameters": parts | {"adapter": sum(trained)},
        "memory": memory(c, policy, plans.values(), shares(c, gpus)[0], parts, sum(trained), len(prompts)),
        "disk": disk(c, len(held_out), policy.image_size, trained),
    }


def folder(model: str) -> str:
    """Where a model's configs are: in its folder, shipped for its hub id, or on the hub."""
    known = meta.ARCHITECTURES.get(model)
    return paths.locate(f"assets/architectures/{known}" if known else model)


def shares(c: Config, gpus: int) -> list[int]:
    """Prompts of each rank, which takes every `gpus`-th of an iteration's from its own number on: groups stay whole,
    and ranks differ by one at most."""
    return [len(range(rank, c.prompts_per_iteration, gpus)) for rank in range(gpus)]


def geometry(cost: Cost, prompts: int, siblings: int, steps: int) -> dict[str, int]:
    """An iteration of so many prompts, a group of `siblings` walks each; all ranks take the optimiser's `steps`."""
    own = {"prompts": prompts, "groups": prompts, "walks": prompts * siblings} | counts(cost)
    return own | {"optimizer_steps": steps}


def counts(cost: Cost) -> dict[str, int]:
    return dict(zip(COUNTS, astuple(cost), strict=True))


def dealt(c: Config, prompts: list[Prompt], gpus: int) -> list[Counter[int]]:
    """Of each rank, how many groups of the whole run have their window at each place."""
    if not c.window_moves:
        return [Counter({planner.window_starts(c)[0]: own * c.iterations}) for own in shares(c, gpus)]
    found: list[Counter[int]] = [Counter() for _ in range(gpus)]
    for iteration in range(c.iterations):
        for number, prompt in enumerate(prompt_files.batch(prompts, c.prompts_per_iteration, iteration, c.seed)):
            found[number % gpus][planner.window_start(c, iteration, prompt.id)] += 1
    return found


def total(costs: Mapping[int, Cost], groups: Mapping[int, int]) -> dict[str, int]:
    """Of so many groups at each place, each of the cost there."""
    return {name: sum(n * counts(costs[start])[name] for start, n in groups.items()) for name in COUNTS}


def bounds(c: Config) -> list[str]:
    """Where a run may take less than is said, and why."""
    said = []
    if c.objective == "grpo" and not c.beta:
        said.append("replay_forwards: fewer where an advantage is 0 (beta: 0)")
    if c.objective == "srum":
        said.append("replay_forwards, transitions: fewer where an image has no score")
    if c.objective == "rgdpo":
        said.append("replay_forwards, transitions: fewer where two images have no regions to compare")
    if c.window_moves:
        said.append("an iteration: the most of all places of the window; the run: each window where it will be")
    return said


def evaluations(c: Config, held_out: list[Prompt], guided: bool) -> dict[str, int]:
    """All evaluations of a run: before and after on all held-out prompts, `eval_seeds` each; in between on some, one
    image each. Every image is shown to rewards and `watch` alike."""
    between = (c.iterations - 1) // c.eval_every if c.eval_every and held_out else 0
    images = 2 * len(held_out) * c.eval_seeds + between * len(held_out[:: in_between(c, len(held_out))])
    scorers = len({*c.trained, *c.watch})
    return {
        "evaluations": between + (2 if held_out else 0),
        "decodes": images,
        "forwards": images * c.eval_steps * (2 if guided else 1),
        "rewards": images * scorers,
    }


# ------------------------------------------------------------------------------------------------------------- bytes


def memory(
    c: Config, policy, plans: Collection[Plan], prompts: int, parts: Mapping[str, int], trained: int, texts: int
) -> dict[str, dict[str, int]]:
    """Bytes on the device of the rank with most prompts, and in its main memory.

    - each part of the pipeline: parameters x bytes of the precision, the transformer's as `quantize` says; with
      `offload` only the transformer is on the device;
    - adapter, gradients, ema: 4 bytes a trained parameter each; moments: 8 (AdamW), or 2 in 8 bits;
    - texts: the embeddings of the prompts and of the empty one, at the greatest length;
    - latents, float32: walks x (states + means of their steps) and finished ones, and three of each row learnt from
      (state, next state, mean);
    - rollout: the peak of one row's velocity (`mmalign.policy.meta.peak`) x rows of a forward: `batch`, or all routes
      if they are fewer;
    - replay: the peak of one row's velocity and gradients, with gradient checkpointing if it is on, x rows of a
      micro-batch; and that of rollout once more where the model without adapter is asked beside it.

    `total` has the larger of rollout and replay. Main memory: the finished images, float32, and the embeddings that are
    cached of the run's `texts` prompts.
    """
    shape, starts = prod(policy.latent_shape), prompts * c.seeds
    learnt, routes = (max(values) for values in zip(*((p.learnt, p.routes) for p in plans), strict=True))
    steps = max(plan.steps for plan in plans)
    rows = max(planner.cost_of(c.model_copy(update={"prompts_per_iteration": prompts}), p, False).rows for p in plans)
    held = starts * (learnt * (2 * steps + 1) + routes) + 3 * rows

    micro = min(c.micro_batch, ceil(rows / c.minibatches)) * (2 if c.objective == "rgdpo" else 1)
    drawn = meta.peak(policy, learn=False)
    policy.save_memory(gradients=c.gradient_checkpointing)
    learnt_row = meta.peak(policy, learn=True) + (drawn if c.measures_kl or c.objective == "rgdpo" else 0)

    kept = {name: int(count * WEIGHT[c.precision]) for name, count in parts.items()}
    kept["transformer"] = int(parts["transformer"] * WEIGHT[c.quantize or c.precision])
    idle = {name: own for name, own in kept.items() if c.offload and name != "transformer"}
    device = {name: own for name, own in kept.items() if name not in idle}
    device |= {"adapter": 4 * trained, "gradients": 4 * trained, "moments": MOMENTS[c.optimizer] * trained}
    text = size_of(loading.placeholder_texts(policy, 1).values())
    device |= {
        "ema": 4 * trained,
        "texts": (prompts + 1) * text,
        "latents": 4 * held * shape,
    }
    rollout, replay = min(c.batch, starts * routes) * drawn, micro * learnt_row
    whole = sum(device.values()) + max(rollout, replay)
    images = 4 * starts * routes * 3 * prod(policy.image_size)
    main = idle | {"images": images, "texts": min(c.text_cache, texts + 1) * text}
    return {"device": device | {"rollout": rollout, "replay": replay, "total": whole}, "main": main}


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(own.numel() * own.element_size() for own in tensors)


def disk(c: Config, held_out: int, size: tuple[int, int], trained: list[int]) -> dict[str, int]:
    """Bytes of a run's folder. A checkpoint has the adapter, its average (4 bytes a parameter each) and the optimiser's
    moments; the newest are kept, and the best. Images are counted as if PNG did not compress: at most."""
    checkpoint = (8 + MOMENTS[c.optimizer]) * sum(trained) + HEADERS * len(trained)
    kept = min(ceil(c.iterations / c.checkpoint_every), c.keep_checkpoints + 1)
    shown = c.iterations // c.eval_every + bool(c.iterations % c.eval_every) if c.eval_every else 1
    between = (c.iterations - 1) // c.eval_every if c.eval_every else 0
    sheets = SHEET * (2 + between) if held_out else 0
    images = 3 * prod(size) * (2 * held_out * c.eval_seeds + sheets + exhibit.COUNT * shown)
    return {"checkpoint": checkpoint, "checkpoints": kept, "images": images, "total": kept * checkpoint + images}


# -------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Speed:
    """Seconds of: a forward in rollout; a forward with its backward pass; a decoded image; an image shown to the
    trained rewards, and to those that are watched as well."""

    forward: float
    learn: float
    decode: float
    reward: float
    judge: float


def measure(run: Session, repeats: int = 3) -> Speed:
    """A few calls of the loaded model and scorers at the config's batch sizes, and the median of `repeats` after one
    that is not timed."""
    c, policy = run.config, run.policy
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, 0, c.seed)
    cond = policy.encode([p.text for p in prompts])
    plan = planner.plan_for(c, run.times, run.levels, planner.window_starts(c)[0])

    def velocity(rows: int) -> torch.Tensor:
        index = torch.arange(rows, device=policy.device) % len(prompts)
        x = torch.randn(rows, *policy.latent_shape, device=policy.device)
        return policy.velocity(x, torch.full((rows,), 0.5, device=policy.device), cond, index)

    def forward(rows: int) -> None:
        with torch.no_grad():
            velocity(rows)

    def learn(rows: int) -> None:
        velocity(rows).float().square().mean().backward()
        for p in policy.parameters():
            p.grad = None

    routes = len(prompts) * c.seeds * plan.routes
    rows, micro = min(c.batch, routes), min(c.micro_batch, ceil(run.cost.rows / c.minibatches))
    count = min(c.decode_batch, routes)
    x = torch.randn(count, *policy.latent_shape, device=policy.device)
    images, owners = policy.decode(x).cpu(), [prompts[i % len(prompts)] for i in range(count)]

    def shown(names: Iterable[str]) -> Callable[[], None]:
        return lambda: [run.scorers[name](images, owners) for name in names] and None

    per_row = 2 if getattr(policy, "true_guidance", c.guidance > 1) else 1
    return Speed(
        seconds(lambda: forward(rows), repeats) / rows / per_row,
        seconds(lambda: learn(micro), repeats) / micro / per_row,
        seconds(lambda: policy.decode(x).cpu(), repeats) / count,
        seconds(shown(c.trained), repeats) / count,
        seconds(shown(run.scorers), repeats) / count,
    )


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of `work`, which is done once before."""
    taken = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[repeats // 2]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def durations(c: Config, found: dict, speed: Speed) -> dict[str, float]:
    """Seconds of the slowest rank in an iteration and in all of them, and of the evaluations, dealt to ranks as well.

    Half of replay asks the model without adapter, without gradients, where `beta` or R-GDPO does. Nothing is taken to
    overlap; optimiser steps, text encoders, credit, files and communication are not timed.
    """
    plain = 0.5 if c.measures_kl or c.objective == "rgdpo" else 0.0
    replayed = plain * speed.forward + (1 - plain) * speed.learn

    def taken(own: Mapping[str, int]) -> float:
        shown = own["decodes"] * (speed.decode + speed.reward)
        return own["forwards"] * speed.forward + own["replay_forwards"] * replayed + shown

    held = found["evaluations"]
    shown = held["forwards"] * speed.forward + held["decodes"] * (speed.decode + speed.judge)
    run, after = max(map(taken, found["run_ranks"])), shown / len(found["ranks"])
    return {"iteration": run / c.iterations, "training": run, "evaluations": after, "run": run + after}
