"""Score what lies on disk: a folder or a table of images in, a table of scores out.

Rows are written as they are scored, so that a run that was cut off goes on where it stopped. An image that cannot be
read is a row with a reason, and the rest goes on. Memory holds two batches of images, whatever their number and size,
and the pictures that a table holds itself.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from reward_models import files, images, limits, overlay as heat, tables
from reward_models.cache import Cached
from reward_models.lengths import cut
from reward_models.scoring import TEXTS, Picture, score_pictures
from reward_models.types import Prompt, RewardModel

Row = dict[str, Any]
# whatever a file so named holds, it is a row: scored, or with the reason why not
PICTURES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif",
    ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".dds", ".ico",
    ".icns", ".pcx", ".psd", ".qoi", ".sgi", ".exr", ".hdr", ".svg", ".eps", ".dng", ".cr2", ".nef", ".arw",
)  # fmt: skip
OUTPUTS = (".jsonl", ".csv", ".parquet")
INDEX = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as `datasets` names the table of a folder of pictures
ASIDE = {"checkpoints", "thumbnails", "thumbs", "__macosx", "@eadir"}  # folders of pictures that are no samples
BEGIN = '{"image": "'  # of a row as `score` writes it
READERS = min(8, os.cpu_count() or 1)
OWN = {
    "image",
    "file_name",
    "prompt",
    "id",
    "scores",
    "failures",
    "critiques",
    "requests",
    "replies",
    "places",
    "made_of",
    "image_a",
    "image_b",
    "chosen",
}


@dataclass(frozen=True)
class Item:
    """An image to score. `name` is how the source calls it; `prompt` is None where the source has none. `data` is the
    picture's file where a table holds it itself; `path` is then the table."""

    name: str
    path: Path
    prompt: Prompt | None
    data: bytes | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str, str | None]:
        return self.name, self.prompt.text if self.prompt else None


@dataclass(frozen=True)
class Choice:
    """A person's choice between two images of one prompt, both named as in the items."""

    prompt: str | None
    better: str
    worse: str


# ----------------------------------------------------------------------------------------------------------- everything


@dataclass(frozen=True)
class ScoredFiles:
    """The rows of all images in the order of the source, their `summarise`, and how many were scored now; the others
    were in the file already."""

    rows: list[Row]
    summary: dict[str, Any]
    scored: int


def score_files(
    source: Path,
    scorers: Mapping[str, RewardModel] | Callable[[], Mapping[str, RewardModel]],
    out: Path,
    prompt: str | None = None,
    batch: int = 64,
    warn: Callable[[str], None] = lambda line: None,
    progress: Callable[[Iterable[Row], int], Iterable[Row]] = lambda rows, total: rows,
) -> ScoredFiles:
    """Score the images of a folder or table (`read`) into the file `out` (JSONL, CSV or Parquet), and summarise.

    Images that a JSONL file already has scores of are not scored again (`resume`). `prompt` is that of all images that
    have none. `scorers` by name, or a function that loads them, called when source and `out` have been checked. `warn`
    takes a line for each thing that is left out or cut. `progress` wraps the rows while they are made and gets their
    number. ValueError, in one line, for anything that cannot be scored at all; OSError where `out` cannot be written,
    which then keeps the rows that are complete.
    """
    record = _record(out)
    items, choices = read(source, prompt, out)
    scorers = scorers() if callable(scorers) else scorers
    if any(item.prompt is None for item in items) and (readers := needs_prompts(scorers)):
        raise ValueError(f"{readers[0]} looks at the prompt, and {source} has none for some images; give --prompt TEXT")
    files.make_folder(out.parent)
    done, left = resume(record, items, scorers)
    for line in _warnings(source, items, left, scorers):
        warn(line)
    for row in progress(score(left, scorers, batch), len(left)):
        files.append(record, row)
        done[row["image"], row["prompt"]] = row
    rows = [done[item.key] for item in items]
    if out.suffix.lower() != ".jsonl":
        write(rows, out)
        record.unlink()
    summary = summarise(rows, choices)
    caches = {name: scorer for name, scorer in scorers.items() if isinstance(scorer, Cached)}
    if caches:
        summary["cache"] = {name: {"asked": cache.asked, "hits": cache.hits} for name, cache in caches.items()}
    return ScoredFiles(rows, summary, len(left))


def _record(out: Path) -> Path:
    """The file that rows are appended to: `out` itself if it is JSONL, else one beside it until all are scored."""
    if out.suffix.lower() not in OUTPUTS:
        raise ValueError(f"--out {out}: a name that ends in {', '.join(OUTPUTS)} is needed")
    if out.suffix.lower() == ".jsonl":
        return Path(os.path.realpath(out))
    if os.path.lexists(out):
        raise ValueError(f"--out {out} is there already; choose another name or remove it")
    return Path(os.path.realpath(out.with_suffix(".partial.jsonl")))


def _warnings(
    source: Path, items: Sequence[Item], left: Sequence[Item], scorers: Mapping[str, RewardModel]
) -> Iterator[str]:
    if others := left_out(source, items):
        yield f"left out of {source}: {others}"
    yield from cut(scorers.values(), [item.prompt.text for item in items if item.prompt])
    if count := animations(left):
        yield f"{count} of {len(left)} pictures are animated; the first frame is scored"


# ------------------------------------------------------------------------------------------------------------- reading


def read(source: Path, prompt: str | None = None, out: Path | None = None) -> tuple[list[Item], list[Choice]]:
    """The images of a folder or table, and the choices of a table of pairs.

    A folder holds pictures, each with its prompt in a text file of the same name beside it, or GenEval's layout
    (`00000/metadata.jsonl`, `00000/samples/*.png`), or a table `metadata.jsonl`, `.csv` or `.parquet`, or
    `scores.jsonl`. A table (`reward_models.tables`) has columns `image` (or `file_name`), relative to the table, and
    `prompt`, optionally `id`; others are the prompt's ground truth. An image may be the bytes of a file, or
    `{bytes, path}` as `datasets` writes it. A table of pairs has `image_a`, `image_b` and `chosen` (a or b). `prompt`
    stands for all that have none. `out`, to which the scores go, is no table of a folder. ValueError in one line for
    anything else.
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
        asked = _prompt(row, prompt, where)
        asked = replace(asked, wants=images.beside(asked.wants, source.parent)) if asked else None
        text = asked.text if asked else None
        single = "file_name" if "file_name" in row and "image" not in row else "image"
        columns = ("image_a", "image_b") if "image_a" in row else (single,)
        names = []
        for column in columns:
            item = _item(row, column, source, asked, where)
            if item.data is not None and items.get(item.key, item).data != item.data:
                item = replace(item, name=f"{item.name} of {where.rpartition(', ')[2]}")
            names.append(items.setdefault(item.key, item).name)
        if len(columns) == 2:
            if str(row.get("chosen")).lower() not in ("a", "b"):
                raise ValueError(f"{where}: `chosen` must be a or b, got {row.get('chosen')!r}")
            choices.append(Choice(text, *(names if str(row["chosen"]).lower() == "a" else names[::-1])))
    if not items:
        raise ValueError(f"{source}: no rows in it")
    return list(items.values()), choices


def _index(folder: Path, out: Path | None) -> Path | None:
    """The table that says what the pictures of a folder are, if there is one."""
    there = [folder / name for name in INDEX if (folder / name).is_file()]
    if len(there) > 1:
        raise ValueError(f"{folder}: {' and '.join(path.name for path in there)}; name the one that is meant")
    scores = folder / "scores.jsonl"
    if not there and scores.is_file() and not (out is not None and out.exists() and out.samefile(scores)):
        there = [scores]
    return there[0] if there else None


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
    return Prompt(text, {key: value for key, value in row.items() if key not in OWN}, number)


def _rows(path: Path) -> Iterator[tuple[str, tables.Row]]:
    """Where each row of a table is, and what is in it."""
    try:
        for number, row in tables.read(path).rows(None):
            yield f"{path}, row {number + 1}", row
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _folder(folder: Path, prompt: str | None) -> list[Item]:
    places = [place for place in _files(folder) if not _aside(folder, place)]
    if not places:
        raise ValueError(f"{folder}: no pictures in it ({', '.join(PICTURES)})")
    items = [Item(_shown(place), folder / place, _beside(folder / place, prompt)) for place in places]
    if len({item.name for item in items}) < len(items):
        raise ValueError(f"{folder}: two pictures are called alike once bytes that are no UTF-8 are written out")
    return items


def _files(folder: Path) -> list[Path]:
    """The files of a folder, from it, in order."""
    return sorted(Path(where, name).relative_to(folder) for where, _, names in os.walk(folder) for name in names)


def _aside(folder: Path, place: Path) -> str:
    """Why a file is no picture to score, "" where it is one."""
    if any(part.startswith(".") for part in place.parts):
        return "hidden"
    if any(part.lower() in ASIDE for part in place.parts[:-1]):
        return "of checkpoints or thumbnails"
    if place.stem == "grid" and (folder / place).with_name("samples").is_dir():
        return "GenEval's grid"
    return "" if place.suffix.lower() in PICTURES else _shown(Path(place.suffix.lower() or place.name))


def left_out(source: Path, items: Sequence[Item]) -> str:
    """What lies in a folder and is not among the items, counted by kind, but for prompts and tables; "" where there is
    nothing."""
    if not source.is_dir():
        return ""
    taken = {item.path for item in items}
    taken |= {path.with_suffix(".txt") for path in taken}
    others = [place for place in _files(source) if source / place not in taken]
    others = [place for place in others if place.name not in (*INDEX, "scores.jsonl")]
    kinds = Counter(_aside(source, place) or "picture that the table does not name" for place in others)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def _shown(place: Path) -> str:
    """The name of a file, with `\\xff` for a byte that is no UTF-8."""
    return os.fsencode(place).decode("utf-8", "backslashreplace")


def _beside(path: Path, prompt: str | None) -> Prompt | None:
    """The prompt of a picture: a text file of its name, GenEval's metadata one folder up, or the one for all."""
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


# ------------------------------------------------------------------------------------------------------------- scoring


def animations(items: Sequence[Item]) -> int:
    """How many pictures have more than one frame, of which the first is scored."""
    with ThreadPoolExecutor(READERS) as readers:
        return sum(readers.map(lambda item: images.animated(None if item.data else item.path, item.data), items))


def needs_prompts(scorers: Mapping[str, RewardModel]) -> list[str]:
    """The scorers that look at the prompt."""
    return [name for name, scorer in scorers.items() if scorer.card.sees_prompt]


def score(items: Sequence[Item], scorers: Mapping[str, RewardModel], batch: int) -> Iterator[dict[str, Any]]:
    """One row per item: `image`, `prompt`, `id`, what `score_pictures` says of it, and what it is `made_of`. In order,
    but for groupwise scorers, which see the images of a prompt together, however many they are."""
    versions = {name: scorer.card.version for name, scorer in scorers.items()}
    with ThreadPoolExecutor(READERS) as readers:  # they read the next batch while this one is scored
        parts = ((part, [readers.submit(_load, item) for item in part]) for part in _parts(items, scorers, batch))
        part, reading = next(parts, ([], []))
        while part:
            had = [picture.result() for picture in reading]
            following = next(parts, ([], []))
            seen = score_pictures([own for own, _ in had], [item.prompt or Prompt("") for item in part], scorers)
            for item, (_, made_of), row in zip(part, had, seen, strict=True):
                prompt = item.prompt
                yield {
                    "image": item.name, "prompt": prompt and prompt.text, "id": prompt.id if prompt else 0,
                } | row | {"made_of": made_of | {"scorers": versions}}  # fmt: skip
            part, reading = following


def _group(item: Item) -> tuple:
    return (item.prompt.id, item.prompt.text) if item.prompt else (0, None)


def _parts(items: Sequence[Item], scorers: Mapping[str, RewardModel], batch: int) -> Iterator[list[Item]]:
    """What is scored together: at most `batch` images and `limits.TOGETHER` pixels, or one larger image; with a
    groupwise scorer whole prompts, or one larger prompt."""
    groups = [[item] for item in items]
    if any(scorer.card.groupwise for scorer in scorers.values()):
        by_prompt = defaultdict(list)
        for item in items:
            by_prompt[_group(item)].append(item)
        groups = [*by_prompt.values()]
    part: list[Item] = []
    pixels = 0
    for group in groups:
        more = sum(images.promised(None if item.data else item.path, item.data) for item in group)
        if part and (len(part) + len(group) > batch or pixels + more > limits.TOGETHER):
            yield part
            part, pixels = [], 0
        part, pixels = [*part, *group], pixels + more
    if part:
        yield part


def _load(item: Item) -> tuple[Picture | str, dict[str, str]]:
    """The picture, or why there is none; and what it and its prompt are."""
    made_of = _made_of(item)
    try:
        return picture(item), made_of
    except ValueError as error:
        return str(error), made_of


def _made_of(item: Item) -> dict[str, str]:
    """The SHA-256 of a picture's file and of what it is asked for, pictures among its ground truth included."""
    wants = item.prompt.wants if item.prompt else {}
    shown = [_digest(wants[name]) for name in images.PICTURES if isinstance(wants.get(name), str)]
    asked = json.dumps([item.prompt and item.prompt.text, wants, shown], sort_keys=True, default=str)
    own = _digest(item.path) if item.data is None else hashlib.sha256(item.data).hexdigest()
    return {"picture": own, "prompt": hashlib.sha256(asked.encode("utf-8", "backslashreplace")).hexdigest()}


def _digest(path: str | Path) -> str:
    try:
        with files.opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return ""  # what cannot be read fails, and is tried again


# ------------------------------------------------------------------------------------------------------------- results


def resume(
    out: Path, items: Sequence[Item], scorers: Mapping[str, RewardModel]
) -> tuple[dict[tuple[str, str | None], dict], list[Item]]:
    """The rows of an earlier run by (image, prompt), and the items left. What must be scored again is taken out of the
    file: a line cut off in the middle, rows with a failure, rows of another picture, prompt, ground truth or version of
    a scorer, and, with a groupwise scorer, prompts with items left.

    ValueError if the file holds other scores, or anything that is no row of scores; it is left as it is then.
    """
    names = [f"{name}.{component}" for name, scorer in scorers.items() for component in scorer.names]
    versions = {"scorers": {name: scorer.card.version for name, scorer in scorers.items()}}
    done = {(row["image"], row["prompt"]): row for row in _earlier(out, names) if not row["failures"]}
    with ThreadPoolExecutor(READERS) as readers:
        again = [item for item in items if item.key in done]
        for item, made_of in zip(again, readers.map(_made_of, again), strict=True):
            if done[item.key].get("made_of") != made_of | versions:
                done.pop(item.key)
    left = [item for item in items if item.key not in done]
    if any(scorer.card.groupwise for scorer in scorers.values()):
        open_ = {_group(item) for item in left}
        left = [item for item in items if _group(item) in open_]
    for item in left:
        done.pop(item.key, None)
    files.replace(out, "".join(json.dumps(row) + "\n" for row in done.values()).encode())
    return done, left


def _earlier(out: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of an earlier run; the last may have been cut off."""
    if not os.path.lexists(out):
        return
    text = files.text(out)
    parts = files.lines(text)
    for number, line in enumerate(parts, 1):
        try:
            row = files.parsed(line)
        except ValueError:
            if number == len(parts) and not text.endswith("\n") and (line.startswith(BEGIN) or BEGIN.startswith(line)):
                return
            row = None
        if not _ours(row):
            raise ValueError(f"{out}, line {number}: no row of scores; it is not overwritten, choose another --out")
        if list(row["scores"]) != list(names):
            raise ValueError(f"{out} holds {', '.join(row['scores'])}; score into another file or remove it")
        yield row


def _ours(row: Any) -> bool:
    """Whether a row has the shape of those that `score` yields."""
    if not (isinstance(row, dict) and isinstance(row.get("image"), str) and isinstance(row.get("prompt"), str | None)):
        return False
    parts = [row.get(name) for name in ("scores", "failures", "places", *TEXTS)]
    if not all(isinstance(part, dict) for part in parts) or tables.whole(row.get("id")) is None:
        return False
    try:
        for places in row["places"].values():
            heat.rectangles(places)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False
    values, reasons = row["scores"].values(), [text for name in ("failures", *TEXTS) for text in row[name].values()]
    return all(type(value) in (int, float, type(None)) for value in values) and all(type(own) is str for own in reasons)


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without nesting, for CSV and Parquet: scores by name, reasons in one column; no critiques, no places."""
    why = "; ".join(f"{name}: {reason}" for name, reason in row["failures"].items())
    return {"image": row["image"], "prompt": row["prompt"], "id": row["id"], **row["scores"], "failures": why}


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """CSV or Parquet, by the name's ending: the whole file, or (OSError) none."""
    table = [flat(row) for row in rows]
    if out.suffix.lower() == ".csv":
        files.replace(out, tables.separated(table).encode())
        return
    try:
        from pyarrow import Table, parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'mmalign[parquet]'") from None
    file = BytesIO()
    parquet.write_table(Table.from_pylist(table), file)
    files.replace(out, file.getvalue())


def summarise(rows: Sequence[Mapping[str, Any]], choices: Sequence[Choice] = ()) -> dict[str, Any]:
    """Per score: how many there are and lack, mean, standard deviation, least and greatest; `best` and `prompts`, the
    mean over prompts of the best of their images, where prompts repeat; `agrees`, the share of people's choices where
    the chosen image scores higher (a tie counts half), where there are choices. `correlation`: Spearman's rank
    correlation of each two scores."""
    import numpy as np
    from scipy.stats import spearmanr

    names = list(rows[0]["scores"]) if rows else []
    columns = {
        name: np.array([np.nan if row["scores"][name] is None else row["scores"][name] for row in rows])
        for name in names
    }
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["id"], row["prompt"]].append(i)
    place = {(row["prompt"], row["image"]): i for i, row in enumerate(rows)}
    out: dict[str, Any] = {"images": len(rows), "failed": sum(bool(row["failures"]) for row in rows), "scores": {}}
    for name, values in columns.items():
        valid = values[~np.isnan(values)]
        found: dict[str, Any] = {"count": len(valid), "missing": len(values) - len(valid)}
        if len(valid):
            found |= {
                "mean": float(valid.mean()), "std": float(valid.std()),
                "min": float(valid.min()), "max": float(valid.max()),
            }  # fmt: skip
        tops = [np.nanmax(values[own]) for own in groups.values() if not np.isnan(values[own]).all()]
        if len(groups) < len(rows) and tops:
            found |= {"best": float(np.mean(tops)), "prompts": len(tops)}
        better = [
            0.5 + 0.5 * np.sign(values[place[c.prompt, c.better]] - values[place[c.prompt, c.worse]]) for c in choices
        ]
        if better:
            valid_choices = [value for value in better if not np.isnan(value)]
            found |= {"choices": len(valid_choices)}
            found |= {"agrees": float(np.mean(valid_choices))} if valid_choices else {}
        out["scores"][name] = found
    out["correlation"] = {}
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            both = ~(np.isnan(columns[one]) | np.isnan(columns[two]))
            pair = columns[one][both], columns[two][both]
            if both.sum() > 2 and pair[0].std() > 0 and pair[1].std() > 0:
                out["correlation"][f"{one} ~ {two}"] = float(spearmanr(*pair).statistic)
    return out
