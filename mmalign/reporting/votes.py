"""Votes: which of two held-out images of one prompt a person prefers, one row of `votes.jsonl` a vote.

The rows have the form of other pairs (`reward_models.tools.picture_files`), with image names relative to the run's
folder: `mmalign score RUN/votes.jsonl --rewards clip` reports how often a score agrees. Who voted and when is not
recorded.
"""

import fcntl
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Literal

from mmalign.errors import BadInput
from mmalign.runs import jsonl
from mmalign.runs.reader import Row
from mmalign.seeds import seed_of
from reward_models import files, limits
from reward_models.allowlist import inside

FILE = "votes.jsonl"
OF_IMAGE = {
    "image",
    "prompt",
    "id",
    "noise_seed",
    "scores",
    "places",
}  # keys of a row of an image that are not ground truth
Choice = Literal["left", "right", "tie"]
CHOSEN: dict[Choice, str] = {"left": "a", "right": "b", "tie": "tie"}


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt, named relative to the run's folder; `about` is the prompt with id and ground truth."""

    left: str
    right: str
    about: Mapping[str, Any]

    @property
    def images(self) -> frozenset[str]:
        return frozenset((self.left, self.right))


def pairs(run: Path, scores: Mapping[str, Sequence[Row]]) -> list[Pair]:
    """The pairs to vote on, from the rows of `mmalign.runs.reader`: each image after training beside that of the same
    seed before, and beside that of the next seed after training. Images whose files are missing are left out.
    ValueError for a name that leads out of the folder."""
    there = {side: {row["image"]: row for row in rows if _is_there(run, side, row)} for side, rows in scores.items()}
    before, after = there["before"], there["after"]
    seeds = defaultdict(list)
    for row in after.values():
        seeds[row["id"], row["prompt"]].append(row)
    beside = [("before", image, image) for image in after if image in before]
    beside += [("after", one["image"], other["image"]) for rows in seeds.values() for one, other in pairwise(rows)]
    return [
        Pair(f"images/{side}/{one}", f"images/after/{other}", _about(after[other]))
        for side, one, other in beside
        if there[side][one]["prompt"] == after[other]["prompt"]
    ]


def _is_there(run: Path, side: str, row: Row) -> bool:
    return inside(run / "images" / side, row["image"]).is_file()


def _about(row: Row) -> dict[str, Any]:
    wants = {key: value for key, value in row.items() if key not in OF_IMAGE}
    return wants | {"id": row["id"], "prompt": row["prompt"]}


def turn(pairs: Sequence[Pair], session: str, number: int) -> Pair:
    """The pair that a session gets as its `number`-th, from 0: all pairs once in random order, then all in another
    order; which image is on the left is random too. The same for the same arguments."""
    lap, position = divmod(number, len(pairs))
    order = Random(seed_of("votes", session, lap)).sample(range(len(pairs)), len(pairs))
    pair = pairs[order[position]]
    turned = Random(seed_of("sides", session, number)).random() < 0.5
    return replace(pair, left=pair.right, right=pair.left) if turned else pair


def check(run: Path) -> None:
    """BadInput where the run's file of votes cannot be continued."""
    file = run / FILE
    try:
        data = files.content(file, limits.TEXT)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    for number, row in enumerate(jsonl.objects(data), 1):
        if row is None or not row.keys() >= {"image_a", "image_b", "chosen"}:
            raise BadInput(f"{file}, line {number}: not a vote; move the file away or remove the line")
    if data and not data.endswith(b"\n"):
        raise BadInput(f"{file}: the last line has no end; add a line feed")


def record(run: Path, pair: Pair, choice: Choice) -> None:
    """Append a vote on a pair, with its left image as `image_a`, and flush it to the disk. OSError if it cannot be
    written; the file then holds the votes before."""
    row = {**pair.about, "image_a": pair.left, "image_b": pair.right, "chosen": CHOSEN[choice]}
    with _alone(run / FILE):
        files.append(run / FILE, row)
        files.sync(run / FILE)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One thread of one process at a time: an append that fails truncates the file to what it was."""
    number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):  # a disk without locks: a row is still one write
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)
