"""Check on a GPU what the tests, which run on the CPU, cannot: rounding, kernels and memory at a model's real size.

    python scripts/check_gpu.py            # all checks, as one Markdown table; exit code 1 if one fails
    python scripts/check_gpu.py --only memory --only attention

`embedded` is the embedded model; `medium` the transformer of Stable Diffusion 3.5 Medium at 512 x 512, with the initial
weights of its class and random text embeddings of full length. Bounds: velocities in bfloat16, and of other attention,
5 %; of int8 weights 10 %; float32 against the CPU, gradients with checkpointing or smaller micro-batches, 0.1 %;
log-ratios of a replay a tenth of the clip range; peaks of memory 15 % of what `mmalign estimate` predicts; runs 0.
"""

import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from kill_and_resume import outcome
from rich.console import Console
from torch import Tensor

from mmalign import policy as policies, run as runs
from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.loss import Clipped
from mmalign.learn.update import update
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy import loading, meta
from mmalign.policy.pipeline import Conditioning, PipelinePolicy, stored
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.types import Transitions

RECIPE = "configs/sd35_flow_grpo_pickscore.yaml"
BACKENDS = ("_native_flash", "_native_efficient", "_native_cudnn", "_native_math", "flash", "_flash_3", "xformers")
SMALL = {"num_layers": 2, "num_attention_heads": 4, "caption_projection_dim": 256, "pos_embed_max_size": 64}
RUN = "iterations=2 warmup=0 cooldown=0 prompts_per_iteration=2 checkpoint_every=1 eval_every=0 held_out=null watch=[]"
CLIP, GUIDANCE, IMAGES, STEPS, GIB = 1e-4, 4.5, 8, 5, 2**30
Row = tuple[str, str, bool | None]  # what was checked, the figure, whether it is good (None: not available here)
device, small = "cuda", False  # the options of the command line


def embedded(dtype: str, quantize: str | None = None, place: str = "") -> PipelinePolicy:
    return policies.load("assets/tiny_sd3", dtype=dtype, device=place or device, guidance=GUIDANCE, quantize=quantize)


def medium(dtype: str, quantize: str | None = None) -> PipelinePolicy:
    model = estimate.folder("stabilityai/stable-diffusion-3.5-medium")
    policy = meta.load(model, dtype=dtype, guidance=GUIDANCE, size=(128, 128) if small else (512, 512))
    torch.manual_seed(0)
    with torch.device(device):
        empty = policy.pipe.transformer
        transformer = type(empty).from_config({**empty.config} | (SMALL if small else {}))
    transformer = transformer.to(getattr(torch, dtype)).requires_grad_(False).eval()
    if quantize:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(transformer, Int8WeightOnlyConfig())
    policy.pipe.register_modules(transformer=transformer)
    return policy


def adapted(policy: PipelinePolicy, std: float = 0.02) -> PipelinePolicy:
    """With an adapter that changes the velocity, unless `std` is 0."""
    policy.attach_lora(32, 64.0, None, 0)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(std * torch.randn(p.shape, generator=draws).to(p))
    return policy


def texts(policy: PipelinePolicy, count: int) -> Conditioning:
    if policy.pipe.text_encoder.device.type != "meta":
        return policy.encode([f"a red circle {i}" for i in range(count)])
    draws = torch.Generator().manual_seed(1)
    empty = loading.placeholder_texts(policy, count + 1)
    real = {name: torch.randn(v.shape, generator=draws).to(policy.device, v.dtype) for name, v in empty.items()}
    return Conditioning(*({name: v[part] for name, v in real.items()} for part in (slice(-1), slice(-1, None))))


def starts(policy: PipelinePolicy, rows: int) -> Tensor:
    return torch.stack([gaussian(policy.latent_shape, i) for i in range(rows)]).to(policy.device)


def velocity(policy: PipelinePolicy, learn: bool = False, rows: int = 2) -> Tensor:
    """The velocity, or the adapter's gradient of its mean square, on the CPU."""
    with torch.set_grad_enabled(learn):
        x, index = starts(policy, rows), torch.arange(rows, device=policy.device)
        v = policy.velocity(x, torch.linspace(0.9, 0.1, rows).to(x), texts(policy, rows), index).float()
    if not learn:
        return v.cpu()
    parts = torch.autograd.grad(v.square().mean(), policy.parameters(), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts]).cpu()


def rollout(policy: PipelinePolicy, batch: int = IMAGES, measure: bool = False) -> tuple[Surrogate, Transitions]:
    """The stochastic steps of a rollout, and the loss of their replay."""
    plan, index = plans.sde(policy.times(STEPS), FlowSde(0.7)), torch.arange(IMAGES, device=policy.device)
    cond = texts(policy, IMAGES)
    paths = sample(
        policy.velocity, starts(policy, IMAGES), cond, index, plan,
        lambda *key: gaussian(policy.latent_shape, seed_of(*key)), batch,
    )  # fmt: skip
    rows = transitions(paths, torch.ones(IMAGES, STEPS, 1, 1, device=policy.device))
    return Surrogate(policy, cond, plan.kernel, plan.t_max, Clipped(CLIP), measure=measure), rows


def off(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def rounding(make: Callable) -> Iterator[Row]:
    plain, half = (velocity(adapted(make(dtype))) for dtype in ("float32", "bfloat16"))
    yield "bfloat16 against float32", f"velocity off by {off(half, plain):.2g}", off(half, plain) < 0.05
    if make is embedded:
        there = velocity(adapted(make("float32", place="cpu")))
        yield "float32 against the CPU", f"velocity off by {off(plain, there):.2g}", off(plain, there) < 1e-3


def replay(make: Callable) -> Iterator[Row]:
    for adapter, std in (("fresh", 0.0), ("trained", 0.02)):
        surrogate, rows = rollout(adapted(make("bfloat16"), std), measure=True)
        for micro in (IMAGES, 2):
            values = [surrogate(rows[slice(i, i + micro)])[1] for i in range(0, len(rows), micro)]
            ratio, kl = (max(float(v[key].abs().max()) for v in values) for key in ("log_ratio", "kl"))
            what = f"replay of {micro} rows after a rollout of {IMAGES}, {adapter} adapter"
            yield what, f"log-ratio {ratio:.2g}, KL {kl:.2g}", ratio <= CLIP / 10 and (kl == 0) == (std == 0)


def checkpointing(make: Callable) -> Iterator[Row]:
    for dtype in ("float32", "bfloat16"):
        policy = adapted(make(dtype))
        plain, again = velocity(policy, learn=True), velocity(policy, learn=True)
        policy.save_memory(gradients=True)
        changed = off(velocity(policy, learn=True), plain)
        figure = f"gradient off by {changed:.2g}; without it, a second time, {off(again, plain):.2g}"
        yield f"gradient checkpointing, {dtype}", figure, changed < 1e-3


def int8(make: Callable) -> Iterator[Row]:
    both = [make("bfloat16", quantize) for quantize in ("int8", None)]
    states = [policy.pipe.transformer.state_dict().values() for policy in both]
    sizes = [sum(part.nbytes for value in values for part in stored(value)) / GIB for values in states]
    changed = off(*(velocity(adapted(policy)) for policy in both))
    cosine = float(torch.cosine_similarity(*(velocity(policy, learn=True) for policy in both), dim=0))
    figure = f"velocity off by {changed:.2g}, gradient's cosine {cosine:.3f}, {sizes[0]:.2f} of {sizes[1]:.2f} GiB"
    yield "int8 against bfloat16", figure, changed < 0.1 and cosine > 0.9


def attention(make: Callable) -> Iterator[Row]:
    policy = adapted(make("bfloat16"))
    plain = [velocity(policy, learn) for learn in (False, True)]
    for backend in BACKENDS:
        try:
            policy.pipe.transformer.set_attention_backend(backend)
            changed = [off(velocity(policy, learn), value) for learn, value in zip((False, True), plain, strict=True)]
            began = time.perf_counter()
            velocity(policy, learn=True)  # returns when the GPU is done
            figure = "velocity off by {:.2g}, gradient {:.2g}, {:.3f} s".format(*changed, time.perf_counter() - began)
            yield f"attention {backend}", figure, max(changed) < 0.05
        except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
            yield f"attention {backend}", " ".join(str(error).split())[:90], None


def compiled(make: Callable) -> Iterator[Row]:
    policy = adapted(make("bfloat16"))
    plain, began = velocity(policy), time.perf_counter()
    policy.compile()
    changed = off(velocity(policy), plain)
    figure = f"velocity off by {changed:.2g}, first call {time.perf_counter() - began:.0f} s"
    yield "torch.compile", figure, changed < 0.05


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
        figure = f"{taken / GIB:.2f} GiB, predicted {predicted / GIB:.2f}: {taken / predicted:.2f} times that"
        return what, figure, abs(taken / predicted - 1) < 0.15

    def learn(surrogate: Surrogate, rows: Transitions) -> None:
        surrogate(rows)[0].sum().backward()

    for how, recompute in (("replay", "false"), ("replay with checkpointing", "true")):
        settings = ["batch=1", "micro_batch=1", "objective=grpo", f"gradient_checkpointing={recompute}"]
        predicted = estimate.estimate(configs.load(RECIPE, settings))["memory"]["device"]
        before, policy = torch.cuda.memory_allocated(), adapted(make("bfloat16"))
        taken = torch.cuda.memory_allocated() - before
        yield row("weights and adapter", taken, predicted["transformer"] + predicted["adapter"])
        policy.save_memory(gradients=recompute == "true")
        for rows in (1, 4, 8):
            yield row(f"rollout, {rows} rows", peak(rollout, policy, rows), rows * predicted["rollout"])
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
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).cpu()

    plain, fit = learn(AdaptiveBatch(4)), AdaptiveBatch(32)
    room = 1.5 * peak(learn, AdaptiveBatch(4))
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + room
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        changed = off(learn(fit), plain)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    figure = f"32 rows became {fit.rows} in {limit / GIB:.1f} GiB, gradient off by {changed:.2g}"
    yield "halving when CUDA is out of memory", figure, fit.rows < 32 and changed < 1e-3


def doctor(make: Callable) -> Iterator[Row]:
    command = [sys.executable, "-m", "mmalign", "doctor", "configs/quickstart.yaml", "--json"]
    rows = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)
    bad = [f"{row['check']}: {row['result']}" for row in rows if row["good"] is False]
    yield "mmalign doctor configs/quickstart.yaml", "; ".join(bad) or f"{len(rows)} checks", not bad


def resumed(make: Callable) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as place:
        c, quiet = configs.load("configs/quickstart.yaml", RUN.split()), Console(quiet=True)
        whole, again, cut = (Path(place, name) for name in ("whole", "again", "resumed"))
        for out in (whole, again):
            runs.train(c.model_copy(update={"out": str(out)}), console=quiet)
        shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("000002", "report.html"))
        runs.train(c.model_copy(update={"out": str(cut)}), resume=True, console=quiet)
        expected = outcome(whole)
        for out in (again, cut):
            result = outcome(out)
            different = [name for name in expected if result[name] != expected[name]]
            yield f"run of two iterations, {out.name}", f"different: {', '.join(different) or 'none'}", not different


EMBEDDED = (doctor, resumed, rounding, replay, checkpointing, int8, attention, compiled)
MEDIUM = (rounding, replay, checkpointing, int8, attention, memory, out_of_memory, compiled)
NAMES = [check.__name__ for check in dict.fromkeys((*EMBEDDED, *MEDIUM))]


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(NAMES)}")] = None,
    on: Annotated[str, typer.Option("--device", hidden=True)] = "cuda",
    narrow: Annotated[bool, typer.Option("--small", hidden=True, help="narrow layers, to try this program")] = False,
) -> None:
    global device, small
    device, small, names = on, narrow, only or [name for name in NAMES if on == "cuda" or name not in NAMES[-2:]]
    if {*names} - {*NAMES} or (not torch.cuda.is_available() and (on == "cuda" or {*names} & {*NAMES[-2:]})):
        print(f"these checks need a GPU, and names of {', '.join(NAMES)}", file=sys.stderr)
        raise typer.Exit(2)
    policies.quiet()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if on == 'cuda' else 'CPU'}\n")
    print("| model | check | figure | good |", "|---|---|---|---|", sep="\n", flush=True)
    verdicts = []
    for make, checks in ((embedded, EMBEDDED), (medium, MEDIUM)):
        for check in (check for check in checks if check.__name__ in names):
            try:
                for what, figure, good in check(make):
                    verdicts.append(good)
                    word = {True: "yes", False: "NO", None: "not here"}[good]
                    print(f"| {make.__name__} | {what} | {figure} | {word} |", flush=True)
            except Exception as error:  # the other checks still run
                verdicts.append(False)
                print(f"| {make.__name__} | {check.__name__} | {str(error)[:150]!r} | NO |", flush=True)
                traceback.print_exc()
            gc.collect()
            torch.cuda.empty_cache()
    raise typer.Exit(1 if False in verdicts else 0)


if __name__ == "__main__":
    typer.run(main)
