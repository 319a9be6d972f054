"""Plans: which steps of a trajectory are stochastic, where it branches, and which of its states are completed.

A plan is a table (`mmalign.types.Plan`), so ODE, SDE, a window, a set of branches and the completion of any state are
data for one loop. Routes that have taken the same steps share their states: a branch plan's trunk is integrated once,
and a completion starts from the velocity its state already has.

`mmalign.sampling.plans` has the ones that a config can name.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.flow.kernels import Euler, levels
from mmalign.types import Kernel, Plan

Times = Float[Tensor, "states"]
EULER = Euler()


def t_max_of(t: Times) -> float:
    """Where `flow_sde`'s noise stops growing towards t = 1: the schedule's second time, as in Flow-GRPO's release."""
    return float(t[1]) if len(t) > 2 else 1 - 1e-3


def table(t: Times, kernel: Kernel, routes: list[dict[int, int]]) -> Plan:
    """`routes`: {stochastic step: its draw} for each. Refuses a stochastic step that cannot be trained on."""
    if not bool((t[1:] < t[:-1]).all()):
        raise ValueError(f"times must fall from noise to image, got {[round(x, 4) for x in t.tolist()]}")
    steps = len(t) - 1
    level = levels(kernel.noise, steps)
    for k in sorted({k for draws in routes for k in draws}):
        if not 0 <= k < steps:
            raise ValueError(f"step {k} is outside the plan's {steps} steps")
        if t[k + 1] <= 0:
            raise ValueError(
                f"step {k} ends at t = 0, where the image is finished; the last step must stay deterministic"
            )
        if not level[k] > 0:
            raise ValueError(f"noise must be positive at a stochastic step, got {level[k]} at step {k}")
    noise, draw = torch.zeros(len(routes), steps), torch.zeros(len(routes), steps, dtype=torch.long)
    for r, draws in enumerate(routes):
        for k, number in draws.items():
            noise[r, k], draw[r, k] = level[k], number
    finished_by = torch.full((len(routes), steps + 1), -1)
    finished_by[:, -1] = torch.arange(len(routes))
    return Plan(kernel, t.float().repeat(len(routes), 1), noise, draw, t_max_of(t), finished_by)


def ode(t: Times, kernel: Kernel = EULER) -> Plan:
    """One deterministic route."""
    return table(t, kernel, [{}])


def window(t: Times, kernel: Kernel, start: int, stop: int, children: int = 1) -> Plan:
    """Stochastic on steps `start` to `stop - 1`, ODE elsewhere (MixGRPO, arXiv 2507.21802). With `children`, as many
    routes part at the window's first step and share the ODE before it (Flow-GRPO-Fast)."""
    if not start < stop:
        raise ValueError(f"an empty window: steps {start} to {stop - 1}")
    return table(t, kernel, [dict.fromkeys(range(start, stop), j) for j in range(children)])


def sde(t: Times, kernel: Kernel) -> Plan:
    """Every step stochastic but the last (Flow-GRPO, arXiv 2505.05470): noise added at t = 0 would stay in the image.
    The window over all steps."""
    return window(t, kernel, 0, len(t) - 2)


def branch(t: Times, kernel: Kernel, steps: Sequence[int], children: int) -> Plan:
    """A deterministic trunk; at each of `steps`, `children` routes leave it by one stochastic step and continue as ODE
    (TempFlow-GRPO, arXiv 2508.04324). With one child at one step it is a window of one."""
    if not steps or children < 1:
        raise ValueError(
            f"branching needs at least one step and one child, got steps {list(steps)}, children {children}"
        )
    if len(set(steps)) < len(steps):
        raise ValueError(f"branch steps repeat: {list(steps)}")
    return table(t, kernel, [{k: j} for k in steps for j in range(children)])


def tree(t: Times, kernel: Kernel, steps: Sequence[int], children: int) -> Plan:
    """Branches of branches: at each of `steps` every state gets `children` by one stochastic step, with ODE between
    and after them (TreeGRPO, arXiv 2512.08153; DeepSearch, arXiv 2509.25454). With L steps one start has `children`^L
    leaves. Of one step it is `branch`."""
    if not steps or children < 1 or len(set(steps)) < len(steps):
        raise ValueError(
            f"a tree needs at least one step, each once, and one child, got steps {list(steps)}, children {children}"
        )
    paths = product(range(children), repeat=len(steps))
    return table(t, kernel, [dict(zip(sorted(steps), path, strict=True)) for path in paths])


def alone(plan: Plan) -> Plan:
    """The trained route with most stochastic steps, without the others and without completions."""
    row = int((plan.noise[: plan.trained] > 0).sum(1).argmax())
    finished_by = torch.full_like(plan.finished_by[:1], -1)
    finished_by[:, -1] = 0
    columns = {name: getattr(plan, name)[row : row + 1] for name in ("t", "noise", "draw")}
    return replace(plan, finished_by=finished_by, **columns)


def remaining(t: Times, n: int) -> Float[Tensor, "fewer"]:
    """`n` steps from `t[0]` to 0 along a schedule of `len(t) - 1` remaining ones.

    For fewer, DenseGRPO's choice of its points: with m remaining, those where m j / n, rounded down, are left. For
    more, points between, evenly in the schedule's own index. `n = 1` is the jump to the predicted clean latent.
    """
    m = len(t) - 1
    if n <= m:
        return t[[m - (m * j) // n for j in range(n, -1, -1)]]
    index = torch.linspace(0, m, n + 1, dtype=torch.float64)
    low = index.long().clamp(max=m - 1)
    return (t[low] + (index - low) * (t[low + 1] - t[low])).to(t.dtype)


def complete(plan: Plan, states: Sequence[int], lengths: int | Sequence[int] | None = None) -> Plan:
    """`plan` with the given states of every trained route completed by ODE (DenseGRPO, arXiv 2601.20218).

    `lengths`: steps of a completion; None for all that remain, one number as a bound on them, or one number for each of
    `states`. A completion that equals an existing route (where the steps after the state are deterministic anyway)
    costs nothing.

    Example: a single SDE route over T = 3 steps at times 1, 2/3, 1/3, 0, completed from state 1 in one step, gains the
    route 1, 2/3, 0: the same stochastic step 0, then the jump to the clean latent. `finished_by` [-1, -1, -1, 0]
    becomes [-1, 1, -1, 0].
    """
    bound = isinstance(lengths, int)
    wanted = dict(zip(states, lengths, strict=True)) if lengths is not None and not bound else {}
    if any(n < 1 for n in ([lengths] if bound else wanted.values())):
        raise ValueError(f"a completion takes at least one step, got {lengths}")
    routes: dict[tuple, int] = {}  # (times, noise levels, draws) -> row of the new table
    finished_by = plan.finished_by.clone()
    for r in range(plan.routes):
        size = int((plan.t[r] > 0).sum())
        routes[tuple(plan.t[r, : size + 1].tolist()), *_steps(plan, r, size)] = r
    for row in range(plan.trained):
        size = int((plan.t[row] > 0).sum())
        for k in states:
            if not 0 <= k < size:
                raise ValueError(f"state {k} is outside the plan's {size} steps")
            n = min(lengths, size - k) if bound else wanted.get(k, size - k)
            times = torch.cat([plan.t[row, :k], remaining(plan.t[row, k : size + 1], n)])
            finished_by[row, k] = routes.setdefault((tuple(times.tolist()), *_steps(plan, row, k)), len(routes))
    steps = max(len(times) for times, *_ in routes) - 1
    t, noise = torch.zeros(len(routes), steps + 1), torch.zeros(len(routes), steps)
    draw = torch.zeros(len(routes), steps, dtype=torch.long)
    for (times, level, draws), r in routes.items():
        t[r, : len(times)] = torch.tensor(times)
        noise[r, : len(level)], draw[r, : len(draws)] = torch.tensor(level), torch.tensor(draws, dtype=torch.long)
    end = finished_by[:, -1:].expand(-1, steps + 1 - finished_by.shape[1])
    return replace(plan, t=t, noise=noise, draw=draw, finished_by=torch.cat([finished_by, end], 1))


def _steps(plan: Plan, row: int, stop: int) -> tuple[tuple, tuple]:
    """Noise levels and draws before step `stop`, without the deterministic end."""
    taken = int((plan.noise[row, :stop] > 0).nonzero().max()) + 1 if bool((plan.noise[row, :stop] > 0).any()) else 0
    return tuple(plan.noise[row, :taken].tolist()), tuple(plan.draw[row, :taken].tolist())
