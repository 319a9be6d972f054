"""The cost of an iteration, relative to the bare network.

    python scripts/benchmark.py configs/quickstart.yaml

Ratio = wall-clock of one iteration / time of the bare transformer (adapter attached, gradients for the adapter only)
for the same number of forwards and of forwards with backward, each at its best batch size. 1 would mean that sampling,
decoding, scoring, credit and the optimiser are free. All parts are measured in one process, in turn, and medians are
printed.
"""

import json
import statistics
import time
from typing import Annotated

import torch
import typer

from mmalign import train as trainer
from mmalign.config import load as configs
from mmalign.training import setup


def median_seconds(function, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bare(policy, cond, size: int, backward: bool, repeats: int) -> float:
    """Seconds per network forward (and backward), in batches of `size` latents."""
    x = torch.randn(size, *policy.latent_shape, device=policy.device)
    t, index = torch.rand(size, device=policy.device), torch.zeros(size, dtype=torch.long, device=policy.device)
    parameters = policy.parameters()

    def run():
        if not backward:
            with torch.no_grad():
                policy.velocity(x, t, cond, index)
            return
        torch.autograd.grad(policy.velocity(x, t, cond, index).float().square().mean(), parameters, allow_unused=True)

    policy.counts.clear()
    run()
    forwards = policy.counts["forwards"]
    return median_seconds(run, repeats) / forwards


def main(
    config: Annotated[str, typer.Argument(help="a training config")] = "configs/quickstart.yaml",
    iterations: Annotated[int, typer.Option(help="iterations measured")] = 8,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value")] = None,
) -> None:
    torch.set_flush_denormal(True)
    run = setup.open_session(configs.load(config, overrides or []))
    trainer.iterate(run, 0)
    rows = []
    wall = median_seconds(lambda: rows.append(trainer.iterate(run, len(rows) + 1)), iterations)
    mean = {key: statistics.mean(row.get(key, 0.0) for row in rows) for key in rows[0]}
    cond = run.policy.encode(["a"])
    sizes = (32, 64, 128, 256)
    forward = min((bare(run.policy, cond, size, False, 5), size) for size in sizes)
    learning = min((bare(run.policy, cond, size, True, 5), size) for size in sizes)
    ideal = mean["forwards"] * forward[0] + mean["replay_forwards"] * learning[0]
    print(
        json.dumps(
            {
                "threads": torch.get_num_threads(),
                "device": str(run.policy.device),
                "forwards": mean["forwards"],
                "replay_forwards": mean["replay_forwards"],
                "images": mean["decodes"],
                "seconds_per_iteration": round(wall, 3),
                "bare_seconds": round(ideal, 3),
                "ratio": round(wall / ideal, 3),
                "images_per_second": round(mean["decodes"] / wall, 1),
                "best_batch": {"forward": forward[1], "backward": learning[1]},
                "split": {key: round(value, 3) for key, value in mean.items() if key.startswith("seconds/")},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    typer.run(main)
