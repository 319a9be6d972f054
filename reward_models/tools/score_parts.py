"""Score a stream of images by any number of processes, which share one folder and nothing else.

    OUT.parts/settings.json    what is scored and by what; another command into the folder must have the same
    OUT.parts/000017.jsonl     a block of consecutive images: a line about the block, then a row for each image
    OUT.parts/lock             a byte for each block and process; who works on it holds its lock

A process takes the next block that no process has done or holds, and writes its part as a whole. The lock of a process
that ends, in whatever way, is free again, and so is its block. The first line of a part has the place behind the block,
so that a command that continues begins there, with whatever number of processes. At the end process 0 joins the parts
in order. Blocks do not depend on the number of processes, and no image is scored together with one of another block, so
the result does not either.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from reward_models import files, images, limits, tables
from reward_models.pictures import worded
from reward_models.tools.picture_files import Item, read
from reward_models.tools.score_files import (
    OUTPUTS,
    Row,
    check_prompts,
    compares,
    digests,
    flat,
    group_of,
    left,
    needs_prompts,
    record_of,
    score_blocks,
)
from reward_models.tools.streams import Place, Stream, of_items, of_source
from reward_models.types import RewardModel

SETTINGS, LOCK = "settings.json", "lock"
PROCESS = 2**40  # the byte of process 0 in the lock file; those before are of blocks
PAUSE = 0.2  # seconds between two looks at what other processes do
BUSY = (errno.EAGAIN, errno.EACCES)


@dataclass(frozen=True)
class Processes:
    """This process is `rank` of `size`; `meet` waits until all have come so far."""

    rank: int = 0
    size: int = 1
    meet: Callable[[str], None] = lambda what: None


ALONE = Processes()


@dataclass
class Block:
    """A block of images: its number, its places, its items and, once they are scored, their rows."""

    number: int
    begin: Place
    end: Place
    items: list[Item] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)  # a number for each prompt, with a groupwise scorer
    rows: list[Row] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------- statistics


class Statistics(NamedTuple):
    """The number of values and of missing ones, and of the values the mean, the sum of squared deviations, the minimum
    and the maximum, 0 without values."""

    count: int = 0
    missing: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Statistics":
        there = [float(value) for value in values if value is not None]
        if not there:
            return cls(0, len(values))
        mean = math.fsum(there) / len(there)
        squares = math.fsum((value - mean) ** 2 for value in there)
        return cls(len(there), len(values) - len(there), mean, squares, min(there), max(there))

    def joined(self, other: "Statistics") -> "Statistics":
        """Those of the values of both."""
        count, missing = self.count + other.count, self.missing + other.missing
        if not self.count or not other.count:
            return (self if self.count else other)._replace(missing=missing)
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        squares = self.squares + other.squares + apart**2 * self.count * other.count / count
        return Statistics(count, missing, mean, squares, min(self.low, other.low), max(self.high, other.high))

    def row(self) -> dict[str, Any]:
        row = {"count": self.count, "missing": self.missing}
        if not self.count:
            return row
        deviation = math.sqrt(self.squares / self.count)
        return row | {"mean": self.mean, "std": deviation, "min": self.low, "max": self.high}


# ------------------------------------------------------------------------------------------------------ the folder


class About(BaseModel):
    """What the first line of a part says of its block: the places where it begins and ends, the digests of its first
    image, the numbers of its rows, of their bytes, of rows with failures and of animated pictures, how many prompts
    each reader truncates, the numbers of its prompts (`Block.groups`), and the statistics of each score."""

    model_config = ConfigDict(strict=True, extra="forbid")
    begin: Place
    end: Place
    first: dict[str, str]
    rows: PositiveInt
    bytes: PositiveInt
    failed: NonNegativeInt
    animated: NonNegativeInt
    cut: dict[str, NonNegativeInt]
    groups: list[int]
    scores: dict[str, Statistics]


@dataclass(frozen=True)
class Parts:
    """The folder of parts. `lock` is the open file of locks, `size` the images of a block at least; a block of a
    groupwise scorer ends where a prompt does."""

    folder: Path
    lock: int
    processes: Processes
    size: int

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"

    def numbers(self) -> set[int]:
        """The numbers of the blocks that are done."""
        names = (name.partition(".") for name in os.listdir(self.folder))
        return {int(stem) for stem, _, ending in names if ending == "jsonl" and stem.isdecimal()}

    def take(self, number: int) -> bool:
        """Take a block, unless another process holds it. On a disk without locks blocks are distributed by number."""
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            return error.errno not in BUSY and number % self.processes.size == self.processes.rank
        return True

    def release(self, number: int) -> None:
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, number)
        except OSError as error:
            if error.errno in BUSY:
                raise

    def about(self, number: int) -> "About":
        """The first line of a part. ValueError if it is none."""
        with files.opened(self.path(number)) as file:
            line = file.readline(limits.JSON)
        try:
            return About.model_validate_json(line)
        except ValidationError:
            raise ValueError(f"{self.path(number)}: not a part of scores; remove it to score its block again") from None

    def rows(self, number: int, size: int) -> bytes:
        """The rows of a part, which are `size` bytes. ValueError if they are not."""
        with files.opened(self.path(number)) as file:
            file.readline()
            rows = file.read(size + 1)
        if len(rows) != size:
            raise ValueError(f"{self.path(number)}: damaged; remove it to score its block again")
        return rows

    def put(self, block: Block, cut: Mapping[str, int]) -> None:
        """Write the part of a block."""
        data = "".join(json.dumps(row) + "\n" for row in block.rows).encode()
        moving = sum(images.animated(i.file, i.data) for i in block.items)
        about = About(
            begin=block.begin, end=block.end, first=digests(block.items[0]), rows=len(block.rows), bytes=len(data),
            failed=sum(bool(row["failures"]) for row in block.rows), animated=moving, cut=dict(cut),
            groups=block.groups,
            scores={name: Statistics.of([row["scores"][name] for row in block.rows])
                    for name in block.rows[0]["scores"]},
        )  # fmt: skip
        files.replace(self.path(block.number), about.model_dump_json().encode() + b"\n" + data)


@contextmanager
def opened(out: Path, settings: Mapping[str, Any], size: int, processes: Processes) -> Iterator[Parts]:
    """The folder of parts of the file `out`, which process 0 makes. ValueError if it holds the work of another command,
    or another command works on it now."""
    folder = out.with_name(f"{out.name}.parts")
    if processes.rank == 0:
        _begin(folder, settings, size)
    processes.meet("the folder of parts")
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        parts = Parts(folder, lock, processes, _begin(folder, settings, size))
        if not parts.take(PROCESS + processes.rank) and _has_locks(lock):
            raise ValueError(f"{folder}: another command is scoring into {out}; let it end")
        processes.meet("the first block")
        yield parts
    finally:
        os.close(lock)


def _has_locks(lock: int) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 2 * PROCESS)
    except OSError as error:
        return error.errno in BUSY
    return True


def _begin(folder: Path, settings: Mapping[str, Any], size: int) -> int:
    """Make the folder, or check that it holds the work of these settings. Returns the size of its blocks."""
    files.make_folder(folder)
    file, wanted = folder / SETTINGS, json.loads(json.dumps(dict(settings)))
    if not file.exists():
        files.replace(file, json.dumps(wanted | {"block": size}).encode())
    before = files.parsed(files.text(file))
    if not isinstance(before, dict) or type(before.get("block")) is not int or before["block"] < 1:
        raise ValueError(f"{file}: no settings of scoring; choose another --out")
    for key in wanted:
        if before.get(key) != wanted[key]:
            raise ValueError(
                f"{folder} holds scores of another {key}; choose another --out, or remove the folder to begin again"
            )
    return before["block"]


# --------------------------------------------------------------------------------------------------------- scoring


def fill(
    parts: Parts,
    stream: Stream,
    source: str | Path,
    scorers: Mapping[str, RewardModel],
    shown: Callable[[int], None] = lambda images: None,
) -> int:
    """Score the blocks of a stream that no process has done or holds, and write their parts; process 0 stays until all
    are done. Returns the number of images scored here; `shown` gets it as it grows. ValueError for an image without a
    prompt that a scorer needs, and as `Stream.samples`."""
    scored, complete = 0, False
    while not complete:
        rest = _Rest(parts, stream, source, scorers)
        scored = _score(parts, rest.blocks(), scorers, scored, shown)
        complete = not rest.held or parts.processes.rank > 0
        if not complete:
            time.sleep(PAUSE)
    return scored


def _score(
    parts: Parts, blocks: Iterator[Block], scorers: Mapping[str, RewardModel], scored: int,
    shown: Callable[[int], None],
) -> int:  # fmt: skip
    taken: deque[Block] = deque()

    def items() -> Iterator[list[Item]]:
        for block in blocks:
            taken.append(block)
            yield block.items

    for row in score_blocks(items(), scorers):
        block = taken[0]
        block.rows.append(row)
        if len(block.rows) == len(block.items):
            parts.put(block, _cut(block, scorers))
            parts.release(block.number)
            taken.popleft()
            scored += len(block.rows)
            shown(scored)
    return scored


def _cut(block: Block, scorers: Mapping[str, RewardModel]) -> dict[str, int]:
    """How many prompts of a block each reader truncates."""
    texts = [item.prompt.text for item in block.items if item.prompt]
    counts = {}
    for scorer in scorers.values():
        for reader in getattr(getattr(scorer, "scorer", scorer), "readers", list)():
            counts[f"the {reader.tokens} tokens that {reader.name} reads"] = sum(map(reader.cuts, texts))
    return {name: count for name, count in counts.items() if count}


class _Rest:
    """The blocks that are left. `held`: whether another process held some of them when they were passed."""

    def __init__(self, parts: Parts, stream: Stream, source: str | Path, scorers: Mapping[str, RewardModel]):
        self.parts, self.stream, self.source, self.scorers = parts, stream, source, scorers
        self.held = False
        self.groups: set[int] | None = set() if compares(scorers) else None
        self.readers = needs_prompts(scorers)

    def blocks(self) -> Iterator[Block]:
        """Those that this process takes, in order."""
        done, number, place = self.parts.numbers(), 0, Place()
        samples = None
        while True:
            if number in done and self.groups is None:  # only the last part of a series is read
                while number + 1 in done:
                    number += 1
            if number in done or self.parts.path(number).exists():
                about = self.parts.about(number)
                if number in done and number + 1 not in done:
                    self._compare(number, about)
                self._enter(about.groups)
                place, number, samples = about.end, number + 1, None
                continue
            mine = self.parts.take(number)
            if mine and self.parts.path(number).exists():  # done in between
                self.parts.release(number)
                continue
            self.held |= not mine
            samples = samples or _Peeked(self.stream.samples(place))
            block = self._block(number, place, samples, mine)
            if block.end == place:
                if mine:
                    self.parts.release(number)
                return
            if mine:
                yield block
            number, place = number + 1, block.end

    def _block(self, number: int, place: Place, samples: "_Peeked", mine: bool) -> Block:
        """The next block of the samples; its items only if it is `mine`."""
        block, count, group = Block(number, place, place), 0, None
        while (sample := samples.peek()) is not None:
            if self.groups is not None:
                of_sample = group_of(sample.prompt())
                if of_sample != group:
                    if count >= self.parts.size:
                        break
                    block.groups.append(_number(of_sample))
                    self._enter(block.groups[-1:], of_sample)
                group = of_sample
            elif count == self.parts.size:
                break
            if mine:
                block.items.append(self._checked(sample.item()))
            block.end, count = sample.after, count + 1
            samples.drop()
        return block

    def _compare(self, number: int, about: About) -> None:
        """ValueError unless the first image of a block that is done is still there."""
        samples = self.stream.samples(about.begin)  # the file of a sample is open as long as these are
        sample = next(samples, None)
        if sample is None or digests(sample.item()) != about.first:
            raise ValueError(
                f"{self.source} has changed since {self.parts.path(number)} was scored from it; choose another --out, "
                f"or remove {self.parts.folder} to begin again"
            )

    def _enter(self, numbers: Sequence[int], group: tuple[int, str | None] = (0, None)) -> None:
        """Note the prompts of a block. ValueError for one that was in an earlier block."""
        if self.groups is None:
            return
        if not self.groups.isdisjoint(numbers):
            raise ValueError(
                f"{self.source}: the images of prompt {group[0]} {str(group[1])[:60]!r} are not one after another, and "
                "a scorer compares them"
            )
        self.groups.update(numbers)

    def _checked(self, item: Item) -> Item:
        if item.prompt is None and self.readers:
            raise ValueError(
                f"{self.readers[0]} needs the prompt, and {item.name} in {self.source} has none; give --prompt TEXT"
            )
        return item


def _number(group: tuple[int, str | None]) -> int:
    """64 bits of the digest of a prompt."""
    digest = hashlib.sha256(json.dumps(group).encode()).digest()
    return int.from_bytes(digest[:8])


class _Peeked:
    """An iterator whose next element can be looked at."""

    def __init__(self, iterator: Iterator[Any]):
        self.iterator, self.waiting = iterator, deque()

    def peek(self) -> Any:
        """The next element, None at the end."""
        if not self.waiting:
            self.waiting.append(next(self.iterator, None))
        return self.waiting[0]

    def drop(self) -> None:
        self.waiting.popleft()


# --------------------------------------------------------------------------------------------------------- joining


def join(parts: Parts, write: Callable[[Iterator[bytes]], None]) -> dict[str, Any]:
    """Give the rows of all blocks in order, as JSONL, to `write`, and remove the folder. Process 0 calls it when all
    blocks are done; it waits until the other processes have left. Returns the summary, without correlations and without
    anything about prompts that repeat, which need all rows at once. ValueError for a part that is damaged."""
    if _has_locks(parts.lock):
        for rank in range(1, parts.processes.size):
            fcntl.lockf(parts.lock, fcntl.LOCK_EX, 1, PROCESS + rank)
    totals: dict[str, Statistics] = {}
    counts, cut = Counter(), Counter()

    def data() -> Iterator[bytes]:
        for number in range(len(parts.numbers())):
            about = parts.about(number)
            for name, values in about.scores.items():
                totals[name] = totals.get(name, Statistics()).joined(values)
            counts.update(images=about.rows, failed=about.failed, animated=about.animated)
            cut.update(about.cut)
            yield parts.rows(number, about.bytes)

    write(data())
    shutil.rmtree(parts.folder)
    summary = {name: counts[name] for name in ("images", "failed", "animated")}
    scores = {name: total.row() for name, total in totals.items()}
    return summary | {"scores": scores, "correlation": {}, "cut": dict(cut)}


@dataclass(frozen=True)
class ScoredStream:
    """The summary of `join`, and the number of images that this process scored now."""

    summary: dict[str, Any]
    scored: int


def score_stream(
    source: str | Path,
    scorers: Mapping[str, RewardModel] | Callable[[], Mapping[str, RewardModel]],
    out: str | Path,
    prompt: str | None = None,
    batch: int = 64,
    warn: Callable[[str], None] = lambda line: None,
    shown: Callable[[int], None] = lambda images: None,
    processes: Processes = ALONE,
) -> ScoredStream:
    """Score the images of a stream (`streams.of_source`) into the file `out` (JSONL, CSV or Parquet), a row for each
    image, in order. The settings are those of `score_files`; `shown` gets the number of images scored so far. In memory
    are a few batches of images, whatever the length of the stream; with a scorer that compares the images of a prompt,
    which must come one after another, also a number for each prompt. An interrupted command continues in seconds, with
    any number of processes. Only process 0 has a complete summary. ValueError, in one line, for a stream that cannot be
    scored, and if `out` is there already; OSError if it cannot be written.

        score_stream("shards", {"clip": load("clip")}, "scores.jsonl")  # shards/000.tar, shards/001.tar, ...
    """
    source, out = Path(source), Path(os.path.realpath(out))
    if out.suffix.lower() not in OUTPUTS:
        raise ValueError(f"--out {out}: a name that ends in {', '.join(OUTPUTS)} is needed")
    if out.exists():
        raise ValueError(f"--out {out} is there already; choose another name or remove it")
    stream = of_source(source, prompt if prompt is None else worded(prompt, "--prompt"))
    if count := stream.others:
        warn(f"left out of {source}: {count} files of other kinds")
    scorers = scorers() if callable(scorers) else scorers
    files.make_folder(out.parent)
    names = [f"{name}.{component}" for name, scorer in scorers.items() for component in scorer.names]
    settings = settings_of(stream, scorers) | {"prompt": prompt}
    with opened(out, settings, batch, processes) as parts:
        scored = fill(parts, stream, source, scorers, shown)
        if processes.rank > 0:
            return ScoredStream({}, scored)
        summary = join(parts, partial(write, names, out))
    if summary["images"] == 0:
        raise ValueError(f"{source}: no images in it")
    for reads, count in summary.pop("cut").items():
        warn(f"{count} of {summary['images']} prompts are longer than {reads}; they are truncated")
    if count := summary.pop("animated"):
        warn(f"{count} of {summary['images']} pictures are animated; the first frame is scored")
    return ScoredStream(summary, scored)


def score_together(
    source: str | Path,
    scorers: Mapping[str, RewardModel],
    out: str | Path,
    prompt: str | None,
    batch: int,
    shown: Callable[[int], None],
    processes: Processes,
) -> int:
    """Score by several processes what `score_files` would still have to score into `out`, of a folder or table that is
    read as a whole; it then finds all rows there. Returns the number of images that this process scored."""
    source, record = Path(source), record_of(Path(out))
    items, _ = read(source, prompt, Path(out))
    check_prompts(source, items, scorers)
    files.make_folder(record.parent)
    done, rest = left(record, items, scorers)
    if compares(scorers):
        first: dict[tuple, int] = {}
        for number, item in enumerate(rest):
            first.setdefault(group_of(item.prompt), number)
        rest.sort(key=lambda item: first[group_of(item.prompt)])
    stream = of_items(rest)
    with opened(record, settings_of(stream, scorers), batch, processes) as parts:
        scored = fill(parts, stream, source, scorers, shown)
        if processes.rank == 0:
            before = "".join(json.dumps(row) + "\n" for row in done.values()).encode()
            join(parts, lambda data: write([], record, chain([before], data)))
    processes.meet("the rows of all processes")
    return scored


def settings_of(stream: Stream, scorers: Mapping[str, RewardModel]) -> dict[str, Any]:
    """What the scores of a folder of parts depend on."""
    digest = hashlib.sha256(json.dumps(stream.identity).encode("utf-8", "backslashreplace")).hexdigest()
    return {"source": digest, "scorers": {name: scorer.card.version for name, scorer in scorers.items()}}


def write(names: Sequence[str], out: Path, data: Iterator[bytes]) -> None:
    """Write rows in JSONL as JSONL, CSV or Parquet, by the suffix of `out`, atomically. `names` are those of the
    scores."""
    ending = out.suffix.lower()
    with files.replacing(out) as file:
        if ending == ".jsonl":
            for rows in data:
                file.write(rows)
        elif ending == ".csv":
            for number, rows in enumerate(data):
                text = tables.separated([flat(files.parsed(row)) for row in files.lines(files.decoded(rows))])
                file.write((text.partition("\r\n")[2] if number else text).encode())
        else:
            _write_parquet(names, file, data)


def _write_parquet(names: Sequence[str], file: BinaryIO, data: Iterator[bytes]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'mmalign[parquet]'") from None
    text, columns = pyarrow.string(), [(name, pyarrow.float64()) for name in names]
    schema = pyarrow.schema([("image", text), ("prompt", text), ("id", pyarrow.int64()), *columns, ("failures", text)])
    with parquet.ParquetWriter(file, schema) as writer:
        for rows in data:
            table = [flat(files.parsed(row)) for row in files.lines(files.decoded(rows))]
            writer.write_table(pyarrow.Table.from_pylist(table, schema))
