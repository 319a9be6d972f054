"""Train reward models with a head for each kind of fault, and measure each head on each kind.

    OMP_NUM_THREADS=1 python scripts/typed_fits.py

A pair is the drawing of a caption and that of the caption with one thing changed: an object, an attribute, the relation
or a count (`reward_models.shapes_world.changed`). So its label is exact. The head of a kind is trained by the pairs of
this kind alone, `score` by all, which are there a second time without a kind. Training pairs are of the training
captions, those that are measured of the test captions. Fitted models are written below `--out`, where a second run
continues.
"""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_files
from reward_models import Prompt, load
from reward_models.images import to_pil
from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.shapes_world import KINDS, changed, draw
from reward_models.training import evaluate, fit
from reward_models.training.folder import CARD

RECIPES = {
    "`clip_head`, linear": {"method": "clip_head"},
    "`clip_head`, `hidden=64`": {"method": "clip_head", "hidden": 64},
    "`clip`": {"method": "clip", "learning_rate": 3e-4, "average": 0.98},
}


def drawn(captions: list[Prompt], kind: str, count: int, seed: int) -> list[Pair]:
    """So many pairs of a kind, of captions in turn that have it."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    fitting = [prompt for prompt in captions if prompt.wants["include"] and changed(prompt.wants, kind, rng)]
    pairs = []
    for k in range(count):
        prompt = fitting[k % len(fitting)]
        right, wrong = draw(prompt.wants, rng), draw(changed(prompt.wants, kind, rng), rng)
        a, b = (stored(picture, f"{kind} {k} {name}") for picture, name in ((right, "right"), (wrong, "wrong")))
        pairs.append(Pair(a, b, prompt, 1.0, None, kind))
    return pairs


def stored(picture: np.ndarray, name: str) -> Stored:
    file = BytesIO()
    to_pil(torch.from_numpy(picture)[None])[0].save(file, "png")
    return Stored(name, Path("drawn"), file.getvalue())


def main(
    out: Annotated[Path, typer.Option(help="folder of fitted models")] = Path("runs/typed"),
    pairs: Annotated[int, typer.Option(min=10, help="pairs of each kind to fit to")] = 1000,
    measured: Annotated[int, typer.Option(min=10, help="pairs of each kind to measure on")] = 500,
) -> None:
    captions = {name: prompt_files.read(locate(f"assets/prompts/{name}.jsonl")) for name in ("train", "test")}
    train = [pair for kind in KINDS for pair in drawn(captions["train"], kind, pairs, 0)]
    held_out = [pair for kind in KINDS for pair in drawn(captions["test"], kind, measured, 1)]
    print(f"{len(train)} pairs to fit to, {len(held_out)} of {len({p.prompt.text for p in held_out})} test captions\n")
    print(f"| head | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    scorers = {"`clip.cosine`": load("clip")}
    for number, (name, settings) in enumerate(RECIPES.items()):
        folder = out / str(number)
        if not (folder / CARD).exists():
            fit([*train, *(replace(pair, aspect="") for pair in train)], folder, typed=True, **settings)
        scorers[name] = load("fitted", folder=str(folder))
    for name, row in evaluate(held_out, scorers)["rewards"].items():
        shares = [row["by_aspect"][kind]["accuracy"]["mean"] for kind in KINDS]
        print(f"| {name} | {' | '.join(f'{share:.3f}' for share in shares)} |")


if __name__ == "__main__":
    typer.run(main)
