"""Refine many prompts into a folder, and go on after an interruption.

    OUT/settings.json    what was asked for; another run into the folder must ask for the same
    OUT/trace.jsonl      a line for each finished prompt, with all its rounds
    OUT/images/          every image, named by prompt and round; OUT/best/ the one that was kept of each prompt

A prompt is done when its line is whole; its images are written before.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmalign.errors import BadInput, refusing
from mmalign.refine.loop import Story
from mmalign.runs.folder import ROWS_ARE_WHOLE, failing
from reward_models import Prompt, files, overlay as heat, tables
from reward_models.images import to_pil

Row = dict[str, Any]
NAMES = {"id", "prompt", "wants", "rounds", "best", "stopped", "forwards"}  # of a row


def opened(out: Path, asked: Mapping[str, Any], prompts: Sequence[Prompt]) -> dict[int, Row]:
    """The rows of prompts that are done, by id, in a folder that is made if it is not there. BadInput if it holds the
    work of other settings or prompts. A line that was cut off is dropped."""
    kept, trace = out / "settings.json", out / "trace.jsonl"
    wanted = json.loads(json.dumps(asked, default=str))
    if kept.exists():
        before = _settings(kept)
        other = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key))
        if other:
            key = other[0]
            raise BadInput(
                f"{out} holds refinements with {key} {before.get(key)!r}, not {wanted.get(key)!r}; "
                "choose another --out, or the same settings to go on"
            )
    elif trace.exists():
        raise BadInput(f"{out} has a trace.jsonl but no settings.json; choose another --out")
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "best").mkdir(exist_ok=True)
    files.replace(kept, (json.dumps(wanted, indent=1) + "\n").encode())
    rows = list(_whole(trace)) if trace.exists() else []
    texts = {prompt.id: prompt.text for prompt in prompts}
    for row in rows:
        if texts.get(row["id"]) != row["prompt"]:
            raise BadInput(f"{out} holds prompt {row['id']}, {row['prompt']!r}, which is not among these prompts")
    files.replace(trace, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return {row["id"]: row for row in rows}


def _settings(file: Path) -> dict[str, Any]:
    with refusing():
        text = files.text(file)
        try:
            before = files.parsed(text)
        except ValueError as error:
            raise ValueError(f"{file}: {error}; choose another --out") from None
    if not isinstance(before, dict):
        raise BadInput(f"{file}: no settings of a refinement; choose another --out")
    return before


def _whole(trace: Path) -> Iterator[Row]:
    """The rows of a trace; the last may have been cut off."""
    with refusing():
        text = files.text(trace)
    lines = files.lines(text)
    for number, line in enumerate(lines, 1):
        try:
            row = files.parsed(line)
        except ValueError:
            if number == len(lines) and not text.endswith("\n"):
                return
            raise BadInput(f"{trace}, line {number}: no JSON object") from None
        if not (isinstance(row, dict) and row.keys() >= NAMES and tables.whole(row["id"]) is not None):
            raise BadInput(f"{trace}, line {number}: no row of a refinement; choose another --out")
        yield row


def run(
    left: Sequence[Prompt], together: int, refined: Callable[[Sequence[Prompt]], list[Story]], out: Path
) -> Iterator[Row]:
    """Refine `together` prompts at a time; yields their rows once they are on disk."""
    for start in range(0, len(left), together):
        stories = refined(left[start : start + together])
        with failing(out, ROWS_ARE_WHOLE):
            rows = [written(story, out) for story in stories]
            files.append(out / "trace.jsonl", *rows)
            files.sync(out / "trace.jsonl")
        yield from rows


def written(story: Story, out: Path) -> Row:
    """Write a story's images; returns its row."""
    stem, rounds = f"{story.prompt.id:05d}", []
    for number, own in enumerate(story.rounds):
        name = f"images/{stem}-{number}.png"
        picture = to_pil(own.image[None])[0]
        picture.save(out / name)
        if number == story.best:
            picture.save(out / "best" / f"{stem}.png")
        rounds.append(
            {
                "image": name,
                "from": own.parent if own.parent >= 0 else None,
                "moves": own.moves,
                "attempt": asdict(own.attempt) if own.attempt else None,
                "scores": {key: None if value != value else round(value, 6) for key, value in own.scores.items()},
                "critique": own.critique,
                "revised": own.request,
                "failure": own.failure,
                "places": heat.record(None, own.regions, tuple(own.image.shape[1:])),
                "forwards": own.forwards,
            }
        )
    prompt = {"id": story.prompt.id, "prompt": story.prompt.text, "wants": dict(story.prompt.wants)}
    return prompt | {"rounds": rounds, "best": story.best, "stopped": story.stopped, "forwards": story.forwards}


def summary(rows: Sequence[Row], by: str) -> dict[str, Any]:
    """Mean score of the first image and of the one that was kept, over prompts that have both; what it took; why it
    ended."""
    pairs = [(_score(row, 0, by), _score(row, row["best"], by)) for row in rows]
    had = [(first, best) for first, best in pairs if first is not None and best is not None]
    why: dict[str, int] = {}
    for row in rows:
        reason = row["stopped"].split(":")[0].split(" in ")[0]
        why[reason] = why.get(reason, 0) + 1
    return {
        "prompts": len(rows),
        "first": sum(first for first, _ in had) / len(had) if had else None,
        "best": sum(best for _, best in had) / len(had) if had else None,
        "gained": sum(best > first for first, best in had),
        "unscored": len(rows) - len(had),
        "images": sum(len(row["rounds"]) for row in rows),
        "forwards": round(sum(row["forwards"] for row in rows)),
        "stopped": dict(sorted(why.items())),
    }


def _score(row: Row, number: int, by: str) -> float | None:
    return row["rounds"][number]["scores"][by]


def pairs(rows: Sequence[Row], by: str, folder: str) -> list[Row]:
    """The best and the worst image of each prompt whose scores differ, as a choice between two pictures below `folder`,
    which `mmalign score` reads."""
    found = []
    for row in rows:
        scored = [k for k in range(len(row["rounds"])) if _score(row, k, by) is not None]
        if not scored:
            continue
        worst = min(scored, key=lambda k: _score(row, k, by))
        if _score(row, worst, by) < _score(row, row["best"], by):
            best, other = (os.path.join(folder, row["rounds"][k]["image"]) for k in (row["best"], worst))
            images = {"image_a": best, "image_b": other}
            gap = _score(row, row["best"], by) - _score(row, worst, by)
            found.append(row["wants"] | {"id": row["id"], "prompt": row["prompt"], **images, "chosen": "a", "gap": gap})
    return found


def requests(rows: Sequence[Row], by: str) -> list[Row]:
    """The requests that made a better image than the prompt itself did, as prompts."""
    found = []
    for row in rows:
        best = row["rounds"][row["best"]]["attempt"]
        first = _score(row, 0, by)
        if best and best["request"] != row["prompt"] and first is not None and _score(row, row["best"], by) > first:
            found.append(row["wants"] | {"id": row["id"], "prompt": best["request"], "first": row["prompt"]})
    return found


def export(rows: Sequence[Row], file: Path) -> None:
    files.write(file, "".join(json.dumps(row) + "\n" for row in rows))
