"""Check on a GPU what the tests, which run on the CPU, cannot: rounding, kernels and memory at a model's real size.

    python scripts/check_gpu.py            # all checks, as one Markdown table; exit code 1 if one fails
    python scripts/check_gpu.py --only memory --only attention

`embedded` is the embedded model; `medium` the transformer of Stable Diffusion 3.5 Medium at 512 x 512, with the initial
weights of its class and random text embeddings of full length. Each row of the table says what is expected; the reasons
and the figures of one GPU are in docs/gpu.md.
"""

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from math import hypot, prod, sqrt
from typing import Annotated

import gpu_models
import resume_kinds
import torch
import typer
from benchmark_gpu import texts
from gpu_models import CLIP, GUIDANCE, IMAGES, STEPS, adapted, embedded, medium, rollout, velocity
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign import policy as policies
from mmalign.checks import estimate
from mmalign.checks.footprint import size_of
from mmalign.config import load as configs
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate
from mmalign.policy.pipeline import PipelinePolicy, stored
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.types import Transitions

RECIPE = "configs/sd35_flow_grpo_pickscore.yaml"
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
GIB = 2**30
Row = tuple[str, str, str, bool | None]  # what was checked, figure, what is expected, good (None: not available here)


def off(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def rounded(policy: PipelinePolicy) -> float:
    """How far off bfloat16 may be: some twelve operations of each block round by up to 2^-9, which is 2^-9 / sqrt(3) in
    root mean square, and guidance adds a multiple of one velocity to a multiple of another."""
    return 2**-9 * sqrt(12 * policy.pipe.transformer.config.num_layers / 3) * hypot(GUIDANCE, GUIDANCE - 1)


def rounding(make: Callable) -> Iterator[Row]:
    policy = adapted(make("bfloat16"))
    plain, half, most = velocity(adapted(make("float32"))), velocity(policy), rounded(policy)
    yield "bfloat16 against float32", f"velocity off by {off(half, plain):.2g}", f"{most:.2g}", off(half, plain) < most
    if make is embedded:
        changed = off(plain, velocity(adapted(make("float32", place="cpu"))))
        yield "float32 against the CPU", f"velocity off by {changed:.2g}", "0.001", changed < 1e-3


def replay(make: Callable) -> Iterator[Row]:
    for adapter, std in (("fresh", 0.0), ("trained", 0.02)):
        surrogate, rows = rollout(adapted(make("bfloat16"), std), measure=True)
        for micro in (IMAGES, 2):
            values = [surrogate(rows[slice(i, i + micro)])[1] for i in range(0, len(rows), micro)]
            ratio, kl = (max(float(v[key].abs().max()) for v in values) for key in ("log_ratio", "kl"))
            what = f"replay of {micro} rows after a rollout of {IMAGES}, {adapter} adapter"
            most, expected = (0, "0: the same kernels") if micro == IMAGES else (CLIP, f"{CLIP:g}, the clip range")
            yield what, f"log-ratio {ratio:.2g}, KL {kl:.2g}", expected, ratio <= most and (kl == 0) == (std == 0)


def checkpointing(make: Callable) -> Iterator[Row]:
    for dtype in ("float32", "bfloat16"):
        policy = adapted(make(dtype))
        plain, again = velocity(policy, learn=True), velocity(policy, learn=True)
        policy.save_memory(gradients=True)
        changed = off(velocity(policy, learn=True), plain)
        figure = f"gradient off by {changed:.2g}; without it, a second time, {off(again, plain):.2g}"
        yield f"gradient checkpointing, {dtype}", figure, "0.001", changed < 1e-3


def int8(make: Callable) -> Iterator[Row]:
    both = [make("bfloat16", quantize) for quantize in ("int8", None)]
    states = [policy.pipe.transformer.state_dict().values() for policy in both]
    sizes = [sum(part.nbytes for value in values for part in stored(value)) / GIB for values in states]
    changed = off(*(velocity(adapted(policy)) for policy in both))
    cosine = float(torch.cosine_similarity(*(velocity(policy, learn=True) for policy in both), dim=0))
    figure = f"velocity off by {changed:.2g}, gradient's cosine {cosine:.3f}, {sizes[0]:.2f} of {sizes[1]:.2f} GiB"
    yield "int8 against bfloat16", figure, "0.1, cosine 0.9", changed < 0.1 and cosine > 0.9


def attention(make: Callable) -> Iterator[Row]:
    policy = adapted(make("bfloat16"))
    plain = [velocity(policy, learn) for learn in (False, True)]
    most = rounded(policy)
    for backend in KERNELS:
        try:
            with sdpa_kernel(backend):
                changed = [off(velocity(policy, learn), v) for learn, v in zip((False, True), plain, strict=True)]
                began = time.perf_counter()
                velocity(policy, learn=True)  # returns when the GPU is done
                taken = time.perf_counter() - began
            figure = "velocity off by {:.2g}, gradient {:.2g}, {:.3f} s".format(*changed, taken)
            yield f"attention by {backend.name}", figure, f"{most:.2g}, as bfloat16", max(changed) < most
        except RuntimeError as error:
            yield f"attention by {backend.name}", " ".join(str(error).split())[:90], "", None


def compiled(make: Callable) -> Iterator[Row]:
    policy = adapted(make("bfloat16"))
    plain, began, most = velocity(policy), time.perf_counter(), rounded(policy)
    policy.compile()
    changed = off(velocity(policy), plain)
    figure = f"velocity off by {changed:.2g}, first call {time.perf_counter() - began:.0f} s"
    yield "torch.compile", figure, f"{most:.2g}, as bfloat16 against float32", changed < most


def peak(work: Callable[..., object], *arguments: object) -> int:
    """Bytes that `work` takes at most, beside what was allocated before it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(*arguments)
    return torch.cuda.max_memory_allocated() - before


def memory(make: Callable) -> Iterator[Row]:
    def row(what: str, taken: int, predicted: int) -> Row:
        good = abs(taken - predicted) < 0.05 * predicted + GIB / 16
        return what, f"{taken / GIB:.2f} GiB", f"{predicted / GIB:.2f} GiB, within 5 % and 64 MiB", good

    def learn(surrogate: Surrogate, rows: Transitions) -> None:
        surrogate(rows)[0].sum().backward()

    for how, recompute in (("replay", "false"), ("replay with checkpointing", "true")):
        settings = ["batch=1", "micro_batch=1", "objective=grpo", f"gradient_checkpointing={recompute}"]
        predicted = estimate.estimate(configs.load(RECIPE, settings))["memory"]["device"]
        before, policy = torch.cuda.memory_allocated(), adapted(make("bfloat16"))
        taken = torch.cuda.memory_allocated() - before
        yield row("weights and adapter", taken, predicted["transformer"] + predicted["adapter"])
        policy.save_memory(gradients=recompute == "true")
        cond = texts(policy, IMAGES)
        beside = size_of([*cond.prompts.values(), *cond.empty.values()])
        beside += 4 * IMAGES * (2 * STEPS + 2) * prod(policy.latent_shape)  # states, means, finished ones
        del cond
        for rows in (1, 4, 8):
            yield row(f"rollout, {rows} rows", peak(rollout, policy, rows), rows * predicted["rollout"] + beside)
        surrogate, steps = rollout(policy)
        learn(surrogate, steps[slice(0, 1)])  # gradients exist, as they do after the first micro-batch
        for rows in (1, 4, 8, 32) if recompute == "true" else (1, 4, 8):
            yield row(f"{how}, {rows} rows", peak(learn, surrogate, steps[slice(0, rows)]), rows * predicted["replay"])
        del policy, surrogate, steps
        gc.collect()


def out_of_memory(make: Callable) -> Iterator[Row]:
    policy = adapted(make("bfloat16"))
    surrogate, rows = rollout(policy)

    def learn(fit: AdaptiveBatch) -> Tensor:
        update(
            policy.parameters(), torch.optim.SGD(policy.parameters(), 0.0), rows, surrogate, epochs=1, minibatches=1,
            micro_batch=fit, max_grad_norm=float("inf"), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).cpu().double()

    plain, fit = learn(AdaptiveBatch(4)), AdaptiveBatch(32)
    again = off(learn(AdaptiveBatch(4)), plain)
    room = 1.5 * peak(learn, AdaptiveBatch(4))
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + room
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        changed = off(learn(fit), plain)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    figure = f"32 rows became {fit.rows} in {limit / GIB:.1f} GiB, gradient off by {changed:.2g}; "
    most = 1e-3 + 2 * again
    yield (
        "halving when CUDA is out of memory", figure + f"of 4 rows from the start, a second time, {again:.2g}",
        f"fewer than 32, {most:.2g}", fit.rows < 32 and changed < most,
    )  # fmt: skip


def doctor(make: Callable) -> Iterator[Row]:
    command = [sys.executable, "-m", "mmalign", "doctor", "configs/quickstart.yaml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = json.loads(done.stdout) if done.stdout.startswith("[") else []  # nothing where the command itself failed
    bad = [f"{row['check']}: {row['result']}" for row in rows if row["good"] is False]
    if not rows:
        bad = [f"exit code {done.returncode}: {' '.join(done.stderr.split())[-150:]}"]
    figure = "; ".join(bad) or f"{len(rows)} checks, none red"
    yield "mmalign doctor configs/quickstart.yaml", figure, "none red", not bad


def trained_runs(make: Callable) -> Iterator[Row]:
    for name, figure, good in resume_kinds.results([*resume_kinds.KINDS]):
        yield f"run: {name}", figure, "moves, resumes to the bit", good


EMBEDDED = {
    "doctor": doctor, "runs": trained_runs, "rounding": rounding, "replay": replay, "checkpointing": checkpointing,
    "int8": int8, "attention": attention, "compiled": compiled,
}  # fmt: skip
MEDIUM = {name: EMBEDDED[name] for name in ("rounding", "replay", "checkpointing", "int8", "attention")}
NEEDS_CUDA = {"memory": memory, "out_of_memory": out_of_memory}
NAMES = [*EMBEDDED, *NEEDS_CUDA]


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(NAMES)}")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="narrow layers on the CPU, to try this program")] = False,
) -> None:
    gpu_models.device, names = (
        "cpu" if cpu else "cuda",
        only or [name for name in NAMES if not cpu or name not in NEEDS_CUDA],
    )
    if {*names} - {*NAMES} or (not torch.cuda.is_available() and (not cpu or {*names} & {*NEEDS_CUDA})):
        print(f"these checks need a GPU, and names of {', '.join(NAMES)}", file=sys.stderr)
        raise typer.Exit(2)
    policies.quiet()
    print(f"torch {torch.__version__}, {'CPU' if cpu else torch.cuda.get_device_name()}\n")
    print("| model | check | figure | expected at most | good |", "|---|---|---|---|---|", sep="\n", flush=True)
    verdicts = []
    for make, checks in ((embedded, EMBEDDED), (medium, MEDIUM | NEEDS_CUDA)):
        for name in (name for name in checks if name in names):
            try:
                for what, figure, expected, good in checks[name](make):
                    verdicts.append(good)
                    word = {True: "yes", False: "NO", None: "not here"}[good]
                    print(f"| {make.__name__} | {what} | {figure} | {expected} | {word} |", flush=True)
            except Exception as error:  # the other checks still run
                verdicts.append(False)
                print(f"| {make.__name__} | {name} | {str(error)[:150]!r} | no error | NO |", flush=True)
                traceback.print_exc()
            gc.collect()
            if not cpu:
                torch.cuda.empty_cache()
    raise typer.Exit(1 if False in verdicts else 0)


if __name__ == "__main__":
    typer.run(main)
