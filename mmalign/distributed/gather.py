"""The global batch, gathered from all ranks in single-process order: what credit and metrics are computed from."""

import torch
from torch import Tensor

from mmalign.distributed.processes import Ranks
from mmalign.types import Judgement, Trajectories


def gather(ranks: Ranks, paths: Trajectories, judged: Judgement) -> tuple[Trajectories, Judgement]:
    """The trajectories and judgements of all ranks. Latents are not gathered: their channel dimension is 0. Nor are the
    marks behind a map. `prompt` and `owner` index the prompts of the global batch."""
    what = "rewards"
    # the finished images, and so the nodes, of this rank are numbered from here
    before = sum(ranks.all_gather_object(len(paths.owner), what)[: ranks.rank])
    paths_order, ends = ranks.order(paths.prompt, what), ranks.order(paths.owner, what)
    position = ends.argsort()

    def rows(values: Tensor, order: Tensor = paths_order) -> Tensor:
        return ranks.gather(values, what)[order.to(values.device)]

    shown = rows(torch.where(paths.shown < 0, -1, paths.shown + before))
    prompt, owner = rows(ranks.global_index(paths.prompt)), rows(ranks.global_index(paths.owner), ends)
    h, w = paths.x.shape[3:]
    x, mean, last = (
        paths.x.new_zeros(*size, 0, h, w) for size in (shown.shape, (len(shown), paths.steps), owner.shape)
    )
    all_paths = Trajectories(
        paths.kernel, paths.t_max, x, mean, rows(paths.std), rows(paths.t), rows(paths.noise),
        rows(paths.node + before), prompt, rows(paths.member), last, owner,
        torch.where(shown < 0, -1, position[shown.clamp(min=0)]),
    )  # fmt: skip
    parts = rows(torch.stack([*judged.parts.values()], 1)).unbind(1)
    failed = [(end + before, reason) for end, reason in judged.failures.items()]
    failures = [failure for shard in ranks.all_gather_object(failed, what) for failure in shard]
    return all_paths, Judgement(
        rows(judged.reward),
        dict(zip(judged.parts, parts, strict=True)),
        None if judged.regions is None else rows(judged.regions, ends),
        failures={int(position[end]): reason for end, reason in sorted(failures)},
    )
