"""Find the pictures of a folder or table, with their prompts and people's choices between them."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from reward_models import files, images, pairs, pictures, tables
from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.scoring import Picture
from reward_models.tables import Table
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
    "noise_seed",
}  # fmt: skip
READERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Item:
    """An image to score. `name` is its name in the source; `prompt` is None if the source has none. `data` is the
    content of the picture's file if it is stored in a table or tar; `path` is then that table or tar. `reason` is why
    there is no picture."""

    name: str
    path: Path
    prompt: Prompt | None
    data: bytes | None = field(default=None, repr=False)
    reason: str = ""

    @property
    def file(self) -> Path | None:
        """The picture's file; None if its content is here."""
        return self.path if self.data is None else None

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


def read(
    source: Path, prompt: str | None = None, out: Path | None = None, warn: Callable[[str], None] = lambda line: None
) -> tuple[list[Item], list[Choice]]:
    """The images of a folder or table, and the choices of a table of pairs.

    A folder holds pictures, each with its prompt in a text file of the same name beside it, or GenEval's layout
    (`00000/metadata.jsonl`, `00000/samples/*.png`), or a table `metadata.jsonl`, `.csv` or `.parquet`, or
    `scores.jsonl`. A table (`reward_models.tables`) has columns `image` (or `file_name`), relative to the table, and
    `prompt`, optionally `id`; others are the prompt's ground truth. An image may be the bytes of a file, or
    `{bytes, path}`, the form that `datasets` writes. A table of pairs has one of the layouts of `reward_models.pairs`;
    the choices then include its ties. `prompt` is used for all images that have none. `out`, the file of the scores, is
    not mistaken for the table of a folder. `warn` is that of `pairs.read`. ValueError, in one line, for any other
    source.
    """
    if prompt is not None:
        prompt = pictures.worded(prompt, "--prompt")
    if source.is_dir():
        table = _index(source, out)
        if table is None:
            return _folder(source, prompt), []
        source = table
    if source.suffix.lower() not in tables.ENDINGS:
        raise ValueError(f"{source}: a folder or a table ({', '.join(tables.ENDINGS)}) is needed")
    items: dict[tuple[str, str | None], Item] = {}
    columns = tables.columns(_table(source), source)
    if pairs.layout_of(columns) or "image_a" in columns:
        choices = [_choice(pair, items) for pair in pairs.read(source, prompt, warn)]
    else:
        choices, by_name = [], {}
        for where, row in _rows(source):
            single = "file_name" if "file_name" in row and "image" not in row else "image"
            stored = pictures.distinct(pictures.in_row(row, single, source, where), by_name, where)
            _enter(stored, pictures.prompt_of(row, prompt, where, COLUMNS, source.parent), items)
    if not items:
        raise ValueError(f"{source}: no rows in it")
    return list(items.values()), choices


def _choice(pair: Pair, items: dict[tuple[str, str | None], Item]) -> Choice:
    """The choice of a pair, whose images are entered in the items."""
    a, b = (_enter(stored, pair.prompt, items).name for stored in (pair.a, pair.b))
    better, worse = (b, a) if pair.preference < 0.5 else (a, b)
    return Choice(pair.prompt and pair.prompt.text, better, worse, pair.preference == 0.5)


def _enter(stored: Stored, prompt: Prompt | None, items: dict[tuple[str, str | None], Item]) -> Item:
    item = Item(stored.name, stored.path, prompt, stored.data)
    return items.setdefault(item.key, item)


def _table(path: Path) -> Table:
    try:
        return tables.read(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _index(folder: Path, out: Path | None) -> Path | None:
    """The table of the pictures of a folder, if there is one."""
    candidates = [folder / name for name in INDEX if (folder / name).is_file()]
    if len(candidates) > 1:
        raise ValueError(f"{folder}: {' and '.join(path.name for path in candidates)}; give one of them as the source")
    scores = folder / "scores.jsonl"
    if not candidates and scores.is_file() and not (out is not None and out.exists() and out.samefile(scores)):
        candidates = [scores]
    return candidates[0] if candidates else None


def _rows(path: Path) -> Iterator[tuple[str, tables.Row]]:
    """The position of each row of a table, in the form used in messages, and the row."""
    return tables.numbered(_table(path), path)


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
        return Prompt(pictures.worded("\n".join(files.lines(files.text(text))).strip(), str(text)))
    if path.parent.name == "samples" and metadata.is_file():
        rows, number = [row for _, row in _rows(metadata)], path.parent.parent.name
        if len(rows) != 1:
            raise ValueError(f"{metadata}: {len(rows)} rows; GenEval has one for the samples of a prompt")
        row = rows[0] | ({"id": number} if tables.whole(number) is not None else {})
        return pictures.prompt_of(row, prompt, str(metadata), COLUMNS)
    return None if prompt is None else Prompt(prompt)


def picture(item: Item) -> Picture:
    """The picture of an item. ValueError, in one line, if it cannot be read."""
    if item.reason:
        raise ValueError(item.reason)
    return images.from_file(item.path) if item.data is None else images.from_bytes(item.data)


def animations(items: Sequence[Item]) -> int:
    """The number of pictures with more than one frame; only the first frame is scored."""
    with ThreadPoolExecutor(READERS) as readers:
        return sum(readers.map(lambda item: images.animated(item.file, item.data), items))
