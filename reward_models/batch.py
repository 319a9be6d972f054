"""Score what lies on disk: a folder or a table of images in, a table of scores out.

Rows are written as they are scored, so that a run that was cut off goes on where it stopped. An image that cannot be
read is a row with a reason, and the rest goes on. Memory holds two batches of images, whatever their number.
"""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from reward_models.images import beside, from_file
from reward_models.scoring import Picture, score_pictures
from reward_models.types import Prompt, RewardModel

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TABLES = (".jsonl", ".csv", ".parquet")
READERS = min(8, os.cpu_count() or 1)
OWN = {
    "image",
    "prompt",
    "id",
    "scores",
    "failures",
    "critiques",
    "requests",
    "replies",
    "places",
    "image_a",
    "image_b",
    "chosen",
}


@dataclass(frozen=True)
class Item:
    """An image to score. `name` is how the source calls it; `prompt` is None where the source has none."""

    name: str
    path: Path
    prompt: Prompt | None

    @property
    def key(self) -> tuple[str, str | None]:
        return self.name, self.prompt.text if self.prompt else None


@dataclass(frozen=True)
class Choice:
    """A person's choice between two images of one prompt, both named as in the items."""

    prompt: str | None
    better: str
    worse: str


# ------------------------------------------------------------------------------------------------------------- reading


def read(source: Path, prompt: str | None = None) -> tuple[list[Item], list[Choice]]:
    """The images of a folder or table, and the choices of a table of pairs.

    A folder holds pictures, each with its prompt in a text file of the same name beside it, or GenEval's layout
    (`00000/metadata.jsonl`, `00000/samples/*.png`), or a table `metadata.jsonl` or `scores.jsonl`. A table (JSONL, CSV,
    Parquet) has columns `image`, relative to the table, and `prompt`, optionally `id`; others are the prompt's ground
    truth. A table of pairs has `image_a`, `image_b` and `chosen` (a or b). `prompt` stands for all that have none.
    ValueError in one line for anything else.
    """
    if source.is_dir():
        table = next((source / n for n in ("metadata.jsonl", "scores.jsonl") if (source / n).is_file()), None)
        if table is None:
            return _folder(source, prompt), []
        source = table
    if source.suffix not in TABLES:
        raise ValueError(f"{source}: a folder or a table ({', '.join(TABLES)}) is needed")
    items: dict[tuple[str, str | None], Item] = {}
    choices = []
    for number, row in enumerate(_rows(source), 1):
        own = _prompt(row, prompt, f"{source}, row {number}")
        own = replace(own, wants=beside(own.wants, source.parent)) if own else None
        text = own.text if own else None
        columns = ("image_a", "image_b") if "image_a" in row else ("image",)
        for column in columns:
            if not row.get(column):
                raise ValueError(f"{source}, row {number}: no `{column}`; columns are {', '.join(row)}")
            name = str(row[column])
            items.setdefault((name, text), Item(name, source.parent / name, own))
        if len(columns) == 2:
            if str(row.get("chosen")).lower() not in ("a", "b"):
                raise ValueError(f"{source}, row {number}: `chosen` must be a or b, got {row.get('chosen')!r}")
            a, b = str(row["image_a"]), str(row["image_b"])
            choices.append(Choice(text, *((a, b) if str(row["chosen"]).lower() == "a" else (b, a))))
    if not items:
        raise ValueError(f"{source}: no rows in it")
    return list(items.values()), choices


def _prompt(row: Mapping[str, Any], other: str | None, where: str) -> Prompt | None:
    text = row.get("prompt") or other
    if text is None:
        return None
    try:
        number = int(row.get("id") or 0)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: `id` must be a whole number, got {row['id']!r}") from None
    return Prompt(str(text), {key: value for key, value in row.items() if key not in OWN}, number)


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        if table.suffix == ".parquet":
            yield from _parquet().read_table(table).to_pylist()
        elif table.suffix == ".csv":
            with table.open(newline="") as file:
                yield from csv.DictReader(file)
        else:
            for number, line in enumerate(table.read_text().splitlines(), 1):
                if line.strip():
                    try:
                        yield dict(json.loads(line))
                    except (TypeError, ValueError):
                        raise ValueError(f"{table}, line {number}: no JSON object") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{table}: {getattr(error, 'strerror', None) or error}") from None


def _folder(folder: Path, prompt: str | None) -> list[Item]:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not pictures:
        raise ValueError(f"{folder}: no pictures in it ({', '.join(PICTURES)})")
    return [Item(str(path.relative_to(folder)), path, _beside(path, prompt)) for path in pictures]


def _beside(path: Path, prompt: str | None) -> Prompt | None:
    """The prompt of a picture: a text file of its name, GenEval's metadata one folder up, or the one for all."""
    metadata = path.parent.parent / "metadata.jsonl"
    if path.with_suffix(".txt").is_file():
        return Prompt(path.with_suffix(".txt").read_text().strip())
    if path.parent.name == "samples" and metadata.is_file():
        number = path.parent.parent.name
        return _prompt(next(_rows(metadata)) | ({"id": number} if number.isdigit() else {}), prompt, str(metadata))
    return None if prompt is None else Prompt(prompt)


def _parquet():
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'mmalign[parquet]'") from None
    return parquet


# ------------------------------------------------------------------------------------------------------------- scoring


def needs_prompts(scorers: Mapping[str, RewardModel]) -> list[str]:
    """The scorers that look at the prompt."""
    return [name for name, scorer in scorers.items() if scorer.card.sees_prompt]


def score(items: Sequence[Item], scorers: Mapping[str, RewardModel], batch: int) -> Iterator[dict[str, Any]]:
    """One row per item: `image`, `prompt`, `id`, and what `score_pictures` says of it. In order, but for groupwise
    scorers, which see the images of a prompt together, however many they are."""
    parts = _parts(items, scorers, batch)
    with ThreadPoolExecutor(READERS) as readers:  # they read the next batch while this one is scored
        ahead = [readers.submit(_load, item) for item in parts[0]] if parts else []
        for part, following in zip_longest(parts, parts[1:], fillvalue=[]):
            pictures = [reading.result() for reading in ahead]
            ahead = [readers.submit(_load, item) for item in following]
            found = score_pictures(pictures, [item.prompt or Prompt("") for item in part], scorers)
            for item, own in zip(part, found, strict=True):
                prompt = item.prompt
                yield {
                    "image": item.name, "prompt": prompt and prompt.text, "id": prompt.id if prompt else 0,
                } | own  # fmt: skip


def _group(item: Item) -> tuple:
    return (item.prompt.id, item.prompt.text) if item.prompt else (0, None)


def _parts(items: Sequence[Item], scorers: Mapping[str, RewardModel], batch: int) -> list[Sequence[Item]]:
    if not any(scorer.card.groupwise for scorer in scorers.values()):
        return [items[i : i + batch] for i in range(0, len(items), batch)]
    groups = defaultdict(list)
    for item in items:
        groups[_group(item)].append(item)
    parts: list[list[Item]] = []
    for group in groups.values():
        if parts and len(parts[-1]) + len(group) <= batch:
            parts[-1] += group
        else:
            parts.append(group)
    return parts


def _load(item: Item) -> Picture | str:
    """The picture, or why there is none."""
    try:
        return from_file(item.path)
    except ValueError as error:
        return str(error)


# ------------------------------------------------------------------------------------------------------------- results


def resume(
    out: Path, items: Sequence[Item], scorers: Mapping[str, RewardModel]
) -> tuple[dict[tuple[str, str | None], dict], list[Item]]:
    """The rows of an earlier run by (image, prompt), and the items left. What must be scored again is taken out of the
    file: a line cut off in the middle, rows with a failure, and, with a groupwise scorer, prompts with items left.

    ValueError if the rows hold other scores.
    """
    done: dict[tuple[str, str | None], dict] = {}
    names = [f"{name}.{component}" for name, scorer in scorers.items() for component in scorer.names]
    for line in out.read_text().splitlines() if out.exists() else ():
        try:
            row = json.loads(line)
            key = (row["image"], row["prompt"])
        except (ValueError, TypeError, KeyError):
            break
        if list(row["scores"]) != names:
            raise ValueError(f"{out} holds {', '.join(row['scores'])}; score into another file or remove it")
        if not row["failures"]:
            done[key] = row
    left = [item for item in items if item.key not in done]
    if any(scorer.card.groupwise for scorer in scorers.values()):
        open_ = {_group(item) for item in left}
        left = [item for item in items if _group(item) in open_]
    for item in left:
        done.pop(item.key, None)
    kept = out.with_name(out.name + ".kept")
    kept.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
    os.replace(kept, out)
    return done, left


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without nesting, for CSV and Parquet: scores by name, reasons in one column; no critiques, no places."""
    why = "; ".join(f"{name}: {reason}" for name, reason in row["failures"].items())
    return {"image": row["image"], "prompt": row["prompt"], "id": row["id"], **row["scores"], "failures": why}


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """CSV or Parquet, by the name's ending."""
    table = [flat(row) for row in rows]
    if out.suffix == ".csv":
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    else:
        import pyarrow

        _parquet().write_table(pyarrow.Table.from_pylist(table), out)


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
