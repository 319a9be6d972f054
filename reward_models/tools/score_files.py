"""Score images on disk: a folder or a table of images in, a table of scores out.

Each row is written once its image is scored, so that an interrupted run continues where it stopped. An image that
cannot be read gets a row with the reason, and the others are scored. Memory holds at most two batches of images, and
the pictures that are stored in a table.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from reward_models import files, images, limits, overlay, tables
from reward_models.cache import Cached
from reward_models.lengths import cut
from reward_models.scoring import TEXTS, Picture, score_pictures
from reward_models.tools.picture_files import READERS, Choice, Item, animations, left_out, picture, read
from reward_models.types import Prompt, RewardModel

Row = dict[str, Any]
OUTPUTS = (".jsonl", ".csv", ".parquet")
BEGIN = '{"image": "'  # the first characters of a row in JSONL


# ---------------------------------------------------------------------------------------------------------- entry point


@dataclass(frozen=True)
class ScoredFiles:
    """The rows of all images in the order of the source, their `summarise`, and the number that were scored now; the
    others were already in the file."""

    rows: list[Row]
    summary: dict[str, Any]
    scored: int


def score_files(
    source: str | Path,
    scorers: Mapping[str, RewardModel] | Callable[[], Mapping[str, RewardModel]],
    out: str | Path,
    prompt: str | None = None,
    batch: int = 64,
    warn: Callable[[str], None] = lambda line: None,
    progress: Callable[[Iterable[Row], int, int], Iterable[Row]] = lambda rows, done, total: rows,
    again: bool = True,
) -> ScoredFiles:
    """Score the images of a folder or table (`read`) into the file `out` (JSONL, CSV or Parquet), and summarise.

    Images that already have scores in a JSONL file are not scored again (`resume`). `prompt` is used for all images
    that have none. `scorers` by name, or a function that loads them, called after `source` and `out` have been checked.
    `warn` gets one line for each kind of file left out, for rows that give no pair, and for truncated prompts.
    `progress` gets the iterable of rows, how many images were scored before, and how many there are. Images that failed
    before are scored `again`. ValueError, in one line, for a source that cannot be scored at all; OSError if `out`
    cannot be written, which then still holds the rows that are complete.

        result = score_files("assets/pictures", {"clip": load("clip")}, "scores.jsonl")
        result.rows[0]["scores"], result.summary["failed"]
    """
    source, out = Path(source), Path(out)
    record = record_of(out)
    items, choices = read(source, prompt, out, warn)
    scorers = scorers() if callable(scorers) else scorers
    check_prompts(source, items, scorers)
    files.make_folder(out.parent)
    done, left = resume(record, items, scorers, again)
    for line in _warnings(source, items, left, scorers):
        warn(line)
    for row in progress(score(left, scorers, batch), len(items) - len(left), len(items)):
        files.append(record, row)
        done[row["image"], row["prompt"]] = row
    rows = [done[item.key] for item in items]
    if out.suffix.lower() != ".jsonl":
        write(rows, out)
        record.unlink()
    summary = summarise(rows, choices)
    caches = {name: scorer for name, scorer in scorers.items() if isinstance(scorer, Cached)}
    if caches:
        summary["cache"] = {name: {"asked": cache.lookups, "hits": cache.hits} for name, cache in caches.items()}
    return ScoredFiles(rows, summary, len(left))


def record_of(out: Path) -> Path:
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


# ------------------------------------------------------------------------------------------------------------- scoring


def check_prompts(source: Path, items: Sequence[Item], scorers: Mapping[str, RewardModel]) -> None:
    """ValueError for images without a prompt that a scorer needs."""
    if any(item.prompt is None for item in items) and (readers := needs_prompts(scorers)):
        raise ValueError(f"{readers[0]} needs the prompt, and {source} has none for some images; give --prompt TEXT")


def needs_prompts(scorers: Mapping[str, RewardModel]) -> list[str]:
    """The names of the scorers that need the prompt."""
    return [name for name, scorer in scorers.items() if scorer.card.sees_prompt]


def score(items: Sequence[Item], scorers: Mapping[str, RewardModel], batch: int) -> Iterator[dict[str, Any]]:
    """One row per item: `image`, `prompt`, `id`, the row of `score_pictures`, and the digests `made_of`. In the
    order of the items, except with groupwise scorers, which get all images of a prompt at once."""
    return score_blocks([items], scorers, batch)


def score_blocks(
    blocks: Iterable[Sequence[Item]], scorers: Mapping[str, RewardModel], batch: int | float = inf
) -> Iterator[dict[str, Any]]:
    """`score` of several lists of items, one list after another: no image is scored together with one of another."""
    versions = {name: scorer.card.version for name, scorer in scorers.items()}
    with ThreadPoolExecutor(READERS) as readers:  # they read the next batch while this one is scored
        lists = (some for items in blocks for some in _batches(items, scorers, batch))
        batches = ((some, [readers.submit(_load, item) for item in some]) for some in lists)
        some, reading = next(batches, ([], []))
        while some:
            pictures, made_of = zip(*(loaded.result() for loaded in reading), strict=True)
            following = next(batches, ([], []))
            rows = score_pictures(pictures, [item.prompt or Prompt("") for item in some], scorers)
            for item, digests, row in zip(some, made_of, rows, strict=True):
                prompt = item.prompt
                yield {
                    "image": item.name, "prompt": prompt and prompt.text, "id": prompt.id if prompt else 0,
                } | row | {"made_of": digests | {"scorers": versions}}  # fmt: skip
            some, reading = following


def group_of(prompt: Prompt | None) -> tuple[int, str | None]:
    """What the images of one prompt share."""
    return (prompt.id, prompt.text) if prompt else (0, None)


def compares(scorers: Mapping[str, RewardModel]) -> bool:
    """Whether a scorer compares the images of a prompt."""
    return any(scorer.card.groupwise for scorer in scorers.values())


def _batches(items: Sequence[Item], scorers: Mapping[str, RewardModel], batch: int | float) -> Iterator[list[Item]]:
    """The items that are scored together: at most `batch` images and `limits.TOGETHER` pixels, or one larger image.
    With a groupwise scorer the images of a prompt are never separated, even if they exceed these bounds."""
    groups = [[item] for item in items]
    if compares(scorers):
        by_prompt = defaultdict(list)
        for item in items:
            by_prompt[group_of(item.prompt)].append(item)
        groups = [*by_prompt.values()]
    some: list[Item] = []
    pixels = 0
    for group in groups:
        more = sum(images.promised(item.file, item.data) for item in group)
        if some and (len(some) + len(group) > batch or pixels + more > limits.TOGETHER):
            yield some
            some, pixels = [], 0
        some, pixels = [*some, *group], pixels + more
    if some:
        yield some


def _load(item: Item) -> tuple[Picture | str, dict[str, str]]:
    """The picture or the reason why it cannot be read, and the digests of the picture and its prompt."""
    made_of = digests(item)
    try:
        return picture(item), made_of
    except ValueError as error:
        return str(error), made_of


def digests(item: Item) -> dict[str, str]:
    """The SHA-256 of a picture's file, and of its prompt and ground truth, including the pictures in it."""
    wants = item.prompt.wants if item.prompt else {}
    of_pictures = [_digest(wants[name]) for name in images.PICTURES if isinstance(wants.get(name), str)]
    prompt = json.dumps([item.prompt and item.prompt.text, wants, of_pictures], sort_keys=True, default=str)
    digest = _digest(item.path) if item.data is None else hashlib.sha256(item.data).hexdigest()
    return {"picture": digest, "prompt": hashlib.sha256(prompt.encode("utf-8", "backslashreplace")).hexdigest()}


def _digest(path: str | Path) -> str:
    try:
        with files.opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return ""  # an image that cannot be read fails, and the next run tries it again


# ------------------------------------------------------------------------------------------------------------- results


def resume(
    out: Path, items: Sequence[Item], scorers: Mapping[str, RewardModel], again: bool = True
) -> tuple[dict[tuple[str, str | None], dict], list[Item]]:
    """`left` of the items; rows that must be scored again are removed from the file."""
    done, items = left(out, items, scorers, again)
    files.replace(out, "".join(json.dumps(row) + "\n" for row in done.values()).encode())
    return done, items


def left(
    out: Path, items: Sequence[Item], scorers: Mapping[str, RewardModel], again: bool = True
) -> tuple[dict[tuple[str, str | None], dict], list[Item]]:
    """The rows of an earlier run by (image, prompt), and the items left. Scored again are: an incomplete last line,
    with `again` rows with a failure, rows of another picture, prompt, ground truth or version of a scorer, and, with a
    groupwise scorer, prompts with items left.

    ValueError if the file holds other scores, or a line that is not a row of scores; it is then left unchanged.
    """
    names = [f"{name}.{component}" for name, scorer in scorers.items() for component in scorer.names]
    versions = {"scorers": {name: scorer.card.version for name, scorer in scorers.items()}}
    done = {(row["image"], row["prompt"]): row for row in _earlier(out, names) if not (again and row["failures"])}
    with ThreadPoolExecutor(READERS) as readers:
        known = [item for item in items if item.key in done]
        for item, made_of in zip(known, readers.map(digests, known), strict=True):
            if done[item.key].get("made_of") != made_of | versions:
                done.pop(item.key)
    rest = [item for item in items if item.key not in done]
    if compares(scorers):
        open_ = {group_of(item.prompt) for item in rest}
        rest = [item for item in items if group_of(item.prompt) in open_]
    for item in rest:
        done.pop(item.key, None)
    return done, rest


def _earlier(out: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of an earlier run, without an incomplete last one."""
    if not os.path.lexists(out):
        return
    text = files.text(out)
    lines = files.lines(text)
    for number, line in enumerate(lines, 1):
        try:
            row = files.parsed(line)
        except ValueError:
            if number == len(lines) and not text.endswith("\n") and (line.startswith(BEGIN) or BEGIN.startswith(line)):
                return
            row = None
        if not _ours(row):
            raise ValueError(f"{out}, line {number}: not a row of scores; it is not overwritten, choose another --out")
        if list(row["scores"]) != list(names):
            raise ValueError(f"{out} holds {', '.join(row['scores'])}; score into another file or remove it")
        yield row


def _ours(row: Any) -> bool:
    """Whether a row has the shape of those that `score` yields."""
    if not (isinstance(row, dict) and isinstance(row.get("image"), str) and isinstance(row.get("prompt"), str | None)):
        return False
    cells = [row.get(name) for name in ("scores", "failures", "places", *TEXTS)]
    if not all(isinstance(cell, dict) for cell in cells) or tables.whole(row.get("id")) is None:
        return False
    try:
        for places in row["places"].values():
            overlay.rectangles(places)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False
    values, reasons = row["scores"].values(), [text for name in ("failures", *TEXTS) for text in row[name].values()]
    return all(type(value) in (int, float, type(None)) for value in values) and all(
        type(reason) is str for reason in reasons
    )


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without nesting, for CSV and Parquet: scores by name, reasons in one column; no critiques or maps."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in row["failures"].items())
    return {"image": row["image"], "prompt": row["prompt"], "id": row["id"], **row["scores"], "failures": reasons}


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write CSV or Parquet, by the suffix of `out`, atomically. OSError if it cannot be written."""
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
    """A summary of the rows. Per score: the numbers of valid and missing values, mean, standard deviation, minimum and
    maximum; if prompts repeat, `best`, the mean over prompts of the highest score among their images, and `prompts`,
    their number; if there are choices, `agrees`, the share of them in which the chosen image scores higher (equal
    scores count half), and `choices`, their number. `ties`, if there are any: choices that prefer neither image, which
    are not among these. `correlation`: Spearman's rank correlation of each pair of scores."""
    names = list(rows[0]["scores"]) if rows else []
    columns = {
        name: np.array([np.nan if row["scores"][name] is None else row["scores"][name] for row in rows])
        for name in names
    }
    prompts = defaultdict(list)
    for i, row in enumerate(rows):
        prompts[row["id"], row["prompt"]].append(i)
    index = {(row["prompt"], row["image"]): i for i, row in enumerate(rows)}
    preferred = [choice for choice in choices if not choice.tie]
    pairs = [(index[choice.prompt, choice.better], index[choice.prompt, choice.worse]) for choice in preferred]
    ties = len(choices) - len(preferred)
    return {
        "images": len(rows),
        "failed": sum(bool(row["failures"]) for row in rows),
        **({"ties": ties} if ties else {}),
        "scores": {name: _statistics(values, [*prompts.values()], pairs) for name, values in columns.items()},
        "correlation": _correlations(columns),
    }


def _statistics(
    values: Float[np.ndarray, "N"], prompts: Sequence[list[int]], pairs: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """The statistics of one score. `prompts`: the rows of each prompt. `pairs`: the better and the worse row of each
    choice."""
    valid = values[~np.isnan(values)]
    statistics: dict[str, Any] = {"count": len(valid), "missing": len(values) - len(valid)}
    if len(valid):
        statistics |= {
            "mean": float(valid.mean()), "std": float(valid.std()),
            "min": float(valid.min()), "max": float(valid.max()),
        }  # fmt: skip
    best = [np.nanmax(values[rows]) for rows in prompts if not np.isnan(values[rows]).all()]
    if len(prompts) < len(values) and best:
        statistics |= {"best": float(np.mean(best)), "prompts": len(best)}
    agreement = [0.5 + 0.5 * np.sign(values[better] - values[worse]) for better, worse in pairs]
    if agreement:
        valid_pairs = [value for value in agreement if not np.isnan(value)]
        statistics |= {"choices": len(valid_pairs)}
        statistics |= {"agrees": float(np.mean(valid_pairs))} if valid_pairs else {}
    return statistics


def _correlations(columns: Mapping[str, Float[np.ndarray, "N"]]) -> dict[str, float]:
    from scipy.stats import spearmanr

    correlations = {}
    for one, other in combinations(columns, 2):
        both = ~(np.isnan(columns[one]) | np.isnan(columns[other]))
        pair = columns[one][both], columns[other][both]
        if both.sum() > 2 and pair[0].std() > 0 and pair[1].std() > 0:
            correlations[f"{one} ~ {other}"] = float(spearmanr(*pair).statistic)
    return correlations
