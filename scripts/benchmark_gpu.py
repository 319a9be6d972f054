"""Rollout and training speed at a model's real size with random weights, relative to the bare transformer.

    python scripts/benchmark_gpu.py                   # Stable Diffusion 3.5 Medium, 512 x 512, T = 10, LoRA 32, bf16
    python scripts/benchmark_gpu.py --model black-forest-labs/FLUX.1-dev --attention xformers --attention flash

Speed does not depend on the values of weights, so none are loaded: the architecture is built from its configs, filled
at random, and given random text embeddings of full length. Without a GPU the embedded model is measured instead, and
the first line reports it. For each attention back end, with and without torch.compile:

- images/s: finished latents per second of rollout (`sample`, every step stochastic, guidance as given), not decoded;
- s/step: seconds of one optimiser step's replay, forward and backward, of as many transitions;
- share: the time the bare transformer takes for the same forwards (and backwards), over that of rollout and replay;
- peak: most GiB allocated at once; of the weights, only the transformer's are included.
"""

import json
import statistics
import time
from typing import Annotated

import torch
import typer

from mmalign import policy as policies
from mmalign.checks import estimate
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.loss import Clipped
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy import loading, meta
from mmalign.policy.pipeline import Conditioning, PipelinePolicy
from mmalign.sampling.kernels import Cps
from mmalign.seeds import gaussian, seed_of
from mmalign.training.microbatch import AdaptiveBatch

MODEL = "stabilityai/stable-diffusion-3.5-medium"


def main(
    model: Annotated[str, typer.Option(help="hub id with a folder in assets/architectures")] = MODEL,
    side: Annotated[int, typer.Option(help="pixels")] = 512,
    steps: Annotated[int, typer.Option(help="T")] = 10,
    guidance: float = 4.5,
    rank: Annotated[int, typer.Option(help="of the LoRA; alpha is twice that")] = 32,
    images: Annotated[int, typer.Option(help="trajectories of a rollout")] = 8,
    micro: Annotated[int, typer.Option(help="rows of a forward and backward")] = 4,
    repeats: int = 3,
    attention: Annotated[list[str] | None, typer.Option(help="back ends beside the native one")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="with torch.compile too")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="gradient checkpointing")] = False,
) -> None:
    policies.quiet()
    here = torch.cuda.is_available()
    if here:
        print(f"{model} with random weights, {side} x {side}, bfloat16, on {torch.cuda.get_device_name()}")
    else:
        print("no GPU here: the embedded model instead, float32, on the CPU; the figures say nothing of real models")
    print("| attention | compiled | images/s | s/step | share of the bare transformer | peak GiB |")
    print("|---|---|---|---|---|---|")
    for backend in ("native", *(attention or ())):
        for compile_it in (False, True) if compiled else (False,):
            policy = (
                randomly(model, side, guidance, "cuda") if here else policies.load("assets/tiny_sd3", guidance=guidance)
            )
            policy.attach_lora(rank, 2.0 * rank, None, 0)
            policy.save_memory(gradients=checkpointing)
            policy.set_attention(backend)
            if compile_it:
                policy.compile()
            row = measure(policy, steps, images, micro, repeats)
            print(
                f"| {backend} | {'yes' if compile_it else 'no'} | {row['images_per_second']:.3g} | "
                f"{row['seconds_per_step']:.3g} | {row['share']:.2f} | {row['peak']:.1f} |"
            )
            print(json.dumps({"attention": backend, "compiled": compile_it} | row))
            del policy


def randomly(model: str, side: int, guidance: float, device: str):
    """The transformer at its real size, in bfloat16; everything else stays without weights."""
    policy = meta.load(estimate.folder(model), dtype="bfloat16", guidance=guidance, size=(side, side))
    transformer = policy.pipe.transformer.to_empty(device=device)
    with torch.no_grad():
        for p in (*transformer.parameters(), *transformer.buffers()):
            p.normal_(std=0.02)
    return policy


def texts(policy: PipelinePolicy, count: int) -> Conditioning:
    """Embeddings of prompts and of the empty one; random and of full length where there is no text encoder."""
    if policy.pipe.text_encoder is not None and policy.pipe.text_encoder.device.type != "meta":
        return policy.encode([f"a red circle {i}" for i in range(count)])
    embeddings, draws = {}, torch.Generator().manual_seed(1)
    for name, value in loading.placeholder_texts(policy, count + 1).items():
        real = torch.ones(value.shape) if name == "mask" else torch.randn(value.shape, generator=draws)
        embeddings[name] = real.to(policy.device, value.dtype)
    return Conditioning(*({n: v[part] for n, v in embeddings.items()} for part in (slice(-1), slice(-1, None))))


def measure(policy, steps: int, images: int, micro: int, repeats: int) -> dict[str, float]:
    device = policy.device
    cond, index = texts(policy, images), torch.arange(images, device=device)
    start = torch.stack([gaussian(policy.latent_shape, i) for i in range(images)]).to(device)
    plan = plans.sde(policy.times(steps), Cps(0.8))
    paths = None

    def draw(*key):
        return gaussian(policy.latent_shape, seed_of(*key))

    def roll_out():
        nonlocal paths
        paths = sample(policy.velocity, start, cond, index, plan, draw, batch=images)

    roll_out()
    rows = transitions(paths, torch.ones(images, steps, 1, 1, device=device))[slice(0, 4 * micro)]
    replay = Surrogate(policy, cond, plan.kernel, plan.t_max, Clipped(1e-4))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)

    def learn():
        update(
            policy.parameters(), optimizer, rows, replay, epochs=1, minibatches=1,
            micro_batch=AdaptiveBatch(micro), max_grad_norm=1.0, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    times = paths.tree.t.to(device)

    def forwards():
        with torch.no_grad():
            for k in range(steps):
                policy.velocity(paths.x[:, k], times[:, k], cond, index)

    def backwards():
        for part in torch.arange(len(rows), device=device).split(micro):
            some = rows[part]
            v = policy.velocity(some.x, some.t, cond, some.index)
            torch.autograd.grad(v.float().square().mean(), policy.parameters(), allow_unused=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole = [seconds(work, repeats) for work in (roll_out, learn)]
    bare = [seconds(work, repeats) for work in (forwards, backwards)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "images_per_second": images / whole[0],
        "seconds_per_step": whole[1],
        "share": sum(bare) / sum(whole),
        "share_rollout": bare[0] / whole[0],
        "share_learning": bare[1] / whole[1],
        "transitions_per_step": len(rows),
        "peak": peak,
    }


def seconds(work, repeats: int) -> float:
    """The median, after one run that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    typer.run(main)
