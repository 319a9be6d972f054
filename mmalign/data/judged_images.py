"""Images that were judged before: what SRUM and R-GDPO learn from without sampling.

A record is a line of JSON: `image` (a file, from the table's folder), `prompt`, `score` of the whole image, and
`regions`, each with `box` [left, top, right, bottom] in pixels, `score` in [-1, 1], and optionally `label` (what was
asked for there, the same in all images of a prompt) and `reason`. `size` [width, height], if given, is that of the
image the boxes refer to. SRUM's own files (arXiv 2510.12784) are read as they are, in the form its judge writes
(`image_file`, `vlm_rewards`, `global_layout_reward` with `global_layout_score`) and in the form its training reads
(`bad_image_file`, the judged one, and the score of the whole among the `vlm_rewards`, as that of an object called
`global_layout_reward`); the name of an object is its label. Such a score of exactly 0 is what that code writes where
the judge gave none, and is refused.

A record that cannot be right is refused by its line and left out: nothing is guessed from a bad box.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.errors import BadInput
from mmalign.objectives.objective import Finished
from mmalign.rewards.regions import marked
from reward_models import Prompt, files, tables
from reward_models.images import from_file, size_of
from reward_models.regions import Region, inside, paint

LAYOUT = "global_layout_reward"  # SRUM's name for the score of the whole image


@dataclass(frozen=True)
class Record:
    """A judged image: its file, the row of its prompt, the score of the whole, and the regions."""

    image: Path
    prompt: int
    score: float
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Records:
    """Records by prompt; `refused` says which lines were left out, and why. Latents are encoded when they are first
    needed and kept."""

    prompts: list[Prompt]
    records: list[Record]
    refused: list[str]
    size: tuple[int, int]
    latents: dict[Path, torch.Tensor]

    def finished(self, policy, prompts: Sequence[Prompt], grid: tuple[int, int]) -> Finished:
        """All images of these prompts."""
        row = {prompt.id: i for i, prompt in enumerate(prompts)}
        found = [record for record in self.records if record.prompt in row]
        for record in found:
            if record.image not in self.latents:
                self.latents[record.image] = policy.encode_images(from_file(record.image).to(policy.device))[0]
        owner = torch.tensor([row[record.prompt] for record in found])
        places = [paint(record.regions, self.size, grid) for record in found]
        return Finished(
            x=torch.stack([self.latents[record.image] for record in found]),
            prompt=owner.to(policy.device),
            reward=torch.tensor([record.score for record in found]),
            places=torch.stack(places),
            marks=marked([record.regions for record in found], owner.tolist(), self.size, grid),
        )


def read(path: str | Path, size: tuple[int, int]) -> Records:
    """The records of a JSONL file for a model that makes images of `size` (height, width). Raises BadInput if the file
    cannot be read or no record in it is right."""
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
                why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
                refused.append(f"record {number}: {why}")
                continue
            records.append(record)
    if not records:
        raise BadInput(f"records {path}: none can be used" + (f"; {refused[0]}" if refused else ""))
    kept = {record.prompt for record in records}
    return Records([p for p in prompts.values() if p.id in kept], records, refused, size, {})


def _record(row: Any, folder: Path, size: tuple[int, int], prompts: dict[str, Prompt]) -> Record:
    if not isinstance(row, dict):
        raise ValueError("an object with image, prompt, score and regions is needed")
    image = folder / row.get("image", row.get("image_file", row.get("bad_image_file", "")))
    regions = row.get("regions", row.get("vlm_rewards", ()))
    whole = row["score"] if "score" in row else _layout_score(row, regions)
    if isinstance(whole, bool) or not isinstance(whole, int | float) or whole != whole or abs(whole) == float("inf"):
        raise ValueError(f"the score of the whole image is {whole!r}; a number is needed")
    try:
        height, width = size_of(image)
    except ValueError as error:
        raise ValueError(f"{image.name} {error}") from None
    if (height, width) != size:
        raise ValueError(f"{image.name} is {width} x {height} pixels; the model makes {size[1]} x {size[0]}")
    if "size" in row and list(row["size"]) != [width, height]:
        raise ValueError(f"the boxes refer to an image of {row['size']} pixels, {image.name} is {[width, height]}")
    regions = tuple(_region(own) for own in regions if own.get("object") != LAYOUT)
    inside(regions, size)
    from_file(image)  # a picture that breaks off is refused here, with its line
    text = tables.wording(row["prompt"])
    prompt = prompts.setdefault(text, Prompt(text, {}, len(prompts)))
    return Record(image, prompt.id, float(whole), regions)


def _layout_score(row: Mapping[str, Any], regions: Sequence[Mapping[str, Any]]) -> Any:
    """Of the whole image, from SRUM's own files."""
    among = next((own for own in regions if own.get("object") == LAYOUT), None)
    given = next((own for own in (row.get(LAYOUT), row.get("global"), among) if own is not None), None)
    if given is None:
        raise ValueError(f"no score of the whole image: {LAYOUT} is needed, or score")
    score = given.get("global_layout_score", given.get("score")) if isinstance(given, dict) else given
    if score == 0:
        raise ValueError(f"{LAYOUT} is 0, which stands for a judge that gave none")
    return score


def _region(row: Mapping[str, Any]) -> Region:
    box, score = row.get("box", row.get("bbox")), row["score"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
        raise ValueError(f"box {box!r} is not four numbers")
    if not isinstance(score, int | float):
        raise ValueError(f"the score of a region is {score!r}; a number in [-1, 1] is needed")
    return Region(tuple(box), score, str(row.get("label", row.get("object", ""))), str(row.get("reason", "")))
