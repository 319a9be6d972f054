"""Named plans: where a walk from noise to image is stochastic, and where it branches.

A plan is a table (`mmalign.types.Plan`), so ODE, SDE, a window and a set of branches are data for one loop. Routes that
have drawn the same noise so far share their states: a branch plan's trunk and a tree's stem are walked once.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.flow.kernels import STOCHASTIC
from mmalign.types import Plan


def _plan(kernel: str, t: Tensor, rows: list[tuple[dict[int, int], float]]) -> Plan:
    """`rows`: for each route, {stochastic step: its draw} and the noise parameter there."""
    if kernel not in STOCHASTIC:
        raise ValueError(f"no kernel called {kernel!r}; known: {', '.join(STOCHASTIC)}")
    steps = len(t) - 1
    noise, draw = torch.zeros(len(rows), steps), torch.zeros(len(rows), steps, dtype=torch.long)
    for r, (draws, level) in enumerate(rows):
        for k, number in draws.items():
            if not 0 <= k < steps:
                raise ValueError(f"step {k} is outside the plan's {steps} steps")
            noise[r, k], draw[r, k] = level, number
    return Plan(kernel, t.float(), noise, draw, t_max=float(t[1]) if steps > 1 else 1 - 1e-3)


def _trainable(k: int, t: Tensor) -> None:
    if t[k + 1] <= 0:
        raise ValueError(f"step {k} ends at t = 0, where the image is finished; the last step must stay deterministic")


def _positive(noise: float) -> None:
    if not noise > 0:
        raise ValueError(f"noise must be positive in a stochastic plan, got {noise}; use plan 'ode' for none")


def ode(t: Float[Tensor, "states"], kernel: str = "flow_sde") -> Plan:
    """One deterministic route."""
    return _plan(kernel, t, [({}, 0.0)])


def window(t: Float[Tensor, "states"], kernel: str, noise: float, start: int, stop: int) -> Plan:
    """One route, stochastic on steps `start` to `stop - 1`, ODE elsewhere (MixGRPO, arXiv 2507.21802)."""
    if not start < stop:
        raise ValueError(f"an empty window: steps {start} to {stop - 1}")
    _positive(noise)
    _trainable(stop - 1, t)
    return _plan(kernel, t, [(dict.fromkeys(range(start, stop), 0), noise)])


def sde(t: Float[Tensor, "states"], kernel: str, noise: float) -> Plan:
    """One route, every step stochastic but the last (Flow-GRPO, arXiv 2505.05470): noise added at t = 0 would stay in
    the image."""
    return window(t, kernel, noise, 0, len(t) - 2)


def branch(t: Float[Tensor, "states"], kernel: str, noise: float, steps: Sequence[int], children: int) -> Plan:
    """A deterministic trunk; at each of `steps`, `children` routes leave it by one stochastic step and go on as ODE
    (TempFlow-GRPO, arXiv 2508.04324). With one child at one step it is a window of one."""
    if not steps or children < 1:
        raise ValueError(
            f"branching needs at least one step and one child, got steps {list(steps)}, children {children}"
        )
    if len(set(steps)) < len(steps):
        raise ValueError(f"branch steps repeat: {list(steps)}")
    _positive(noise)
    for k in steps:
        _trainable(k, t)
    return _plan(kernel, t, [({k: j}, noise) for k in steps for j in range(children)])
