"""A few images of an iteration with what was found and what was credited where, for the report."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import save_image

from mmalign.data import prompts as prompt_files
from mmalign.training.rollout import Batch
from mmalign.training.session import Session
from mmalign.types import Judgement, Trajectories
from reward_models import files

COUNT = 6


def write(
    run: Session,
    out: Path,
    iteration: int,
    own: Batch,
    paths: Trajectories,
    judged: Judgement,
    advantage: Float[Tensor, "N T a b"] | None,
) -> None:
    """Save up to `COUNT` walks' images, evenly spaced through the whole batch, below `images/credit`, and append a row
    for each to `credit.jsonl`: reward, map of the regions, and the advantage at each stochastic step."""
    c, ranks = run.config, run.ranks
    chosen = [round(n) for n in torch.linspace(0, len(paths.prompt) - 1, min(COUNT, len(paths.prompt))).tolist()]
    held = ranks.is_local(paths.prompt).nonzero()[:, 0].cpu()
    here = torch.isin(held, torch.tensor(chosen))
    images = ranks.gather(own.images[own.paths.shown[here, -1].cpu()], "images to show")
    images = images[ranks.gather(held[here], "images to show").argsort()]
    if not ranks.main:
        return
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed)
    folder = out / "images" / "credit"
    folder.mkdir(parents=True, exist_ok=True)
    for place, n in enumerate(chosen):
        name = f"{iteration + 1:06d}-{place:02d}.png"
        end, reward = int(paths.shown[n, -1]), float(judged.reward[n, -1])
        save_image(images[place], folder / name)
        steps = (paths.std[n] > 0).nonzero()[:, 0].tolist()
        row = {
            "iteration": iteration + 1,
            "image": f"images/credit/{name}",
            "prompt": prompts[int(paths.prompt[n])].text,
            "reward": reward if reward == reward else None,
            "map": None if judged.regions is None else _rows(judged.regions[end]),
            "advantage": {} if advantage is None else {str(k): _rows(advantage[n, k]) for k in steps},
        }
        files.append(out / "credit.jsonl", row)


def _rows(values: Float[Tensor, "a b"]) -> list[list[float | None]]:
    return [[None if value != value else round(value, 4) for value in row] for row in values.tolist()]
