"""Compare reward models trained from preferences, on pairs that the verifier of the embedded world labels.

    OMP_NUM_THREADS=1 python scripts/compare_fits.py

The embedded model draws several images of each training caption. Two images of a caption with different
`shapes.partial` are a pair. Each recipe is fitted to `--pairs` of them, with held-out training captions to stop by, and
measured on pairs of other captions, beside `clip.cosine`: `validation` for choosing a recipe, `test` for the figures.
Images and fitted models are written below `--out`, where a second run continues.
"""

import json
import random
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated

import torch
import typer

from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_files
from mmalign.evaluation.generate import sample_images
from mmalign.runs.inference import load_policy
from reward_models import Prompt, files, load, pairs as pair_files
from reward_models.images import from_file
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
}


def table(captions: str, seeds: Sequence[int], out: Path) -> Path:
    """A table of the pairs of these captions: images, verifier's choice, and the gap of the two scores."""
    if (out / "pairs.jsonl").exists():
        return out / "pairs.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    prompts = prompt_files.read(locate(f"assets/prompts/{captions}.jsonl"))
    rows = sample_images(load_policy(locate("assets/tiny_sd3")), prompts, seeds, STEPS, out)
    owners = [prompt for prompt in prompts for _ in seeds]
    images = torch.cat([from_file(row["image"]) for row in rows])
    scores = load("shapes")(images, owners).column("partial").tolist()
    lines = []
    for start in range(0, len(rows), len(seeds)):
        for i, j in combinations(range(start, start + len(seeds)), 2):
            if scores[i] != scores[j]:
                lines.append(row_of(rows[i]["image"], rows[j]["image"], owners[i], scores[i] - scores[j]))
    files.write(out / "pairs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return out / "pairs.jsonl"


def row_of(a: str, b: str, prompt: Prompt, gap: float) -> dict:
    chosen = {"chosen": "a" if gap > 0 else "b", "gap": abs(gap)}
    return {"image_a": Path(a).name, "image_b": Path(b).name, "prompt": prompt.text, "id": prompt.id} | chosen


def drawn(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """So many of the pairs, the same in each run."""
    return random.Random(0).sample(list(pairs), min(count, len(pairs)))


def main(
    out: Annotated[Path, typer.Option(help="folder of images and models")] = Path("runs/fits"),
    pairs: Annotated[int, typer.Option(min=10, help="pairs to fit to")] = 2000,
    seeds: Annotated[int, typer.Option(min=2, help="images of a training caption")] = 6,
    captions: Annotated[str, typer.Option(help="those that are measured on: validation or test")] = "test",
) -> None:
    train = drawn(pair_files.read(table("train", range(seeds), out / "train")), pairs)
    held_out = pair_files.read(table(captions, range(4), out / captions))
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
