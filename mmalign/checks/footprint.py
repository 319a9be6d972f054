"""The bytes of a run: on the device of a rank, in its main memory, and on disk.

Bytes are those of tensors that are known to exist; what makes up each figure stands with its function. Not covered:
fragmentation of the allocator, activations of autoencoder and text encoders, reward models, what CUDA and libraries
take themselves (one to two GiB a process), and the communication between GPUs.
"""

from collections.abc import Collection, Iterable, Mapping
from math import ceil, prod

import torch

from mmalign.config.schema import Config
from mmalign.evaluation.evaluate import SHEET, STRIP
from mmalign.policy import loading, lora, meta
from mmalign.policy.family import Family
from mmalign.training import planning, rollout as rollouts, snapshots
from mmalign.types import Plan

WEIGHT = {"float32": 4, "bfloat16": 2, "int8": 1, "llm_int8": 1, "nf4": 0.5}  # bytes of a frozen weight
MOMENTS = {"adamw": 8, "adamw8bit": 2}  # bytes the optimiser keeps of a trained parameter
HEADERS = 430  # bytes of a checkpoint's headers for each trained matrix: names, shapes and counters in three files


def memory(
    c: Config, policy: Family, plans: Collection[Plan], prompts: int, parts: Mapping[str, int], trained: int, texts: int
) -> dict[str, dict[str, int]]:
    """Bytes on the device of the rank with most prompts, and in its main memory.

    - each part of the pipeline: parameters x bytes of the precision, the transformer's as `quantize` says, and its
      buffers, such as a table of positions; with `offload` only the transformer is on the device;
    - adapter, gradients, ema: 4 bytes a trained parameter each, and so `old`, the adapter that draws the images where
      it lags behind; moments: 8 (AdamW), or 2 in 8 bits; adapter, gradients and moments twice with a credit that
      learns rewards of steps;
    - texts: the embeddings of the prompts and of the empty one, at the greatest length;
    - latents, float32: finished ones, of trajectories the states and means that the update reads
      (`mmalign.training.planning.read`), and those of each row trained on: state, next state and mean, or images, noise
      and the velocities they are compared with;
    - rollout: the peak of one row's velocity (`mmalign.policy.meta.peak`) x rows of a forward: `batch`, or all routes
      if they are fewer; with float32 weights also the adapted ones once more, which have the adapter in them;
    - replay: the peak of one row's velocity and gradients, with gradient checkpointing if it is on, x rows of a
      micro-batch; and that of rollout once more where the model without adapter is evaluated beside it. With `reuse`
      it is held for every step that is trained on, from the rollout on.

    `total` has the larger of rollout and replay. Main memory: the images that are decoded and scored at once, float32
    (all of them with an extension; those in flight with `rollout_parts`), the embeddings cached of
    the run's `texts` prompts, and with a value head the features of all ranks' states, of this iteration and of those
    that it learns from again, twice: they are joined for a fit.
    """
    shape, starts = prod(policy.latent_shape), prompts * c.seeds
    trained_routes, routes = (max(values) for values in zip(*((p.trained, p.routes) for p in plans), strict=True))
    read = planning.read(c, plans)
    learnt = {part: prompts * max(planning.rows_of(c, p, part) for p in plans) for part in c.objective.summands}
    replayed = prompts * sum(max(planning.forwards_of(c, p, part) for p in plans) for part in c.objective.summands)
    held = starts * (trained_routes * (len(read.states) + len(read.means)) + routes)
    held += sum(part.stored(c.epochs * c.minibatches) * count for part, count in learnt.items())
    scouts = 0 if c.scouts is None else prompts * c.scouts.starts(c.seeds)
    held = max(held, scouts)

    micro = replayed if c.reuse else min(c.micro_batch, ceil(replayed / c.minibatches)) * c.objective.width
    drawn = meta.peak(policy, learn=False)
    policy.save_memory(gradients=c.gradient_checkpointing)
    learnt_row = meta.peak(policy, learn=True) + (drawn if c.measures_kl else 0)

    widths = dict.fromkeys(parts, WEIGHT[c.precision]) | {"transformer": WEIGHT[c.quantize or c.precision]}
    modules = policy.pipe.components
    weights = {name: int(count * widths[name]) + size_of(modules[name].buffers()) for name, count in parts.items()}
    idle = {name: size for name, size in weights.items() if c.offload and name != "transformer"}
    device = {name: size for name, size in weights.items() if name not in idle}
    adapters = 2 if c.credit is not None and c.credit.learner is not None else 1
    sizes = {"adapter": 4, "gradients": 4, "moments": MOMENTS[c.optimizer]}
    device |= {name: size * adapters * trained for name, size in sizes.items()}
    text = size_of(loading.placeholder_texts(policy, 1).values())
    device |= {"old": 4 * trained} if c.objective.lag.most else {}
    device |= {} if c.objective.guide is None else {"guide": 4 * trained}  # as if it were of the same rank
    device |= {
        "ema": 4 * trained,
        "texts": (prompts + 1) * text,
        "latents": 4 * held * shape,
    }
    rollout, replay = min(c.batch, max(starts * routes, scouts)) * drawn, micro * learnt_row
    if c.precision == "float32" and not c.quantize:
        rollout += 4 * sum(layer.base_layer.weight.numel() for layer in lora.adapted(policy.pipe.transformer))
    total = sum(device.values()) + max(rollout, replay)
    image, most = 4 * 3 * prod(policy.image_size), max(starts * routes, scouts)
    together = max(rollouts.DECODED // image, most // max(1, prompts))
    shown = most if c.extend else min(most, together * (1 + rollouts.AHEAD if c.rollout_parts > 1 else 1))
    main = idle | {"images": image * shown, "texts": min(c.text_cache, texts + 1) * text}
    if observer := c.credit and c.credit.observer:
        main["features"] = 2 * (1 + observer.replay) * observed(c, plans, meta.features(policy, observer.blocks))
    return {"device": device | {"rollout": rollout, "replay": replay, "total": total}, "main": main}


def observed(c: Config, plans: Collection[Plan], width: int) -> int:
    """Bytes of an iteration's states as a value head keeps them, on all ranks: features, time, reward and group."""
    states = max(plan.trained * plan.steps for plan in plans) * c.prompts_per_iteration * c.seeds
    return 4 * (width + 4) * states


def values(c: Config, policy: Family, plans: Collection[Plan]) -> int:
    """Bytes of a value head in a checkpoint: its weights with two moments each, and the states it learns from again."""
    observer = c.credit and c.credit.observer
    if observer is None:
        return 0
    width = meta.features(policy, observer.blocks)
    weights = 12 * (observer.width * (width + 3) + 3)
    return weights + 16 * width + min(c.iterations, observer.replay) * observed(c, plans, width)


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def disk(c: Config, held_out: int, size: tuple[int, int], trained: list[int], values: int = 0) -> dict[str, int]:
    """Bytes of a run's folder. A checkpoint has the adapter, its average (4 bytes a parameter each), the optimiser's
    moments, and the `values` bytes of a value head; the newest are kept, and the best. Images are counted as if PNG did
    not compress: at most."""
    checkpoint = (8 + MOMENTS[c.optimizer]) * sum(trained) + HEADERS * len(trained) + values
    if c.credit is not None and c.credit.learner is not None:  # another adapter and its moments
        checkpoint += (4 + MOMENTS[c.optimizer]) * sum(trained) + HEADERS * len(trained) * 2 // 3
    saved = min(ceil(c.iterations / c.checkpoint_every), c.keep_checkpoints + 1)
    shown = c.iterations // c.eval_every + bool(c.iterations % c.eval_every) if c.eval_every else 1
    between = (c.iterations - 1) // c.eval_every if c.eval_every else 0
    sheets = SHEET * (2 + between) + STRIP * between if held_out else 0
    judged = c.refresh.times(c.iterations) * c.refresh.prompts * c.refresh.seeds if c.refresh else 0
    images = 3 * prod(size) * (2 * held_out * c.eval_seeds + sheets + judged + snapshots.COUNT * shown)
    return {"checkpoint": checkpoint, "checkpoints": saved, "images": images, "total": saved * checkpoint + images}
