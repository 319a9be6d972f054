"""Logged sample images: a few of an iteration with their reward, map and advantages, for the report."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import save_image

from mmalign.training.rollout import Rollout, decoded
from mmalign.training.session import Session
from mmalign.types import Judgement, Tree
from reward_models import files

COUNT = 6


@dataclass(frozen=True)
class Snapshot:
    """What an iteration leaves behind to look at: its rollout on this rank; tree, judgement and advantages of all."""

    rollout: Rollout
    tree: Tree
    judged: Judgement
    advantage: Float[Tensor, "N T a b"] | None


def write(run: Session, out: Path, iteration: int, snapshot: Snapshot) -> None:
    """Save up to `COUNT` images, evenly spaced through the global batch, below `images/credit`, and append a row for
    each to `credit.jsonl`: reward, map of the regions, and the advantage at each stochastic step."""
    ranks, tree, judged = run.ranks, snapshot.tree, snapshot.judged
    chosen = [round(n) for n in torch.linspace(0, len(tree.prompt) - 1, min(COUNT, len(tree.prompt))).tolist()]
    local = ranks.is_local(tree.prompt).nonzero()[:, 0]
    here = torch.isin(local, torch.tensor(chosen))
    rollout, count = snapshot.rollout, run.policy.counts["decodes"]
    images = ranks.gather(decoded(run, rollout.paths, rollout.tree.final[here, -1]), "images to show")
    run.policy.counts["decodes"] = count  # decoded once more to be looked at, which no iteration counts
    images = images[ranks.gather(local[here], "images to show").argsort()]
    if not ranks.main:
        return
    prompts = run.prompts(iteration)
    folder = out / "images" / "credit"
    folder.mkdir(parents=True, exist_ok=True)
    for index, n in enumerate(chosen):
        name = f"{iteration + 1:06d}-{index:02d}.png"
        final, reward = int(tree.final[n, -1]), float(judged.reward[n, -1])
        save_image(images[index], folder / name)
        steps = (tree.std[n] > 0).nonzero()[:, 0].tolist()
        advantage = snapshot.advantage
        row = {
            "iteration": iteration + 1,
            "image": f"images/credit/{name}",
            "prompt": prompts[int(tree.prompt[n])].text,
            "reward": reward if reward == reward else None,
            "map": None if judged.regions is None else _rows(judged.regions[final]),
            "advantage": {} if advantage is None else {str(k): _rows(advantage[n, k]) for k in steps},
        }
        files.append(out / "credit.jsonl", row)


def _rows(values: Float[Tensor, "a b"]) -> list[list[float | None]]:
    return [[None if value != value else round(value, 4) for value in row] for row in values.tolist()]
