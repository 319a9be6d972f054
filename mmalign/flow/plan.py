"""Named plans: where a walk from noise to image is stochastic, where it branches, and which of its states are shown.

A plan is a table (`mmalign.types.Plan`), so ODE, SDE, a window, a set of branches and the completion of any state are
data for one loop. Routes that have come the same way share their states: a branch plan's trunk and a tree's stem are
walked once, and a completion starts from the velocity its state already has.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.flow.kernels import STOCHASTIC, step
from mmalign.types import Plan

Times = Float[Tensor, "states"]
Noise = float | Sequence[float]  # the kernel's parameter, for all steps or one for each


def _levels(noise: Noise, steps: int) -> list[float]:
    levels = [float(noise)] * steps if isinstance(noise, int | float) else [float(level) for level in noise]
    if len(levels) != steps:
        raise ValueError(f"{len(levels)} noise levels for {steps} steps")
    return levels


def _check(kernel: str, t: Times, noise: Noise, steps: Sequence[int]) -> None:
    """Refuse a stochastic step that cannot be learnt from."""
    if kernel not in STOCHASTIC:
        raise ValueError(f"no kernel called {kernel!r}; known: {', '.join(STOCHASTIC)}")
    if not bool((t[1:] < t[:-1]).all()):
        raise ValueError(f"times must fall from noise to image, got {[round(x, 4) for x in t.tolist()]}")
    levels = _levels(noise, len(t) - 1)
    for k in steps:
        if not 0 <= k < len(t) - 1:
            raise ValueError(f"step {k} is outside the plan's {len(t) - 1} steps")
        if t[k + 1] <= 0:
            raise ValueError(
                f"step {k} ends at t = 0, where the image is finished; the last step must stay deterministic"
            )
        if not levels[k] > 0:
            raise ValueError(f"noise must be positive at a stochastic step, got {levels[k]} at step {k}")


def noise_after(kernel: str, t: Times, noise: Noise, k: int) -> tuple[float, float]:
    """The standard deviation of the noise in the state after step k, if velocities are exact; `s = t[k+1]` belongs
    there. And of the part of it that the step draws.

    Exactly s for ODE, `cps` and `ddim`. Euler-Maruyama steps leave `sqrt(s^2 + h^2 (g^2/t + g^4/4t^2))`, which is
    harmless where h is small beside s. On the ten-step schedule of stock SD3.5 (shift 3, applied twice) one step goes
    from t = 0.278 to 0.0089: `flow_sde` at a = 0.7 leaves 27 times too much there, and every training image carries it.
    """
    one, level = torch.ones(1, 1, 1, 1), _levels(noise, len(t) - 1)[k]
    # of clean latent 0 and noise 1 the state is t, the velocity 1, and the mean of the next state m
    mean, std = step(kernel, t[k] * one, one, t[k], t[k + 1], level, t_max_of(t))
    return float((mean[0, 0, 0, 0] ** 2 + std[0] ** 2).sqrt()), float(std[0])


def t_max_of(t: Times) -> float:
    """Where `flow_sde`'s noise stops growing towards t = 1: the schedule's second time, as in Flow-GRPO's release."""
    return float(t[1]) if len(t) > 2 else 1 - 1e-3


def _plan(kernel: str, t: Times, noise: Noise, routes: list[dict[int, int]]) -> Plan:
    """`routes`: {stochastic step: its draw} for each."""
    steps, levels = len(t) - 1, _levels(noise, len(t) - 1)
    table, draw = torch.zeros(len(routes), steps), torch.zeros(len(routes), steps, dtype=torch.long)
    for r, draws in enumerate(routes):
        for k, number in draws.items():
            table[r, k], draw[r, k] = levels[k], number
    shown = torch.full((len(routes), steps + 1), -1)
    shown[:, -1] = torch.arange(len(routes))
    return Plan(kernel, t.float().repeat(len(routes), 1), table, draw, t_max_of(t), shown)


def ode(t: Times, kernel: str = "flow_sde") -> Plan:
    """One deterministic route."""
    _check(kernel, t, 1.0, [])
    return _plan(kernel, t, 1.0, [{}])


def window(t: Times, kernel: str, noise: Noise, start: int, stop: int, children: int = 1) -> Plan:
    """Stochastic on steps `start` to `stop - 1`, ODE elsewhere (MixGRPO, arXiv 2507.21802). With `children`, so many
    routes part at the window's first step and share the ODE before it (Flow-GRPO-Fast)."""
    if not start < stop:
        raise ValueError(f"an empty window: steps {start} to {stop - 1}")
    _check(kernel, t, noise, range(start, stop))
    return _plan(kernel, t, noise, [dict.fromkeys(range(start, stop), j) for j in range(children)])


def sde(t: Times, kernel: str, noise: Noise) -> Plan:
    """Every step stochastic but the last (Flow-GRPO, arXiv 2505.05470): noise added at t = 0 would stay in the image.
    The window over all steps."""
    return window(t, kernel, noise, 0, len(t) - 2)


def branch(t: Times, kernel: str, noise: Noise, steps: Sequence[int], children: int) -> Plan:
    """A deterministic trunk; at each of `steps`, `children` routes leave it by one stochastic step and go on as ODE
    (TempFlow-GRPO, arXiv 2508.04324). With one child at one step it is a window of one."""
    if not steps or children < 1:
        raise ValueError(
            f"branching needs at least one step and one child, got steps {list(steps)}, children {children}"
        )
    if len(set(steps)) < len(steps):
        raise ValueError(f"branch steps repeat: {list(steps)}")
    _check(kernel, t, noise, steps)
    return _plan(kernel, t, noise, [{k: j} for k in steps for j in range(children)])


def remaining(t: Times, n: int) -> Float[Tensor, "fewer"]:
    """`n` steps from `t[0]` to 0 along a schedule of `len(t) - 1` remaining ones.

    For fewer, DenseGRPO's choice of its points: with m remaining, those where m j / n, rounded down, are left. For
    more, points between, evenly in the schedule's own index. `n = 1` is the jump to the predicted clean latent.
    """
    m = len(t) - 1
    if n <= m:
        return t[[m - (m * j) // n for j in range(n, -1, -1)]]
    place = torch.linspace(0, m, n + 1, dtype=torch.float64)
    low = place.long().clamp(max=m - 1)
    return (t[low] + (place - low) * (t[low + 1] - t[low])).to(t.dtype)


def complete(plan: Plan, states: Sequence[int], lengths: int | Sequence[int] | None = None) -> Plan:
    """`plan` with the given states of every learnt route completed by ODE and shown (DenseGRPO, arXiv 2601.20218).

    `lengths`: steps of a completion; None for all that remain, one number as a bound on them, or one number for each of
    `states`. Where a completion is a route there is already (the steps after the state are deterministic anyway), it
    costs nothing.
    """
    bound = isinstance(lengths, int)
    wanted = dict(zip(states, lengths, strict=True)) if lengths is not None and not bound else {}
    if any(n < 1 for n in ([lengths] if bound else wanted.values())):
        raise ValueError(f"a completion takes at least one step, got {lengths}")
    routes: dict[tuple, int] = {}
    shown = plan.shown.clone()
    for r in range(plan.routes):
        size = int((plan.t[r] > 0).sum())
        routes[tuple(plan.t[r, : size + 1].tolist()), *_steps(plan, r, size)] = r
    for row in range(plan.learnt):
        size = int((plan.t[row] > 0).sum())
        for k in states:
            if not 0 <= k < size:
                raise ValueError(f"state {k} is outside the plan's {size} steps")
            n = min(lengths, size - k) if bound else wanted.get(k, size - k)
            times = torch.cat([plan.t[row, :k], remaining(plan.t[row, k : size + 1], n)])
            shown[row, k] = routes.setdefault((tuple(times.tolist()), *_steps(plan, row, k)), len(routes))
    steps = max(len(times) for times, *_ in routes) - 1
    t, noise = torch.zeros(len(routes), steps + 1), torch.zeros(len(routes), steps)
    draw = torch.zeros(len(routes), steps, dtype=torch.long)
    for (times, levels, draws), r in routes.items():
        t[r, : len(times)] = torch.tensor(times)
        noise[r, : len(levels)], draw[r, : len(draws)] = torch.tensor(levels), torch.tensor(draws, dtype=torch.long)
    end = shown[:, -1:].expand(-1, steps + 1 - shown.shape[1])
    return replace(plan, t=t, noise=noise, draw=draw, shown=torch.cat([shown, end], 1))


def _steps(plan: Plan, row: int, stop: int) -> tuple[tuple, tuple]:
    """Noise levels and draws before step `stop`, without the deterministic end."""
    taken = int((plan.noise[row, :stop] > 0).nonzero().max()) + 1 if bool((plan.noise[row, :stop] > 0).any()) else 0
    return tuple(plan.noise[row, :taken].tolist()), tuple(plan.draw[row, :taken].tolist())
