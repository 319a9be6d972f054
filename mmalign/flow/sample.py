"""The one sampling loop: noise -> trajectories, for any plan.

At each step the distinct states of that column are evaluated once, in batches, and every route goes on from its own.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.flow.kernels import log_density, step
from mmalign.types import Latents, Plan, Trajectories, Velocity

Draw = Callable[[int, int, tuple[int, ...]], Float[Tensor, "C h w"]]  # (start, step, path of draws) -> noise


def seed_of(*key: int | str | tuple[int, ...]) -> int:
    """A 63-bit seed from any key, e.g. (run seed, iteration, prompt id, member): the same on every machine."""
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


def _number(paths: list[tuple]) -> tuple[list[int], list[int]]:
    """Number equal entries alike, in order of appearance; and the first row of each number."""
    numbers, firsts = {}, []
    for row, path in enumerate(paths):
        if path not in numbers:
            numbers[path] = len(numbers)
            firsts.append(row)
    return [numbers[path] for path in paths], firsts


@torch.no_grad()
def sample(
    velocity: Velocity,
    start: Float[Tensor, "B C h w"],
    cond,
    prompt: Int[Tensor, "B"],
    plan: Plan,
    draw: Draw | None = None,
    batch: int = 256,
    storage: torch.dtype = torch.float32,
) -> Trajectories:
    """Walk each of the `B` starting noises along every route of `plan`: `N = B R` trajectories, routes of a start
    together.

    `prompt [B]` is each start's row in `cond`. `draw(start, step, path)` gives the noise of one stochastic step (an ODE
    needs none); `path` holds the draws taken so far (-1 for a deterministic step), so adding routes to a plan changes
    none of the others.
    `batch` bounds the rows of one forward and changes no result. States are rounded to `storage` before their
    log-density is taken, as they will be when they are replayed.
    """
    starts, routes, steps = len(start), plan.routes, plan.steps
    rows = [(b, r) for b in range(starts) for r in range(routes)]
    device = start.device
    of = torch.tensor([b for b, _ in rows], device=device)
    t = plan.t.to(device)
    number, firsts = _number([(b,) for b, _ in rows])
    node, paths = [number], [(b,) for b, _ in rows]
    x = [start.to(storage).float()[of]]
    logp = torch.zeros(len(rows), steps, *start.shape[2:], device=device)
    std = torch.zeros(len(rows), steps, device=device)
    noise = plan.noise.repeat(starts, 1).to(device)
    for k in range(steps):
        v = _on_distinct(velocity, x[k], t[k], cond, prompt[of], node[k], firsts, batch)
        mean, std[:, k] = step(plan.kernel, x[k], v, t[k], t[k + 1], noise[:, k], plan.t_max)
        stochastic = std[:, k] > 0
        taken = [int(plan.draw[r, k]) if stochastic[i] else -1 for i, (_, r) in enumerate(rows)]
        paths = [(*path, number) for path, number in zip(paths, taken, strict=True)]
        numbers, firsts = _number(paths)
        z = torch.zeros_like(start)[:1].expand(len(firsts), *start.shape[1:]).clone()
        for i, row in enumerate(firsts):
            if stochastic[row]:
                z[i] = draw(rows[row][0], k, paths[row][1:])
        y = (mean + std[:, k, None, None, None] * z[numbers]).to(storage).float()
        if stochastic.any():
            logp[stochastic, k] = log_density(y[stochastic], mean[stochastic], std[stochastic, k])
        node.append(numbers)
        x.append(y)
    return Trajectories(
        plan, torch.stack(x, 1), logp, torch.tensor(node, device=device).T.contiguous(), prompt[of], of, noise, std
    )


def _on_distinct(velocity, x, t, cond, index, node, firsts, batch) -> Latents:
    """The velocity of every row, evaluated once per distinct state."""
    parts = []
    for part in chunks(len(firsts), batch):
        chosen = firsts[part]
        parts.append(velocity(x[chosen], t.expand(len(chosen)), cond, index[chosen]).float())
    return torch.cat(parts)[node]
