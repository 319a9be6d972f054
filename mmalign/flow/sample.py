"""The one sampling loop: noise -> trajectories, for any plan.

At each step the distinct states of that column are evaluated once, in batches, and every route continues from its own.
A completion is a route like any other: its first step takes the velocity its state already has, and completions of
different lengths share forwards.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.types import Kernel, Plan, Trajectories, Tree, Velocity

Features = Callable[[int], Float[Tensor, "M F"]]  # how many rows the last velocity had -> what the network made of each
Draw = Callable[[int, int, tuple[int, ...]], Float[Tensor, "C h w"]]  # (start, step, path of draws) -> noise


def chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def distinct(keys: Int[Tensor, "M *k"]) -> tuple[Int[Tensor, "M"], Int[Tensor, "U"]]:
    """The number of each row's key among the `U` different keys, and the first row that has each."""
    different, inverse = keys.unique(dim=0, return_inverse=True)
    representative = torch.full((len(different),), len(keys), device=keys.device)
    representative.scatter_reduce_(0, inverse, torch.arange(len(keys), device=keys.device), "amin")
    return inverse, representative


@torch.no_grad()
def sample(
    velocity: Velocity,
    start: Float[Tensor, "B C h w"],
    cond: Any,
    prompt: Int[Tensor, "B"],
    plan: Plan | Sequence[Plan],
    draw: Draw | None = None,
    batch: int = 128,
    storage: torch.dtype = torch.float32,
    features: Features | None = None,
) -> Trajectories:
    """Integrate each of the `B` initial noises along every route of its plan (one for all, or one each): `N`
    trajectories of trained routes, those of a start together, and the `E` finished latents of all routes.

    `prompt [B]` is each start's row in `cond`. `draw(start, step, path)` gives the noise of one stochastic step (an ODE
    needs none); `path` holds the draws taken so far (-1 for a deterministic step), so adding routes to a plan changes
    none of the others. Rows of one forward may be at different times. `batch` bounds the rows of one forward and
    changes no result. States are rounded to `storage` before anything is computed from them, as they will be when they
    are replayed. With `features` (`mmalign.policy.protocol.Observable`) those of all states of trained routes but the
    last are kept.

    Example, one deterministic trajectory of ten steps:

        noise = gaussian(policy.latent_shape, seed=0)[None]
        cond, index = policy.encode(["a red circle"]), torch.tensor([0])
        paths = sample(policy.velocity, noise, cond, index, ode(policy.times(10)))
        image = policy.decode(paths.finals)
    """
    routes = _stacked([plan] * len(start) if isinstance(plan, Plan) else plan, start.device)
    kernel, prompt, steps = routes.kernel, prompt[routes.start], routes.noise.shape[1]
    x = start.to(storage).float()[routes.start]
    states, means, std = [x[routes.trained]], [], torch.zeros_like(routes.noise)
    pooled = []
    for k in range(steps):
        moving = (routes.t[:, k] > 0).nonzero()[:, 0]  # rows that have not reached t = 0
        inverse, representative = distinct(routes.node[moving, k])
        rows = moving[representative]  # one row per distinct state
        velocities, noted = [x[:0]], []  # every route may have reached t = 0 before the last column
        for i in rows.split(batch) if len(rows) else ():
            velocities.append(velocity(x[i], routes.t[i, k], cond, prompt[i]).float())
            noted += [] if features is None else [features(len(i)).cpu()]
        v = torch.cat(velocities)
        if features is not None:
            each = torch.cat(noted)
            of_rows = each.new_zeros(len(x), each.shape[1])
            of_rows[moving.cpu()] = each[inverse.cpu()]
            pooled.append(of_rows[routes.trained.cpu()])
        t, s, noise = routes.t[moving, k], routes.t[moving, k + 1], routes.noise[moving, k]
        mean = x.clone()
        mean[moving], std[moving, k] = kernel.step(x[moving], v[inverse], t, s, noise, routes.t_max)
        x = mean.clone()
        stochastic = (std[:, k] > 0).nonzero()[:, 0]
        if len(stochastic):
            if draw is None:
                raise ValueError("a stochastic step needs draw, which gives its noise")
            inverse, representative = distinct(routes.node[stochastic, k + 1])
            z = torch.stack([draw(*routes.path(row, k)) for row in stochastic[representative].tolist()]).to(x)
            x[stochastic] += std[stochastic, k, None, None, None] * z[inverse]
        x = x.to(storage).float()
        states.append(x[routes.trained])
        means.append(mean[routes.trained])
    trained = routes.trained
    columns = (routes.t, routes.noise, std, routes.node, prompt, routes.start)
    tree = Tree(*(column[trained].cpu() for column in columns), prompt.cpu(), routes.finished_by.cpu())
    return Trajectories(
        tree, kernel, routes.t_max, torch.stack(states, 1), torch.stack(means, 1), finals=x,
        features=torch.stack(pooled, 1) if pooled else None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Stacked:
    """The plans of all starts, one under the other: a row per (start, route). `trained` are the rows trained on."""

    kernel: Kernel
    t_max: float
    t: Float[Tensor, "R states"]
    noise: Float[Tensor, "R T"]
    draw: Int[Tensor, "R T"]
    node: Int[Tensor, "R states"]
    start: Int[Tensor, "R"]
    trained: Int[Tensor, "N"]
    finished_by: Int[Tensor, "N states"]

    def path(self, row: int, k: int) -> tuple[int, int, tuple[int, ...]]:
        """The key of the noise that `row` takes at step k."""
        taken = torch.where(self.noise[row, : k + 1] > 0, self.draw[row, : k + 1], -1)
        return int(self.start[row]), k, tuple(taken.tolist())


def _stacked(plans: Sequence[Plan], device: torch.device) -> _Stacked:
    first = plans[0]
    for p in plans:
        if (p.kernel, p.t_max, p.steps) != (first.kernel, first.t_max, first.steps):
            raise ValueError(
                "plans sampled together must agree in kernel, t_max and number of steps, got "
                f"{(first.kernel, first.t_max, first.steps)} and {(p.kernel, p.t_max, p.steps)}"
            )
    routes = torch.tensor([p.routes for p in plans])
    offset = (routes.cumsum(0) - routes).tolist()  # above every state and route number of the plans before
    columns = {
        "t": [p.t for p in plans],
        "noise": [p.noise for p in plans],
        "draw": [p.draw for p in plans],
        "node": [p.state + o for p, o in zip(plans, offset, strict=True)],
        "start": [torch.full((p.routes,), b) for b, p in enumerate(plans)],
        "trained": [torch.arange(p.trained) + o for p, o in zip(plans, offset, strict=True)],
        "finished_by": [
            torch.where(p.finished_by < 0, -1, p.finished_by + o) for p, o in zip(plans, offset, strict=True)
        ],
    }
    columns = {name: torch.cat(parts).to(device) for name, parts in columns.items()}
    return _Stacked(first.kernel, first.t_max, **columns)
