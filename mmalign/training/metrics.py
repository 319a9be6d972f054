"""Per-iteration rollout metrics, as a row for metrics.jsonl; docs/metrics.md has the formulas."""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.credit.groups import dead, group_std
from mmalign.distributed.processes import Ranks
from mmalign.rewards.judge import stop_if_failing, unscored
from mmalign.selection.scouts import correlation
from mmalign.training.rollout import Rollout
from mmalign.training.session import Session
from mmalign.types import Judgement, Tree
from reward_models import combine


def deviations(ranks: Ranks, rollout: Rollout) -> Float[Tensor, "N"]:
    """How far each trajectory's image, over all ranks, is from its siblings' mean."""
    return ranks.in_order(rollout.deviation, rollout.tree.prompt, "images compared with their siblings")


def level(run: Session, judged: Judgement, iteration: int) -> Float[Tensor, "N"]:
    """The progress of each trajectory's image."""
    return run.rewards.combination(iteration).level(judged.parts, judged.reward[:, -1])


def scout_metrics(run: Session, rollout: Rollout, tree: Tree, judged: Judgement) -> dict[str, int | float]:
    """How well the scouts of all ranks have predicted rewards, and how many could not be scored."""
    if rollout.scouts is None:
        return {}
    scouted = run.ranks.in_order(rollout.scouts.reward, rollout.tree.prompt, "rewards of scouts")
    within = correlation(scouted, judged.reward[:, -1], tree.prompt)
    failed = run.ranks.all_reduce_sum({"scouts/failed": rollout.scouts.failed}, "counts")
    return {"scouts/correlation": within} | failed


def graph_metrics(run: Session) -> dict[str, int]:
    """How many images all ranks have scored in a graph, times scorers, and how many of them failed there. Raises
    Failed, with a reason, where too many did."""
    if not run.config.objective.decoded:
        return {}
    graph, ranks = run.rewards.graph, run.ranks
    gathered = ranks.all_gather_object([*graph.failures.values()], "failed scores")
    reasons = [reason for each in gathered for reason in each]
    counts = ranks.all_reduce_sum({"images": graph.images, "scores": graph.scores}, "counts")
    stop_if_failing(dict(enumerate(reasons)), counts["images"], run.config.max_failed)
    return {"rewards_in_graph": counts["scores"], "failed_in_graph": len(reasons)}


def metrics(
    run: Session, tree: Tree, judged: Judgement, deviation: Float[Tensor, "N"], iteration: int
) -> dict[str, int | float]:
    """A row over the trajectories of all ranks."""
    c, reward = run.config, judged.reward[:, -1]
    scouts = 0 if c.scouts is None else c.prompts_per_iteration * c.scouts.images(c.seeds)
    finished = len(tree.final[:, -1].unique())
    row = {"reward": float(level(run, judged, iteration).nanmean())}
    row |= {f"part/{name}": float(values.nanmean()) for name, values in judged.parts.items()}
    row |= combine.health(torch.stack([*judged.parts.values()], 1), [*judged.parts], tree.prompt, c.dead_spread)
    row["group_std"] = float(group_std(reward, tree.prompt).nanmean())
    if c.advantage is not None and c.advantage.saturated is not None:
        row["saturated_groups"] = float(c.advantage.full(tree, judged).float().mean())
    row |= {
        "dead_groups": float(dead(reward, tree.prompt, c.dead_spread).mean()),
        "diversity": float(deviation.nanmean().sqrt()),
        "failed": len(unscored(tree, judged)),
        "rewards": (len(tree.owner) + scouts) * (len(c.trained) - len(c.late)) + (finished + scouts) * len(c.late),
    }
    if c.credit is not None:
        row |= c.credit.statistics(tree, judged)
    return row | {f"std/{k}": float(q[q > 0].mean()) for k, q in enumerate(tree.std.T) if bool((q > 0).any())}
