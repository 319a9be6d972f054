"""The global batch, gathered from all ranks in single-process order: what credit and metrics are computed from."""

import torch
from torch import Tensor

from mmalign.distributed.processes import Ranks
from mmalign.types import Judgement, Tree


def gather(ranks: Ranks, tree: Tree, judged: Judgement) -> tuple[Tree, Judgement]:
    """The trees and judgements of all ranks, without the marks behind a map. `prompt` and `owner` index the prompts of
    the global batch."""
    what = "rewards"
    # the finished images, and so the nodes, of this rank are numbered from here
    before = sum(ranks.all_gather_object(len(tree.owner), what)[: ranks.rank])
    order, finals = ranks.order(tree.prompt, what), ranks.order(tree.owner, what)
    position = finals.argsort()

    def rows(values: Tensor, order: Tensor = order) -> Tensor:
        return ranks.gather(values, what)[order.to(values.device)]

    final = rows(torch.where(tree.final < 0, -1, tree.final + before))
    all_trees = Tree(
        t=rows(tree.t),
        noise=rows(tree.noise),
        std=rows(tree.std),
        node=rows(tree.node + before),
        prompt=rows(ranks.global_index(tree.prompt)),
        member=rows(tree.member),
        owner=rows(ranks.global_index(tree.owner), finals),
        final=torch.where(final < 0, -1, position[final.clamp(min=0)]),
    )
    parts = rows(torch.stack([*judged.parts.values()], 1)).unbind(1)
    failed = [(image + before, reason) for image, reason in judged.failures.items()]
    failures = [failure for shard in ranks.all_gather_object(failed, what) for failure in shard]
    return all_trees, Judgement(
        rows(judged.reward),
        dict(zip(judged.parts, parts, strict=True)),
        None if judged.regions is None else rows(judged.regions, finals),
        failures={int(position[image]): reason for image, reason in sorted(failures)},
        ends=None if judged.ends is None else rows(judged.ends),
        log_ratio=None if judged.log_ratio is None else rows(judged.log_ratio),
    )
