"""A folder that the same command continues after an interruption.

OUT/settings.json    the settings; another command into the folder must have the same
OUT/NAME.jsonl       rows of what is done; what a row speaks of is on disk before it
OUT/NAME.3.part.jsonl    the rows of process 3 of several, until they are joined
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.distributed.processes import Ranks
from mmalign.errors import BadInput, refusing
from reward_models import Prompt, files, tables

Row = dict[str, Any]


def open_folder(
    out: Path,
    settings: Mapping[str, Any],
    prompts: Sequence[Prompt],
    name: str,
    keys: Collection[str],
    what: str,
) -> list[Row]:
    """The rows in the file `name` of a folder that is made if it is missing. Each has at least `keys`, among them the
    `id` and the text `prompt` of one of the prompts, and they are in the order of these. Parts of several processes are
    joined into the file. BadInput if the folder holds the work of other settings or
    prompts; `what` is the work, such as "a refinement". An incomplete last line is dropped."""
    file, record = out / "settings.json", out / name
    wanted = json.loads(json.dumps(settings, default=str))
    if file.exists():
        before = _settings(file, what)
        other = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key))
        if other:
            key = other[0]
            raise BadInput(
                f"{out} holds {what} with {key} {before.get(key)!r}, not {wanted.get(key)!r}; "
                "choose another --out, or the same settings to continue"
            )
    elif record.exists() or _parts(record):
        raise BadInput(f"{out} has a {name} but no settings.json; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    files.replace(file, (json.dumps(wanted, indent=1) + "\n").encode())
    parts = _parts(record)
    rows = [row for part in (record, *parts) if part.exists() for row in _complete(part, keys, what)]
    texts = {prompt.id: prompt.text for prompt in prompts}
    for row in rows:
        if texts.get(row["id"]) != row["prompt"]:
            raise BadInput(f"{out} holds prompt {row['id']}, {row['prompt']!r}, which is not among these prompts")
    if parts:
        order = {number: place for place, number in enumerate(texts)}
        rows = [json.loads(line) for line in dict.fromkeys(map(json.dumps, rows))]  # those that were joined before
        rows.sort(key=lambda row: order[row["id"]])
    rewrite(record, rows)
    for part in parts:
        part.unlink()
    return rows


def part_of(record: Path, ranks: Ranks | None) -> Path:
    """The file that this process appends to: `record`, or its part of it if there are several processes."""
    return record if ranks is None else record.with_name(f"{record.stem}.{ranks.rank}.part.jsonl")


def _parts(record: Path) -> list[Path]:
    return sorted(record.parent.glob(f"{record.stem}.*.part.jsonl"))


def rewrite(record: Path, rows: Sequence[Row]) -> None:
    """Replace all rows of a file."""
    files.replace(record, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append(record: Path, rows: Sequence[Row]) -> None:
    """Append rows to a file and flush them to the disk."""
    files.append(record, *rows)
    files.sync(record)


def _settings(file: Path, what: str) -> dict[str, Any]:
    with refusing():
        text = files.text(file)
        try:
            before = files.parsed(text)
        except ValueError as error:
            raise ValueError(f"{file}: {error}; choose another --out") from None
    if not isinstance(before, dict):
        raise BadInput(f"{file}: no settings of {what}; choose another --out")
    return before


def _complete(record: Path, keys: Collection[str], what: str) -> Iterator[Row]:
    """The rows of a file, without a last one that was cut off."""
    with refusing():
        text = files.text(record)
    lines = files.lines(text)
    for number, line in enumerate(lines, 1):
        try:
            row = files.parsed(line)
        except ValueError:
            if number == len(lines) and not text.endswith("\n"):
                return
            raise BadInput(f"{record}, line {number}: not a JSON object") from None
        if not (isinstance(row, dict) and row.keys() >= {*keys} and tables.whole(row["id"]) is not None):
            raise BadInput(f"{record}, line {number}: not a row of {what}; choose another --out")
        yield row
