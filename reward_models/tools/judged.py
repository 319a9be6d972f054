"""Read judged images: the images of a collection with their prompts, ground truth and scores, or any other images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from reward_models import pictures, tables
from reward_models.tools import picture_files
from reward_models.tools.picture_files import Item

TABLE = "judged_images.jsonl"  # of a folder that `mmalign collect` has written
COLUMNS = ("image", "prompt", "id", "wants", "scores")


@dataclass(frozen=True)
class Judged:
    """An image with its prompt, and its scores by "scorer.component", without those that are missing."""

    item: Item
    scores: Mapping[str, float] = field(default_factory=dict)


def read(source: Path, prompt: str | None = None, warn: Callable[[str], None] = lambda line: None) -> list[Judged]:
    """The images of a folder of `mmalign collect`, or of its table, with their scores; or those of any folder or table
    that `picture_files.read` takes, without. `prompt` is used for images that have none. `warn` gets a line if rows of
    the table have no image. ValueError, in one line, for any other source, and for an image without a prompt."""
    source = source / TABLE if (source / TABLE).is_file() else source
    judged = _collected(source, warn) if source.suffix.lower() == ".jsonl" else None
    if judged is None:
        judged = [Judged(item) for item in picture_files.read(source, prompt, warn=warn)[0]]
    if missing := [one.item.name for one in judged if one.item.prompt is None]:
        raise ValueError(f"{source}: {missing[0]} has no prompt; give the prompt of all images that have none")
    return judged


def _collected(table: Path, warn: Callable[[str], None]) -> list[Judged] | None:
    """The images of a collection's table; None for another table."""
    try:
        content = tables.read(table)
    except (OSError, ValueError) as error:
        raise ValueError(f"{table}: {getattr(error, 'strerror', None) or error}") from None
    if not {*COLUMNS} <= {*tables.columns(content, table)}:
        return None
    judged, without = [], 0
    for where, row in tables.numbered(content, table):
        if row.get("image") is None:
            without += 1
            continue
        wants, scores = row.get("wants"), row.get("scores")
        if not isinstance(wants, Mapping):
            raise ValueError(f"{where}: `wants` must be an object, the ground truth of the prompt")
        if not isinstance(scores, Mapping) or not all(type(v) in (int, float, type(None)) for v in scores.values()):
            raise ValueError(f"{where}: `scores` must be an object of numbers")
        stored = pictures.in_row(row, "image", table, where)
        text = pictures.prompt_of({"prompt": row.get("prompt"), "id": row.get("id", 0)}, None, where, ("prompt", "id"))
        item = Item(stored.name, stored.path, text and replace(text, wants=dict(wants)), stored.data)
        judged.append(Judged(item, {name: float(v) for name, v in scores.items() if v is not None}))
    if without:
        warn(f"{table}: {without} rows have no image and are left out")
    if not judged:
        raise ValueError(f"{table}: no images in it")
    return judged
