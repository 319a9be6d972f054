"""The one sampling loop: noise -> trajectories, for any plan.

At each step the distinct states of that column are evaluated once, in batches, and every route continues from its own.
A completion is a route like any other: its first step takes the velocity its state already has, and completions of
different lengths share forwards. A batch takes its step in place before the next one is evaluated, so that memory is
one latent a route, what is kept, and one batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.latents import Columns, Room
from mmalign.routes import Routes, stacked
from mmalign.types import Plan, Trajectories, Tree, Velocity

Features = Callable[[int], Float[Tensor, "M F"]]  # how many rows the last velocity had -> what the network made of each
Start = Callable[[int], Float[Tensor, "C h w"]]  # the number of a start -> its noise
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


def by_state(nodes: Int[Tensor, "M"], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`size` different states at a time: the first route in each `[u]`, all routes in them `[m]`, and the place of the
    state of each of these among the first `[m]`."""
    inverse, representative = distinct(nodes)
    order = inverse.argsort(stable=True)
    ends = [0, *inverse.bincount(minlength=len(representative)).cumsum(0).tolist()]
    for part in chunks(len(representative), size):
        rows = order[ends[part.start] : ends[part.stop]]
        yield representative[part], rows, inverse[rows] - part.start


def noise_of(draw: Draw | None, routes: Routes, rows: Int[Tensor, "m"], k: int) -> Float[Tensor, "m C h w"]:
    """The noise of step k of these routes, which those that continue together share."""
    if draw is None:
        raise ValueError("a stochastic step needs draw, which gives its noise")
    number, first = distinct(routes.node[rows, k + 1])
    return torch.stack([draw(*routes.path(row, k)) for row in rows[first].tolist()])[number]


@torch.no_grad()
def sample(
    velocity: Velocity,
    start: Float[Tensor, "B C h w"] | Start,
    cond: Any,
    prompt: Int[Tensor, "B"],
    plan: Plan | Sequence[Plan],
    draw: Draw | None = None,
    batch: int = 128,
    storage: torch.dtype = torch.float32,
    features: Features | None = None,
    keep: Columns | None = None,
    room: Room | None = None,
) -> Trajectories:
    """Integrate each of the `B` initial noises along every route of its plan (one for all, or one each): `N`
    trajectories of trained routes, those of a start together, and the `E` finished latents of all routes.

    `prompt [B]` is each start's row in `cond`; `start` the noises, or what gives each by its number. `draw(start, step,
    path)` gives the noise of one stochastic step (an ODE needs none); `path` holds the draws taken so far (-1 for a
    deterministic step), so adding routes to a plan changes none of the others. Rows of one forward may be at different
    times. `batch` bounds the rows of one forward and changes no result. States are rounded to `storage` before anything
    is computed from them, as they will be when they are replayed. With `features`
    (`mmalign.policy.protocol.Observable`) those of all states of trained routes but the last are kept.

    `keep`: the states and means that are kept of trained routes (None: all). Memory is that of what is kept, of one
    latent a route, and of one batch. It is written into `room`, or into new tensors.

    Example, one deterministic trajectory of ten steps:

        noise = gaussian(policy.latent_shape, seed=0)[None]
        cond, index = policy.encode(["a red circle"]), torch.tensor([0])
        paths = sample(policy.velocity, noise, cond, index, ode(policy.times(10)))
        image = policy.decode(paths.finals)
    """
    device = start.device if isinstance(start, Tensor) else prompt.device
    routes = stacked([plan] * len(prompt) if isinstance(plan, Plan) else plan)
    kernel, steps = routes.kernel, routes.noise.shape[1]
    keep = Columns.all(steps) if keep is None else keep
    begin: Start = start.__getitem__ if isinstance(start, Tensor) else start
    room = room or Room.of(len(routes.trained), len(routes.start), keep, tuple(begin(0).shape), device)
    for number, rows in enumerate(routes.of_start):
        room.finals[rows] = begin(number).to(storage).to(room.finals)
    x = room.finals  # the present state of every route
    t, noise, index = routes.t.to(device), routes.noise.to(device), prompt.to(device)[routes.start.to(device)]
    place = torch.full_like(routes.start, -1)  # of each route its trajectory
    place[routes.trained] = torch.arange(len(routes.trained))
    std, pooled = torch.zeros_like(routes.noise), None

    def note(values: Float[Tensor, "M C h w"], rows: Int[Tensor, "M"], into: Tensor, column: int | None) -> None:
        """Keep the values of the rows that are trajectories, where their column is kept."""
        if column is not None:
            some = place[rows] >= 0
            into[place[rows][some].to(device), column] = values[some.to(device)]

    states, means = ({k: i for i, k in enumerate(columns)} for columns in (keep.states, keep.means))
    for rows in torch.arange(len(x)).split(batch):
        note(x[rows.to(device)], rows, room.x, states.get(0))
    for k in range(steps):
        for rows in (routes.t[:, k] == 0).nonzero()[:, 0].split(batch):  # finished: the state stays
            note(x[rows.to(device)], rows, room.mean, means.get(k))
            note(x[rows.to(device)], rows, room.x, states.get(k + 1))
        moving = (routes.t[:, k] > 0).nonzero()[:, 0]
        for first, some, of_state in by_state(routes.node[moving, k], batch):
            i, rows = moving[first].to(device), moving[some]
            v, at = velocity(x[i], t[i, k], cond, index[i]).float(), rows.to(device)
            if features is not None:
                each = features(len(i)).cpu()
                pooled = each.new_zeros(len(routes.trained), steps, each.shape[1]) if pooled is None else pooled
                trained = place[rows] >= 0
                pooled[place[rows][trained], k] = each[of_state[trained]]
            v = v[of_state.to(device)]
            mean, deviation = kernel.step(x[at], v, t[at, k], t[at, k + 1], noise[at, k], routes.t_max)
            note(mean, rows, room.mean, means.get(k))
            std[rows, k] = deviation.cpu()
            stochastic = (std[rows, k] > 0).nonzero()[:, 0]
            if len(stochastic):
                here = stochastic.to(device)
                mean[here] += deviation[here, None, None, None] * noise_of(draw, routes, rows[stochastic], k).to(mean)
            x[at] = mean.to(storage).float()
            note(x[at], rows, room.x, states.get(k + 1))
    columns = (routes.t, routes.noise, std, routes.node, prompt.cpu()[routes.start], routes.start)
    tree = Tree(*(column[routes.trained] for column in columns), prompt.cpu()[routes.start], routes.finished_by)
    return Trajectories(tree, kernel, routes.t_max, room.x, room.mean, room.finals, keep, features=pooled)
