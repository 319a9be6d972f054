"""A few images of an iteration with what was found and what was credited where, for the report."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.utils import save_image

from mmalign import disk
from mmalign.types import Judgement, Trajectories
from reward_models import Prompt

COUNT = 6


def write(
    out: Path,
    iteration: int,
    prompts: Sequence[Prompt],
    images: Float[Tensor, "E 3 H W"],
    paths: Trajectories,
    judged: Judgement,
    advantage: Float[Tensor, "N T a b"] | None,
) -> None:
    """Save up to `COUNT` walks' images, evenly spaced through the batch, below `images/credit`, and append a row for
    each to `credit.jsonl`: reward, map of the regions, and the advantage at each stochastic step."""
    folder = out / "images" / "credit"
    folder.mkdir(parents=True, exist_ok=True)
    for place, n in enumerate(torch.linspace(0, len(paths.prompt) - 1, min(COUNT, len(paths.prompt))).tolist()):
        n, name = round(n), f"{iteration:06d}-{place:02d}.png"
        end, reward = int(paths.shown[n, -1]), float(judged.reward[n, -1])
        save_image(images[end], folder / name)
        steps = (paths.std[n] > 0).nonzero()[:, 0].tolist()
        row = {
            "iteration": iteration,
            "image": f"images/credit/{name}",
            "prompt": prompts[int(paths.prompt[n])].text,
            "reward": reward if reward == reward else None,
            "map": None if judged.regions is None else _rows(judged.regions[end]),
            "advantage": {} if advantage is None else {str(k): _rows(advantage[n, k]) for k in steps},
        }
        disk.append(out / "credit.jsonl", row)


def _rows(values: Float[Tensor, "a b"]) -> list[list[float | None]]:
    return [[None if value != value else round(value, 4) for value in row] for row in values.tolist()]
