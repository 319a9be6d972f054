"""The cost of an iteration relative to the bare network, its growth, and the cost of starting.

    python scripts/benchmark.py configs/quickstart.yaml      # one config, as JSON
    OMP_NUM_THREADS=1 python scripts/benchmark.py --all      # all tables, into docs/benchmark.md

Ratio = processor time of one iteration / processor time of the bare transformer (adapter attached, gradients for the
adapter only) for the same number of forwards and of forwards with backward, each at its best batch size, in the tables
at 32. 1 would mean that sampling, decoding, scoring, credit and the optimiser are free. Iteration and network are
measured in one process, each config in one of its own. Processor time is that of all threads; waiting for a core is not
in it.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmalign import policy as policies, train as trainer
from mmalign.config import load as configs
from mmalign.training import setup
from mmalign.training.session import Session
from reward_models import files

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/benchmark.md"
QUICK, BRANCH = "configs/quickstart.yaml", "configs/tiny_branch.yaml"
ON_STEPS = ["plan=sde", "seeds=6", "prompts_per_iteration=4"]
METHODS = {  # objective and credit -> config and settings
    "grpo, branch": (BRANCH, ["prompts_per_iteration=2"]),
    "nft": (QUICK, []),
    "grpo, gain": (BRANCH, [*ON_STEPS, "credit=gain"]),
    "awm": (QUICK, ["objective=awm"]),
    "grpo, terminal": (BRANCH, [*ON_STEPS, "credit=terminal"]),
}
BESIDE = {  # what is compared with the network at its best batch
    "`configs/quickstart.yaml`": (QUICK, []),
    "`configs/tiny_branch.yaml`": (BRANCH, []),
    '"grpo, gain" of the table above': METHODS["grpo, gain"],
}
BATCHES = (32, 64, 128, 256)
GROWTH = {  # what grows -> its values, and the setting of a value
    "images": ((16, 32, 64), lambda images: [f"prompts_per_iteration={images // 8}"]),
    "steps": ((2, 4, 8), lambda steps: [f"steps={steps}"]),
}
STARTS = {  # what is started -> arguments of python
    "`import torch, diffusers`": ["-c", "import torch, diffusers"],
    "the class of one pipeline": ["-c", "import torch; from diffusers import StableDiffusion3Pipeline"],
    "the same without bitsandbytes and torchao": [
        "-c",
        "import sys; sys.modules.update(bitsandbytes=None, torchao=None)\n"
        "import torch; from diffusers import StableDiffusion3Pipeline",
    ],
    "`mmalign estimate`": ["-m", "mmalign", "estimate", QUICK],
    "`mmalign score`, 24 pictures, `shapes`": [
        "-m", "mmalign", "score", "assets/pictures", "--rewards", "shapes", "--out", "{folder}/scores.jsonl",
    ],
    "`mmalign sample`, one image": ["-m", "mmalign", "sample", "a circle", "--out", "{folder}/images"],
}  # fmt: skip


def seconds(function: Callable[[], Any], repeats: int) -> list[float]:
    """The processor time of each of the calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return times


def bare(policy: Any, cond: Any, size: int, backward: bool, repeats: int) -> float:
    """Seconds per network forward (and backward), in batches of `size` latents; the median."""
    x = torch.randn(size, *policy.latent_shape, device=policy.device)
    t, index = torch.rand(size, device=policy.device), torch.zeros(size, dtype=torch.long, device=policy.device)
    parameters = policy.parameters()

    def run() -> None:
        if not backward:
            with torch.no_grad():
                policy.velocity(x, t, cond, index)
            return
        torch.autograd.grad(policy.velocity(x, t, cond, index).float().square().mean(), parameters, allow_unused=True)

    policy.counts.clear()
    run()
    forwards = policy.counts["forwards"]
    return statistics.median(seconds(run, repeats)) / forwards


def measure(run: Session, iterations: int, sizes: Sequence[int]) -> dict[str, Any]:
    """The figures of a session: seconds and ratio of each iteration after one that is not counted."""
    trainer.iterate(run, 0)
    cond = run.policy.encode(["a"])
    rows: list[dict[str, float]] = []
    used: list[float] = []
    alone: dict[tuple[bool, int], list[float]] = {(back, size): [] for back in (False, True) for size in sizes}
    wall = 0.0
    for number in range(iterations):  # in turn, because a shared core is faster at one time than at another
        start = time.perf_counter()
        used += seconds(lambda number=number: rows.append(trainer.iterate(run, number + 1)), 1)
        wall += (time.perf_counter() - start) / iterations
        for (back, size), times in alone.items():
            times.append(bare(run.policy, cond, size, back, 1))
    forward, learning = (min((statistics.median(alone[back, size]), size) for size in sizes) for back in (False, True))
    ideal = [row["forwards"] * forward[0] + row["replay_forwards"] * learning[0] for row in rows]
    mean = {key: statistics.mean(row.get(key, 0.0) for row in rows) for key in rows[0]}
    return {
        "threads": torch.get_num_threads(),
        "device": str(run.policy.device),
        **{name: mean[name] for name in ("forwards", "replay_forwards", "decodes")},
        "seconds": used,
        "wall_seconds": wall,
        "ratio": [whole / least for whole, least in zip(used, ideal, strict=True)],
        "best_batch": {"forward": forward[1], "backward": learning[1]},
        "split": {key: round(value, 3) for key, value in mean.items() if key.startswith("seconds/")},
    }


def opened(config: str, overrides: Sequence[str]) -> Session:
    torch.set_flush_denormal(True)
    policies.quiet()
    return setup.open_session(configs.load(ROOT / config, [*overrides]))


def measured(config: str, overrides: Sequence[str], iterations: int, sizes: Sequence[int]) -> dict[str, Any]:
    return measure(opened(config, overrides), iterations, sizes)


def iterated(overrides: Sequence[str], iterations: int) -> list[float]:
    """Processor seconds of iterations of the quickstart, after one that is not counted."""
    run, numbers = opened(QUICK, overrides), count()
    trainer.iterate(run, next(numbers))
    return seconds(lambda: trainer.iterate(run, next(numbers)), iterations)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a new process, whose memory nothing before it has used."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def exponent(values: Sequence[float], times: Sequence[float]) -> float:
    """The slope of log time against log value: 1 where time grows in proportion."""
    return statistics.linear_regression([*map(math.log, values)], [*map(math.log, times)]).slope


def started(arguments: Sequence[str]) -> float:
    """Processor seconds of a new Python process. RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(part.format(folder=folder) for part in arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the quartiles where there are several values."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *rows])


def ratios(what: str, iterations: int, sizes: Sequence[int], cases: Mapping[str, tuple[str, list[str]]]) -> str:
    rows = []
    for name, (config, overrides) in cases.items():
        figures = in_a_process(measured, config, overrides, iterations, sizes)
        counts = [f"{figures[key]:.0f}" for key in ("forwards", "replay_forwards", "decodes")]
        rows.append([name, spread(figures["ratio"]), spread(figures["seconds"]), *counts])
    return table([what, "ratio", "seconds", "forwards", "replayed", "images"], rows)


def growth(iterations: int) -> str:
    rows = []
    for what, (values, setting) in GROWTH.items():
        times = [in_a_process(iterated, setting(value), iterations) for value in values]
        fitted = [exponent(values, each) for each in zip(*times, strict=True)]
        cells = "; ".join(f"{value}: {spread(each)}" for value, each in zip(values, times, strict=True))
        rows.append([what, cells, spread(fitted)])
    return table(["what grows", "seconds of an iteration", "exponent"], rows)


def starts(repeats: int, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        rows.append([name, spread([started(STARTS[name]) for _ in range(repeats)])])
    return table(["command", "seconds"], rows)


def page(ratios: str, beside: str, growth: str, starts: str, repeats: int, load: float) -> str:
    return f"""# Benchmark

The functions of `scripts/benchmark.py` made these figures on the embedded model, on one thread of a CPU:
`OMP_NUM_THREADS=1 python scripts/benchmark.py --all --repeats {repeats}`. The command writes this page. Times are
processor time; each figure is a median with its quartiles, of {repeats} repeats. Processor time leaves out waiting for
a core, but a shared core is slower too: compare figures of one table only. Here the load average was {load:.1f} at the
end.

## Ratio to the bare network

Processor time of an iteration over that of the bare transformer for the same forwards and backwards, in batches of
32: what sampling, decoding, scoring, credit and the optimiser add. The quickstart for objectives on finished images,
`configs/tiny_branch.yaml` with few prompts for GRPO. A network that is faster in other batches than 32 would give
higher ratios.

{ratios}

## Beside the network

The same ratio against the bare network's best batch of 32, 64, 128 and 256 latents, in turn with the iterations;
`scripts/benchmark.py CONFIG` measures one. What is left is decoding and scoring, some 9 % of the quickstart, and
batches smaller than the best. By itself on two idle cores `scripts/benchmark.py configs/quickstart.yaml` gave 1.09
(1.06 to 1.11, eight iterations).

{beside}

At 12 prompts of 8 images and 8 steps, three iterations after one, median of processor seconds, twice in turn: the
quickstart's `nft` takes 2.05 and 2.01, with the adapter beside the weights and each text alone 2.22 and 2.29. GRPO
(`configs/tiny_branch.yaml` with `plan=sde credit=terminal steps=8 rewards={{image_stats.brightness: 1.0}}`) takes 3.22
and 3.29 with `reuse=true`, and before 4.75 and 4.97; with the strict verifier, where a replay leaves out the steps
without an advantage (a third of the last iteration's), 3.37 and 3.28, before 4.01 and 3.92. `reuse` holds 1.3 GiB.

## Growth

The quickstart with more images (prompts of eight images each) and more steps. The exponent is the slope of log time
against log number: 1 is proportional, and less where a constant part counts, such as decoding, scores and learning
beside the steps. With more processes each takes its share of the prompts ([several processes](scale.md)); their growth
is not measured here, and neither is memory ([GPU](gpu.md)).

{growth}

## Starting

A new process each. diffusers imports bitsandbytes, torchao and scipy's statistics itself where they are installed; what
samples or estimates cannot start before the class of its pipeline.

{starts}

## Busy machines

Threads of OpenMP wait for each other at the end of each operation, by default in a loop that keeps their core. The
command line sets `OMP_WAIT_POLICY=PASSIVE` unless you have set it: threads that wait sleep (in GNU's OpenMP,
`GOMP_SPINCOUNT=0`). From Python, set it before torch is imported.

On two cores with a load average of 12, an iteration of the quickstart took 4.2 to 7.6 s with two threads and `PASSIVE`
and 5.1 to 5.4 s with one thread (three iterations each, in one process). With two threads and neither variable, a
process was stopped after 100 s, its start included, before its four iterations were done (one attempt). On idle cores
the cost was not measured; to measure it, run both on yours:

<!-- needs: minutes -->
```
OMP_WAIT_POLICY=PASSIVE python scripts/benchmark.py configs/quickstart.yaml
GOMP_SPINCOUNT=300000 python scripts/benchmark.py configs/quickstart.yaml
```

and compare `wall_seconds`, of one iteration.
"""


def main(
    config: Annotated[str, typer.Argument(help="a training config")] = QUICK,
    iterations: Annotated[int, typer.Option("--iterations", "--repeats", min=2, help="iterations measured")] = 8,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value")] = None,
    whole: Annotated[bool, typer.Option("--all", help="write all tables into docs/benchmark.md")] = False,
) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the processes started; set it by hand for this one
    if whole:
        text = page(
            ratios("objective, credit", iterations, BATCHES[:1], METHODS),
            ratios("config", iterations, BATCHES, BESIDE),
            growth(iterations),
            starts(iterations, [*STARTS]),
            iterations,
            os.getloadavg()[0],
        )
        files.write(PAGE, text)
        return
    figures = measure(opened(config, overrides or []), iterations, BATCHES)
    short = {name: spread(figures[name], 3) for name in ("seconds", "ratio")}
    print(json.dumps(figures | short, indent=2))


if __name__ == "__main__":
    typer.run(main)
