"""What an iteration's walks and rewards look like, as a row for metrics.jsonl; docs/metrics.md has the formulas."""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.config.schema import Config
from mmalign.credit.gain import balance
from mmalign.credit.groups import dead, group_std
from mmalign.distributed.processes import Ranks
from mmalign.evaluation.evaluate import deviation
from mmalign.rewards.combination import Combination
from mmalign.rewards.judge import unscored
from mmalign.training.advantages import full
from mmalign.types import Judgement, Trajectories
from reward_models import combine


def deviations(ranks: Ranks, paths: Trajectories, images: Float[Tensor, "E 3 H W"]) -> Float[Tensor, "N"]:
    """How far each walk's image of all processes is from its siblings' mean, from own walks and images."""
    found = deviation(images[paths.shown[:, -1].cpu()], paths.prompt.cpu())
    return ranks.in_order(found, paths.prompt.cpu(), "images compared with their siblings")


def of(
    c: Config, paths: Trajectories, judged: Judgement, deviation: Float[Tensor, "N"], combination: Combination
) -> dict[str, int | float]:
    """Of the walks of all processes."""
    reward = judged.reward[:, -1]
    row = {"reward": float(combination.level(judged.parts, reward).nanmean())}
    row |= {f"part/{name}": float(values.nanmean()) for name, values in judged.parts.items()}
    row |= combine.health(torch.stack([*judged.parts.values()], 1), [*judged.parts], paths.prompt.cpu(), c.dead_spread)
    row |= {
        "group_std": float(group_std(reward, paths.prompt).nanmean()),
        **({"saturated_groups": float(full(c, paths, judged).float().mean())} if c.saturated is not None else {}),
        "dead_groups": float(dead(reward, paths.prompt, c.dead_spread).mean()),
        "diversity": float(deviation.nanmean().sqrt()),
        "failed": len(unscored(paths, judged)),
        "rewards": len(paths.owner) * len(c.trained),
    }
    if c.score_states:
        row |= balance(paths, judged)
    return row | {f"std/{k}": float(q[q > 0].mean()) for k, q in enumerate(paths.std.T) if bool((q > 0).any())}
