"""A run's folder: one run writes in it at a time, its rows are whole, and a full disk is told in one line."""

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmalign import errors
from mmalign.config import load as configs
from mmalign.config.schema import ANEW, Config
from mmalign.errors import BadInput, Failed
from mmalign.runs import checkpoint, jsonl
from reward_models import allowlist as trust, files

RECORDS = ("metrics.jsonl", "evaluations.jsonl", "credit.jsonl", "alarms.jsonl")
WRITTEN = (*RECORDS, "config.yaml", "images", "checkpoints", "report.html")  # names that a run writes under
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
UNWRITABLE += (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)  # a file where a folder belongs, or the other way round


@contextmanager
def held(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make the folder and hold it for this process, whose end, kill -9 included, lets it go. BadInput where another
    process holds it or it cannot be written in. Folders that were made here and stayed empty are removed again."""
    try:
        made = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError) as error:  # ValueError: no file has such a name
        raise BadInput(f"out: cannot write in {str(out)[:300]}: {getattr(error, 'strerror', error)}") from None
    try:
        _lock(lock, out, say)
        yield
    finally:
        if made and [path.name for path in out.iterdir()] == [".lock"]:
            (out / ".lock").unlink()
            with suppress(OSError):  # another run has begun in it
                for path in made:
                    path.rmdir()
        os.close(lock)


def _lock(lock: int, out: Path, say: Callable[[str], None]) -> None:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            say(f"{out}: no locks here ({error.strerror}); see to it that no second run writes in this folder")
            return
        holder = {"pid": "?", "host": "?"}
        with suppress(ValueError, TypeError):  # it has hardly begun
            holder |= json.loads(os.read(lock, 1000))
        raise BadInput(
            f"out: another run, process {holder['pid']} on {holder['host']}, is writing in {out}; "
            "let it end or choose another `out`"
        ) from None
    with suppress(OSError):  # who holds it is a courtesy; a full disk is told where it matters
        os.truncate(lock, 0)
        os.write(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())


def check(out: Path, c: Config, resume: bool) -> None:
    """Refuse a folder that holds another run, or none to resume."""
    saved = out / "config.yaml"
    if resume:
        if not saved.is_file():
            raise BadInput(f"--resume: {out} holds no run")
        with errors.refusing():
            trust.no_links_out(out)
        now, before = c.model_dump(), configs.load(saved).model_dump()
        changed = [key for key in now if now[key] != before[key] and key not in ANEW]
        if changed:
            key = changed[0]
            raise BadInput(f"--resume: {key} is {now[key]!r} and was {before[key]!r}; a run keeps its config")
    elif saved.exists():
        raise BadInput(f"{out} already holds a run; go on with --resume or choose another `out`")
    elif strange := [name for name in WRITTEN if os.path.lexists(out / name)]:
        raise BadInput(f"out: {out / strange[0]} is there already, and no run it belongs to; choose another `out`")


def tidy(out: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for place in (out, out / "checkpoints"):
        checkpoint.tidy(place)


def room(out: Path, needed: int) -> None:
    """BadInput unless `needed` bytes are free."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise BadInput(
            f"out: {free / 1e6:.1f} MB free at {out}, the checkpoints of this run need {needed / 1e6:.1f} MB"
        )


def rewind(out: Path, done: int, say: Callable[[str], None]) -> None:
    """Drop the rows that a run resumed after `done` iterations writes again, and lines that are not whole."""
    for path in (out / name for name in RECORDS):
        if not path.exists():
            continue
        data = path.read_bytes()
        lines = jsonl.objects(data)
        whole = [row for row in lines if row is not None and isinstance(row.get("iteration"), int)]
        broken = len(lines) - len(whole)
        if broken:
            say(f"{path}: lines that are not whole and left out: {broken}")
        kept = "".join(json.dumps(row) + "\n" for row in whole if row["iteration"] <= done).encode()
        if kept != data:
            files.replace(path, kept)


def sync(out: Path) -> None:
    """Wait until the disk has all rows: a checkpoint follows."""
    for path in (out / name for name in RECORDS):
        if path.exists():
            files.sync(path)


ROWS_ARE_WHOLE = "what was done before is on the disk: make room and start the same again"
CHECKPOINTS_ARE_WHOLE = "the checkpoints saved before are whole: make room and go on with --resume"


@contextmanager
def failing(out: Path, advice: str = CHECKPOINTS_ARE_WHOLE) -> Iterator[None]:
    """A disk that is full or takes nothing becomes Failed, told in one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise Failed(f"cannot write {error.filename or f'in {out}'}: {error.strerror}; {advice}") from error
