"""Find the pictures of a folder or table, with their prompts and people's choices between them."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reward_models import files, images, tables
from reward_models.scoring import Picture
from reward_models.types import Prompt

# the endings of picture files; each such file gets a row, with scores or with the reason why there are none
PICTURES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif",
    ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".dds", ".ico",
    ".icns", ".pcx", ".psd", ".qoi", ".sgi", ".exr", ".hdr", ".svg", ".eps", ".dng", ".cr2", ".nef", ".arw",
)  # fmt: skip
INDEX = (
    "metadata.jsonl",
    "metadata.csv",
    "metadata.parquet",
)  # the table of a folder of pictures, named as by `datasets`
ASIDE = {"checkpoints", "thumbnails", "thumbs", "__macosx", "@eadir"}  # folders of pictures that are not samples
COLUMNS = {  # columns of a table that are not ground truth
    "image", "file_name", "prompt", "id", "scores", "failures", "critiques", "requests", "replies", "places", "made_of",
    "noise_seed", "image_a", "image_b", "chosen",
}  # fmt: skip
READERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Item:
    """An image to score. `name` is its name in the source; `prompt` is None if the source has none. `data` is the
    content of the picture's file if it is stored in a table; `path` is then the table."""

    name: str
    path: Path
    prompt: Prompt | None
    data: bytes | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str, str | None]:
        return self.name, self.prompt.text if self.prompt else None


@dataclass(frozen=True)
class Choice:
    """A person's choice between two images of one prompt, both named as in the items. A `tie` prefers neither."""

    prompt: str | None
    better: str
    worse: str
    tie: bool = False


def read(source: Path, prompt: str | None = None, out: Path | None = None) -> tuple[list[Item], list[Choice]]:
    """The images of a folder or table, and the choices of a table of pairs.

    A folder holds pictures, each with its prompt in a text file of the same name beside it, or GenEval's layout
    (`00000/metadata.jsonl`, `00000/samples/*.png`), or a table `metadata.jsonl`, `.csv` or `.parquet`, or
    `scores.jsonl`. A table (`reward_models.tables`) has columns `image` (or `file_name`), relative to the table, and
    `prompt`, optionally `id`; others are the prompt's ground truth. An image may be the bytes of a file, or
    `{bytes, path}`, the form that `datasets` writes. A table of pairs has `image_a`, `image_b` and `chosen` (a, b or
    tie). `prompt` is used for all images that have none. `out`, the file of the scores, is not mistaken for the table
    of a folder. ValueError, in one line, for any other source.
    """
    if prompt is not None:
        prompt = _worded(prompt, "--prompt")
    if source.is_dir():
        table = _index(source, out)
        if table is None:
            return _folder(source, prompt), []
        source = table
    if source.suffix.lower() not in tables.ENDINGS:
        raise ValueError(f"{source}: a folder or a table ({', '.join(tables.ENDINGS)}) is needed")
    items: dict[tuple[str, str | None], Item] = {}
    choices = []
    for where, row in _rows(source):
        of_row = _prompt(row, prompt, where)
        of_row = replace(of_row, wants=images.beside(of_row.wants, source.parent)) if of_row else None
        text = of_row.text if of_row else None
        single = "file_name" if "file_name" in row and "image" not in row else "image"
        columns = ("image_a", "image_b") if "image_a" in row else (single,)
        names = []
        for column in columns:
            item = _item(row, column, source, of_row, where)
            if item.data is not None and items.get(item.key, item).data != item.data:
                item = replace(item, name=f"{item.name} of {where.rpartition(', ')[2]}")
            names.append(items.setdefault(item.key, item).name)
        if len(columns) == 2:
            chosen = str(row.get("chosen")).lower()
            if chosen not in ("a", "b", "tie"):
                raise ValueError(f"{where}: `chosen` must be a, b or tie, got {row.get('chosen')!r}")
            choices.append(Choice(text, *(names[::-1] if chosen == "b" else names), tie=chosen == "tie"))
    if not items:
        raise ValueError(f"{source}: no rows in it")
    return list(items.values()), choices


def _index(folder: Path, out: Path | None) -> Path | None:
    """The table of the pictures of a folder, if there is one."""
    candidates = [folder / name for name in INDEX if (folder / name).is_file()]
    if len(candidates) > 1:
        raise ValueError(f"{folder}: {' and '.join(path.name for path in candidates)}; give one of them as the source")
    scores = folder / "scores.jsonl"
    if not candidates and scores.is_file() and not (out is not None and out.exists() and out.samefile(scores)):
        candidates = [scores]
    return candidates[0] if candidates else None


def _item(row: Mapping[str, Any], column: str, source: Path, prompt: Prompt | None, where: str) -> Item:
    cell = row.get(column)
    stored = cell if isinstance(cell, Mapping) else {"bytes" if isinstance(cell, bytes) else "path": cell}
    name, data = stored.get("path"), stored.get("bytes")
    if not name and not data:
        raise ValueError(f"{where}: no `{column}`; columns are {', '.join(row)}")
    if not isinstance(name, str | None) or not isinstance(data, bytes | None):
        raise ValueError(f"{where}: `{column}` must be the name of a file or its bytes")
    if data is not None:
        return Item(name or f"{column} of {where.rpartition(', ')[2]}", source, prompt, data)
    return Item(name, source.parent / files.named(name), prompt)


def _worded(text: Any, where: str) -> str:
    try:
        return tables.wording(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _prompt(row: Mapping[str, Any], other: str | None, where: str) -> Prompt | None:
    text = _worded(row["prompt"], where) if row.get("prompt") is not None else other
    if text is None:
        return None
    number = tables.whole(row.get("id", 0))
    if number is None:
        raise ValueError(f"{where}: `id` must be a whole number, got {row['id']!r}")
    return Prompt(text, {key: value for key, value in row.items() if key not in COLUMNS}, number)


def _rows(path: Path) -> Iterator[tuple[str, tables.Row]]:
    """The position of each row of a table, in the form used in messages, and the row."""
    try:
        for number, row in tables.read(path).rows(None):
            yield f"{path}, row {number + 1}", row
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _folder(folder: Path, prompt: str | None) -> list[Item]:
    paths = [path for path in _files(folder) if not _reason_left_out(folder, path)]
    if not paths:
        raise ValueError(f"{folder}: no pictures in it ({', '.join(PICTURES)})")
    items = [Item(_printable(path), folder / path, _prompt_of_file(folder / path, prompt)) for path in paths]
    if len({item.name for item in items}) < len(items):
        raise ValueError(f"{folder}: two pictures have the same name once bytes that are not UTF-8 are escaped")
    return items


def _files(folder: Path) -> list[Path]:
    """The files of a folder, relative to it, in order."""
    return sorted(Path(path, name).relative_to(folder) for path, _, names in os.walk(folder) for name in names)


def _reason_left_out(folder: Path, path: Path) -> str:
    """The reason why a file of a folder is not scored, "" if it is a picture to score."""
    if any(name.startswith(".") for name in path.parts):
        return "hidden"
    if any(name.lower() in ASIDE for name in path.parts[:-1]):
        return "of checkpoints or thumbnails"
    if path.stem == "grid" and (folder / path).with_name("samples").is_dir():
        return "GenEval's grid"
    return "" if path.suffix.lower() in PICTURES else _printable(Path(path.suffix.lower() or path.name))


def left_out(source: Path, items: Sequence[Item]) -> str:
    """The files of a folder that are not among the items, counted by kind, without prompts and tables; "" if there are
    none."""
    if not source.is_dir():
        return ""
    used = {item.path for item in items}
    used |= {path.with_suffix(".txt") for path in used}
    others = [path for path in _files(source) if source / path not in used]
    others = [path for path in others if path.name not in (*INDEX, "scores.jsonl")]
    kinds = Counter(_reason_left_out(source, path) or "picture that the table does not name" for path in others)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def _printable(path: Path) -> str:
    """The name of a file, with `\\xff` for a byte that is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _prompt_of_file(path: Path, prompt: str | None) -> Prompt | None:
    """The prompt of a picture: from the text file of its name, from GenEval's metadata one folder up, or `prompt`."""
    metadata, text = path.parent.parent / "metadata.jsonl", path.with_suffix(".txt")
    if text.is_file():
        return Prompt(_worded("\n".join(files.lines(files.text(text))).strip(), str(text)))
    if path.parent.name == "samples" and metadata.is_file():
        rows, number = [row for _, row in _rows(metadata)], path.parent.parent.name
        if len(rows) != 1:
            raise ValueError(f"{metadata}: {len(rows)} rows; GenEval has one for the samples of a prompt")
        return _prompt(rows[0] | ({"id": number} if tables.whole(number) is not None else {}), prompt, str(metadata))
    return None if prompt is None else Prompt(prompt)


def picture(item: Item) -> Picture:
    """The picture of an item. ValueError, in one line, if it cannot be read."""
    return images.from_file(item.path) if item.data is None else images.from_bytes(item.data)


def animations(items: Sequence[Item]) -> int:
    """The number of pictures with more than one frame; only the first frame is scored."""
    with ThreadPoolExecutor(READERS) as readers:
        return sum(readers.map(lambda item: images.animated(None if item.data else item.path, item.data), items))
