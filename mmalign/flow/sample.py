"""The one sampling loop: noise -> trajectories, for any plan.

At each step the distinct states of that column are evaluated once, in batches, and every route goes on from its own.
A completion is a route like any other: its first step takes the velocity its state already has, and completions of
unlike length share forwards.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.flow.kernels import step
from mmalign.types import Plan, Trajectories, Velocity

Draw = Callable[[int, int, tuple[int, ...]], Float[Tensor, "C h w"]]  # (start, step, path of draws) -> noise


def seed_of(*key: int | str | tuple[int, ...]) -> int:
    """A number of 63 bits from any key, e.g. (run seed, iteration, prompt id, member): the same on every machine.

    As the seed of torch's CPU generator (`gaussian`, and all else that torch draws) its lower 32 bits alone count: two
    keys share their noise with a probability of 2^-32, and of runs with 10,000 draws 1 in 86 has such a pair.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def gaussian(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise from one seed, drawn on the CPU as diffusers does with a seeded generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def distinct(keys: Int[Tensor, "M *k"]) -> tuple[Int[Tensor, "M"], Int[Tensor, "U"]]:
    """The number of each row's key among the `U` different keys, and the first row that has each."""
    _, number = keys.unique(dim=0, return_inverse=True)
    first = torch.full((int(number.max()) + 1,), len(keys), device=keys.device)
    first.scatter_reduce_(0, number, torch.arange(len(keys), device=keys.device), "amin")
    return number, first


@torch.no_grad()
def sample(
    velocity: Velocity,
    start: Float[Tensor, "B C h w"],
    cond,
    prompt: Int[Tensor, "B"],
    plan: Plan | Sequence[Plan],
    draw: Draw | None = None,
    batch: int = 128,
    storage: torch.dtype = torch.float32,
) -> Trajectories:
    """Walk each of the `B` starting noises along every route of its plan (one for all, or one each): `N` trajectories
    of learnt routes, those of a start together, and the `E` finished latents of all routes.

    `prompt [B]` is each start's row in `cond`. `draw(start, step, path)` gives the noise of one stochastic step (an ODE
    needs none); `path` holds the draws taken so far (-1 for a deterministic step), so adding routes to a plan changes
    none of the others. Rows of one forward may be at different times.
    `batch` bounds the rows of one forward and changes no result. States are rounded to `storage` before anything is
    computed from them, as they will be when they are replayed.
    """
    table = _table([plan] * len(start) if isinstance(plan, Plan) else plan, start.device)
    prompt, steps = prompt[table.start], table.noise.shape[1]
    x = start.to(storage).float()[table.start]
    states, means, std = [x[table.learnt]], [], torch.zeros_like(table.noise)
    for k in range(steps):
        moving = (table.t[:, k] > 0).nonzero()[:, 0]
        t, s = table.t[moving, k], table.t[moving, k + 1]
        same, first = distinct(table.node[moving, k])
        at = moving[first]
        v = torch.cat([velocity(x[rows], table.t[rows, k], cond, prompt[rows]).float() for rows in at.split(batch)])
        mean = x.clone()
        mean[moving], std[moving, k] = step(table.kernel, x[moving], v[same], t, s, table.noise[moving, k], table.t_max)
        x = mean.clone()
        stochastic = (std[:, k] > 0).nonzero()[:, 0]
        if len(stochastic):
            same, first = distinct(table.node[stochastic, k + 1])
            z = torch.stack([draw(*table.path(row, k)) for row in stochastic[first].tolist()]).to(x)
            x[stochastic] += std[stochastic, k, None, None, None] * z[same]
        x = x.to(storage).float()
        states.append(x[table.learnt])
        means.append(mean[table.learnt])
    return Trajectories(
        table.kernel, table.t_max, torch.stack(states, 1), torch.stack(means, 1), std[table.learnt],
        table.t[table.learnt], table.noise[table.learnt], table.node[table.learnt],
        prompt[table.learnt], table.start[table.learnt], ends=x, owner=prompt, shown=table.shown,
    )  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """The plans of all starts, one under the other: a row per (start, route). `learnt` are the rows learnt from."""

    kernel: str
    t_max: float
    t: Float[Tensor, "R states"]
    noise: Float[Tensor, "R T"]
    draw: Int[Tensor, "R T"]
    node: Int[Tensor, "R states"]
    start: Int[Tensor, "R"]
    learnt: Int[Tensor, "N"]
    shown: Int[Tensor, "N states"]

    def path(self, row: int, k: int) -> tuple[int, int, tuple[int, ...]]:
        """The key of the noise that `row` takes at step k."""
        taken = torch.where(self.noise[row, : k + 1] > 0, self.draw[row, : k + 1], -1)
        return int(self.start[row]), k, tuple(taken.tolist())


def _table(plans: Sequence[Plan], device: torch.device) -> _Table:
    kinds = {(p.kernel, p.t_max, p.steps) for p in plans}
    if len(kinds) > 1:
        raise ValueError(f"plans sampled together must agree in kernel, t_max and number of steps, got {sorted(kinds)}")
    ((kernel, t_max, _),) = kinds
    routes = torch.tensor([p.routes for p in plans])
    offset = (routes.cumsum(0) - routes).tolist()  # above every state and route number of the plans before
    columns = {
        "t": [p.t for p in plans],
        "noise": [p.noise for p in plans],
        "draw": [p.draw for p in plans],
        "node": [p.state + o for p, o in zip(plans, offset, strict=True)],
        "start": [torch.full((p.routes,), b) for b, p in enumerate(plans)],
        "learnt": [torch.arange(p.learnt) + o for p, o in zip(plans, offset, strict=True)],
        "shown": [torch.where(p.shown < 0, -1, p.shown + o) for p, o in zip(plans, offset, strict=True)],
    }
    return _Table(kernel, t_max, **{name: torch.cat(parts).to(device) for name, parts in columns.items()})
