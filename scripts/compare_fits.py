"""Compare reward models trained from preferences, on pairs that the verifier of the embedded world labels.

    OMP_NUM_THREADS=1 python scripts/compare_fits.py

`mmalign collect` draws several images of each training caption. Two images of a caption with different
`shapes.partial` are a pair. Each recipe is fitted to `--pairs` of them, spread evenly over the captions, with held-out
training captions to stop by, and measured on pairs of other captions, beside `clip.cosine`: `validation` for choosing a
recipe, `test` for the figures. Images and fitted models are written below `--out`, where a second run continues.
"""

import random
import time
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated

import typer

import mmalign
from reward_models import load, pairs as pair_files
from reward_models.pairs import Pair
from reward_models.training import evaluate, fit
from reward_models.training.folder import CARD

STEPS = 6
RECIPES = {
    "clip_head, linear": {"method": "clip_head"},
    "clip_head, 5 members": {"method": "clip_head", "members": 5},
    "clip_head, MLP of 64": {"method": "clip_head", "hidden": 64, "weight_decay": 0.03},
    "CLIP, fine-tuned": {"method": "clip", "learning_rate": 3e-4},
    "CLIP, fine-tuned, margin": {"method": "clip", "learning_rate": 3e-4, "margin": 1.0},
    "CLIP, fine-tuned, margin, average": {"method": "clip", "learning_rate": 3e-4, "margin": 1.0, "average": 0.98},
    "CLIP, 5 members": {"method": "clip", "learning_rate": 3e-4, "margin": 1.0, "average": 0.98, "members": 5},
}


def collected(captions: str, seeds: Sequence[int], out: Path) -> list[Pair]:
    """The unequal pairs of images of these captions, with the verifier's choice and the gap of the two scores."""
    prompts = f"assets/prompts/{captions}.jsonl"
    by = {"by": "shapes.partial", "pairs": "all", "steps": STEPS}
    mmalign.collect("assets/tiny_sd3", prompts, "shapes", seeds=seeds, out=out, **by)
    return pair_files.read(out / "pairs.jsonl")


def even(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """So many of the pairs, the same in each run, and of each caption as many as of any other that has them."""
    of_caption: dict[str, list[Pair]] = {}
    for pair in random.Random(0).sample(list(pairs), len(pairs)):
        of_caption.setdefault(pair.prompt.text, []).append(pair)
    rounds = chain.from_iterable(zip_longest(*of_caption.values()))
    return [pair for pair in rounds if pair is not None][:count]


def main(
    out: Annotated[Path, typer.Option(help="folder of images and models")] = Path("runs/fits"),
    pairs: Annotated[int, typer.Option(min=10, help="pairs to fit to")] = 2000,
    seeds: Annotated[int, typer.Option(min=2, help="images of a training caption")] = 6,
    captions: Annotated[str, typer.Option(help="those that are measured on: validation or test")] = "test",
) -> None:
    train = even(collected("train", range(seeds), out / "train"), pairs)
    held_out = collected(captions, range(4), out / captions)
    scorers, seconds = {"clip": load("clip")}, {}
    for number, (name, settings) in enumerate(RECIPES.items()):
        folder, start = out / f"{number}", time.monotonic()
        if not (folder / CARD).exists():
            fit(train, folder, **settings)
        seconds[name] = time.monotonic() - start
        scorers[name] = load("fitted", folder=str(folder))
    result = evaluate(held_out, scorers)
    print(f"{len(train)} pairs to fit to; {captions}: {result['pairs']} pairs of {result['prompts']} captions\n")
    print("| | held-out pair accuracy | 95 % | against `clip.cosine`, p (McNemar) | seconds |\n|---|---|---|---|---|")
    for name, scorer in scorers.items():
        row = result["rewards"][f"{name}.{scorer.names[0]}"]["with_ties"]
        p = "" if name == "clip" else f"{result['compared'][f'clip.cosine ~ {name}.score']['p']:.2g}"
        label = "`clip.cosine`" if name == "clip" else name
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        print(f"| {label} | {row['mean']:.3f} | {interval} | {p} | {seconds.get(name, 0):.0f} |")


if __name__ == "__main__":
    typer.run(main)
