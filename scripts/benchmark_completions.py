"""Time of completing all states of a batch of trajectories together, against completing each state alone.

    python scripts/benchmark_completions.py

24 trajectories of the embedded model, T = 10, every remaining step. "Together" is what a dense plan adds to the bare
trajectory: different lengths share forwards, and each completion starts from the velocity its state has. "By step"
completes the states of one step together, each from a fresh velocity; "alone" does so one state at a time.
"""

import json
import statistics
import time
from pathlib import Path

import torch
import typer

from mmalign import policy as policies
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.sampling.kernels import Ddim
from mmalign.seeds import gaussian, seed_of

ROOT = Path(__file__).resolve().parents[1]


def main(trajectories: int = 24, steps: int = 10, repeats: int = 3, batch: int = 128) -> None:
    torch.set_flush_denormal(True)
    policies.quiet()
    policy = policies.load(str(ROOT / "assets/tiny_sd3"))
    cond, index = policy.encode(["a red circle"]), torch.zeros(trajectories, dtype=torch.long)
    times, shape = policy.times(steps), policy.latent_shape
    start = torch.stack([gaussian(shape, i) for i in range(trajectories)])
    bare = plans.sde(times, Ddim(1.0))
    dense = plans.complete(bare, range(steps))

    def integrate(plan, start=start, batch=batch):
        return sample(
            policy.velocity, start, cond, index[: len(start)], plan, lambda *key: gaussian(shape, seed_of(*key)), batch
        )

    states = integrate(bare).x

    def apart(size: int):
        for k in range(steps - 1):
            for x in states[:, k].split(size):
                integrate(plans.ode(times[k:]), x)

    ways = {
        "bare": lambda: integrate(bare),
        "dense": lambda: integrate(dense),
        "by step": lambda: apart(trajectories),
        "alone": lambda: apart(1),
    }
    seconds, forwards = {}, {}
    for name, way in ways.items():
        taken = []
        for _ in range(repeats):
            policy.counts.clear()
            began = time.perf_counter()
            way()
            taken.append(time.perf_counter() - began)
        seconds[name], forwards[name] = statistics.median(taken), policy.counts["forwards"]
    together = seconds["dense"] - seconds["bare"]
    print(
        json.dumps(
            {
                "threads": torch.get_num_threads(),
                "seconds": {name: round(value, 3) for name, value in (seconds | {"together": together}).items()},
                "forwards": forwards,
                "by step / together": round(seconds["by step"] / together, 2),
                "alone / together": round(seconds["alone"] / together, 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    typer.run(main)
