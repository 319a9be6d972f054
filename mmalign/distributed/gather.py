"""The batch of all processes, in the order that one would have it: what is credited and measured."""

import torch
from torch import Tensor

from mmalign.distributed.processes import Ranks
from mmalign.types import Judgement, Trajectories


def whole(ranks: Ranks, paths: Trajectories, judged: Judgement) -> tuple[Trajectories, Judgement]:
    """The walks and judgements of all processes, without what stays where it is: latents, which have no channel here,
    and the regions behind a map. `prompt` and `owner` are rows of the whole batch."""
    what = "rewards"
    before = sum(
        ranks.all_gather_object(len(paths.owner), what)[: ranks.rank]
    )  # own ends, and so own nodes, are numbered from here
    walks, ends = ranks.order(paths.prompt, what), ranks.order(paths.owner, what)
    place = ends.argsort()

    def rows(values: Tensor, order: Tensor = walks) -> Tensor:
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
        torch.where(shown < 0, -1, place[shown.clamp(min=0)]),
    )  # fmt: skip
    parts = rows(torch.stack([*judged.parts.values()], 1)).unbind(1)
    failed = [(end + before, why) for end, why in judged.failures.items()]
    told = [one for own in ranks.all_gather_object(failed, what) for one in own]
    return all_paths, Judgement(
        rows(judged.reward),
        dict(zip(judged.parts, parts, strict=True)),
        None if judged.regions is None else rows(judged.regions, ends),
        failures={int(place[end]): why for end, why in sorted(told)},
    )
