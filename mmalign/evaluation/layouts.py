"""Write evaluated images in the folder layout that a benchmark's scripts expect."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.utils import save_image

from mmalign.errors import BadInput
from mmalign.evaluation import Layout
from mmalign.evaluation.comparison import rises
from mmalign.evaluation.evaluate import Evaluation, noise_seed
from mmalign.runs import jsonl
from reward_models import Prompt, files
from reward_models.meaning import clusters

NAMES: dict[Layout, str] = {  # of an image: `row` counts the prompts, `member` a prompt's images, `image` all of them
    "mmalign": "{prompt.id:05d}-{member}.png",
    "geneval": "{row:05d}/samples/{member:04d}.png",
    "t2i_compbench": "samples/{prompt.text}_{image:06d}.png",
}


DIGITS = 6  # decimals of a score in `scores.jsonl`
ROUNDING = 0.5 * 10**-DIGITS  # the largest error of such a score
LONGEST = 255 - len("_000000.png")  # bytes; common file systems take names of 255


def fits(layout: Layout, prompts: Sequence[Prompt], folder: Path) -> None:
    """Raise BadInput where the benchmark's own scripts would misread the files that `write` is about to create.

    They score every file in the folder. GenEval's script reads from a prompt's metadata what to look for;
    T2I-CompBench's scripts take the prompt from the file's name, up to the first underscore, so a name cannot be
    changed without changing what is scored.
    """
    if layout == "mmalign":
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(
            f"--out {folder}: layout {layout} needs a new or empty folder; its scripts score every file in it"
        )
    for prompt in prompts:
        if layout == "geneval":
            objects = [*(prompt.wants.get("include") or [{}]), *prompt.wants.get("exclude", ())]
            if "tag" not in prompt.wants or not all({"class", "count"} <= set(each) for each in objects):
                raise BadInput(f"layout geneval needs `tag` and `include` with class and count; not in {prompt.text!r}")
        elif re.search(r"[/_\x00-\x1f\x7f]", prompt.text) or len(prompt.text.encode()) > LONGEST:
            raise BadInput(
                "layout t2i_compbench names files by the prompt: it may have no /, _ or control character and at most "
                f"{LONGEST} bytes, got {prompt.text!r}"
            )


def write(result: Evaluation, prompts: Sequence[Prompt], folder: Path, layout: Layout = "mmalign") -> None:
    """Write one PNG per image, named by the layout, and `scores.jsonl` with a row for each. `geneval` has each prompt's
    metadata beside its images."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scores.jsonl").open("wb") as file:
        for i, (p, member) in enumerate(zip(result.prompt.tolist(), result.member.tolist(), strict=True)):
            prompt = prompts[p]
            name = NAMES[layout].format(prompt=prompt, row=p, member=member, image=i)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_image(result.images[i], folder / name)
            if layout == "geneval" and member == 0:
                metadata = json.dumps({**prompt.wants, "prompt": prompt.text})
                files.write((folder / name).parents[1] / "metadata.jsonl", metadata + "\n")
            scores = {
                key: None if value[i].isnan() else round(float(value[i]), DIGITS) for key, value in result.parts.items()
            }
            row = {
                **prompt.wants,
                "image": name,
                "prompt": prompt.text,
                "id": prompt.id,
                "noise_seed": noise_seed(prompt, member),
                "scores": scores,
                "places": {key: rows[i] for key, rows in result.places.items() if rows[i] is not None},
            }
            file.write((json.dumps(row) + "\n").encode())


def changes(folder: Path, result: Evaluation, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Of each component the mean rise over the images that `write` has put into a folder, on the prompts and noises of
    `result`: `rise/NAME`; `size/NAME`, in standard deviations between those images; `p/NAME`, of a paired t-test.
    Components without a p-value are left out."""
    scores = {row["noise_seed"]: row["scores"] for row in jsonl.rows(folder / "scores.jsonl")}
    images = zip(result.prompt.tolist(), result.member.tolist(), strict=True)
    earlier = [scores.get(noise_seed(prompts[p], member), {}) for p, member in images]
    names = [name for name in result.parts if any(row.get(name) is not None for row in earlier)]
    before = {name: torch.tensor([float("nan") if (v := row.get(name)) is None else v for row in earlier])
              for name in names}  # fmt: skip
    cluster = clusters(prompts[p].text for p in result.prompt.tolist())
    compared = rises(before, {name: result.parts[name] for name in names}, cluster, ROUNDING)
    row = {}
    for name, rise in compared.items():
        if rise["p"] == rise["p"]:
            spread = float(before[name][~before[name].isnan()].std())
            row |= {f"rise/{name}": rise["rise"], f"p/{name}": rise["p"]}
            row |= {f"size/{name}": rise["rise"] / spread} if spread > ROUNDING else {}
    return row
