"""Judged images from disk, on which SRUM and R-GDPO train without sampling.

A record is a line of JSON: `image` (a file, relative to the table's folder), `prompt`, `score` of the full image, and
`regions`, each with `box` [left, top, right, bottom] in pixels, `score` in [-1, 1], and optionally `label` (what the
prompt requests there, the same in all images of a prompt) and `reason`. `size` [width, height], if given, is the size
of the image that the boxes refer to. SRUM's files (arXiv 2510.12784) are read unchanged, in the form its judge writes
(`image_file`, `vlm_rewards`, `global_layout_reward` with `global_layout_score`) and in the form its training reads
(`bad_image_file`, the judged one, and the score of the full image among the `vlm_rewards`, as that of an object called
`global_layout_reward`); the name of an object is its label. That code writes a score of exactly 0 where the judge gave
none, so that 0 is refused there.

An invalid record is reported by its line and left out: nothing is guessed from a bad box.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import BadInput
from mmalign.objectives.objective import Finished
from mmalign.policy.protocol import Policy
from mmalign.rewards.regions import marked
from reward_models import Prompt, files, tables
from reward_models.images import from_file, size_of
from reward_models.regions import Region, inside, paint

LAYOUT = "global_layout_reward"  # SRUM's name for the score of the full image


@dataclass(frozen=True)
class Record:
    """A judged image: its file, the id of its prompt, the score of the full image, and the regions."""

    image: Path
    prompt: int
    score: float
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Records:
    """The records of a file with their prompts; `refused` has a line with the reason for each one left out. Latents are
    encoded when they are first needed, and cached."""

    prompts: list[Prompt]
    records: list[Record]
    refused: list[str]
    size: tuple[int, int]
    latents: dict[Path, torch.Tensor]

    def finished(self, policy: Policy, prompts: Sequence[Prompt], grid: tuple[int, int]) -> Finished:
        """All images of these prompts, with region scores on a grid."""
        row = {prompt.id: i for i, prompt in enumerate(prompts)}
        records = [record for record in self.records if record.prompt in row]
        for record in records:
            if record.image not in self.latents:
                self.latents[record.image] = policy.encode_images(from_file(record.image).to(policy.device))[0]
        owner = torch.tensor([row[record.prompt] for record in records])
        maps = [paint(record.regions, self.size, grid) for record in records]
        return Finished(
            x=torch.stack([self.latents[record.image] for record in records]),
            prompt=owner,
            reward=torch.tensor([record.score for record in records]),
            places=torch.stack(maps),
            marks=marked([record.regions for record in records], owner.tolist(), self.size, grid),
        ).to(policy.device)


def read(path: str | Path, size: tuple[int, int]) -> Records:
    """The records of a JSONL file for a model that generates images of `size` (height, width). BadInput if the file
    cannot be read or no record in it is valid."""
    path = Path(path)
    try:
        lines = files.lines(files.text(path))
    except ValueError as error:
        raise BadInput(f"records {error}") from None
    prompts: dict[str, Prompt] = {}
    records, refused = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = _record(files.parsed(line, strict=False), path.parent, size, prompts)
            except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
                refused.append(f"record {number}: {reason}")
                continue
            records.append(record)
    if not records:
        raise BadInput(f"records {path}: none can be used" + (f"; {refused[0]}" if refused else ""))
    used = {record.prompt for record in records}
    return Records([p for p in prompts.values() if p.id in used], records, refused, size, {})


def _record(row: Any, folder: Path, size: tuple[int, int], prompts: dict[str, Prompt]) -> Record:
    if not isinstance(row, dict):
        raise ValueError("an object with image, prompt, score and regions is needed")
    regions = row.get("regions", row.get("vlm_rewards", ()))
    score = row["score"] if "score" in row else _layout_score(row, regions)
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"the score of the full image is {score!r}; a number is needed")
    image = folder / row.get("image", row.get("image_file", row.get("bad_image_file", "")))
    try:
        height, width = size_of(image)
    except ValueError as error:
        raise ValueError(f"{image.name} {error}") from None
    if (height, width) != size:
        raise ValueError(f"{image.name} is {width} x {height} pixels; the model generates {size[1]} x {size[0]}")
    if "size" in row and list(row["size"]) != [width, height]:
        raise ValueError(f"the boxes refer to an image of {row['size']} pixels, {image.name} is {[width, height]}")
    regions = tuple(_region(region) for region in regions if region.get("object") != LAYOUT)
    inside(regions, size)
    from_file(image)  # a truncated image is refused here, with its line
    text = tables.wording(row["prompt"])
    prompt = prompts.setdefault(text, Prompt(text, {}, len(prompts)))
    return Record(image, prompt.id, float(score), regions)


def _layout_score(row: Mapping[str, Any], regions: Sequence[Mapping[str, Any]]) -> Any:
    """The score of the full image in SRUM's own files."""
    among_regions = next((region for region in regions if region.get("object") == LAYOUT), None)
    candidates = (row.get(LAYOUT), row.get("global"), among_regions)
    given = next((value for value in candidates if value is not None), None)
    if given is None:
        raise ValueError(f"no score of the full image: {LAYOUT} is needed, or score")
    score = given.get("global_layout_score", given.get("score")) if isinstance(given, dict) else given
    if score == 0:
        raise ValueError(f"{LAYOUT} is 0, which stands for a judge without an answer")
    return score


def _region(row: Mapping[str, Any]) -> Region:
    box, score = row.get("box", row.get("bbox")), row["score"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
        raise ValueError(f"box {box!r} is not four numbers")
    if not isinstance(score, int | float):
        raise ValueError(f"the score of a region is {score!r}; a number in [-1, 1] is needed")
    return Region(tuple(box), score, str(row.get("label", row.get("object", ""))), str(row.get("reason", "")))
