"""The rest of a trajectory, drawn once more from one of its states: its plan, and the trajectory that it makes."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.flow.plan import complete
from mmalign.types import Kernel, Plan, Trajectories, Tree


def rest(
    t: Float[Tensor, "states"],
    noise: Float[Tensor, "T"],
    k: int,
    kernel: Kernel,
    t_max: float,
    states: Sequence[int] = (),
    lengths: int | Sequence[int] | None = None,
) -> Plan:
    """One route with the times and noise levels of a trajectory from its state k on, at t = 0 for its last k columns.
    Those of `states` (numbers in the trajectory) that come after k are completed as by `mmalign.flow.plan.complete`."""
    size = len(noise) - k
    last = torch.full((1, size + 1), -1)
    last[0, -1] = 0
    draw = torch.zeros(1, size, dtype=torch.long)
    plan = Plan(kernel, t[None, k:], noise[None, k:], draw, t_max, last)
    each = zip(states, lengths, strict=True) if isinstance(lengths, Sequence) else ((s, lengths) for s in states)
    later = [(s - k, length) for s, length in each if s > k]
    if later:
        some, bounds = zip(*later, strict=True)
        plan = complete(plan, some, bounds if isinstance(lengths, Sequence) else lengths)
    more = len(noise) - plan.steps
    blank = torch.zeros(plan.routes, more)
    end = plan.finished_by[:, -1:].expand(-1, more)
    return replace(
        plan,
        t=torch.cat([plan.t, blank], 1),
        noise=torch.cat([plan.noise, blank], 1),
        draw=torch.cat([plan.draw, blank.long()], 1),
        finished_by=torch.cat([plan.finished_by, end], 1),
    )


def grafted(
    paths: Trajectories, rests: Trajectories, row: Int[Tensor, "n"], step: Int[Tensor, "n"], requested: bool = False
) -> Trajectories:
    """`paths` with `n` more: trajectory `row[i]` up to its state `step[i]`, and from there the trajectory i of `rests`,
    which was sampled by `rest` and has the row of its prompt in the batch. They share what comes before: the nodes, and
    so the steps to train on. If another text was `requested` of the policy they are marked as `off`."""
    tree, images = paths.tree, len(paths.tree.owner)

    def join(before: Tensor, after: Tensor, shared: int) -> Tensor:
        """Of each trajectory its first columns, `step + shared` of them, then those of its rest."""
        whole = [
            torch.cat([before[r, : k + shared], after[i, shared : before.shape[1] - k]])
            for i, (r, k) in enumerate(zip(row.tolist(), step.tolist(), strict=True))
        ]
        return torch.cat([before, torch.stack(whole)])

    final = torch.where(rests.tree.final < 0, -1, rests.tree.final + images)
    joined = Tree(
        t=join(tree.t, rests.tree.t, 1),
        noise=join(tree.noise, rests.tree.noise, 0),
        std=join(tree.std, rests.tree.std, 0),
        node=join(tree.node, rests.tree.node + images, 1),
        prompt=torch.cat([tree.prompt, tree.prompt[row]]),
        member=torch.cat([tree.member, tree.member[row]]),
        owner=torch.cat([tree.owner, rests.tree.owner]),
        final=join(tree.final, final, 1),
    )
    off = paths.off
    if requested or off is not None:
        off = torch.zeros(len(tree.prompt), dtype=torch.bool) if off is None else off
        off = torch.cat([off, torch.full((len(row),), requested)])
    return replace(
        paths,
        tree=joined,
        x=join(paths.x, rests.x, 1),
        mean=join(paths.mean, rests.mean, 0),
        finals=torch.cat([paths.finals, rests.finals]),
        off=off,
    )


def taken(paths: Trajectories, rows: Int[Tensor, "n"]) -> Trajectories:
    """Some of the trajectories, in this order. Finished images keep their numbers."""
    columns = {field.name: getattr(paths.tree, field.name)[rows] for field in fields(Tree) if field.name != "owner"}
    off, features = (None if each is None else each[rows.to(each.device)] for each in (paths.off, paths.features))
    tree = Tree(**columns, owner=paths.tree.owner)
    return replace(paths, tree=tree, x=paths.x[rows], mean=paths.mean[rows], off=off, features=features)
