"""A run's folder: one run writes in it at a time, rows are written atomically, a full disk is reported in one line."""

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
from mmalign.config.schema import RESUMABLE, Config
from mmalign.errors import BadInput, Failed
from mmalign.runs import checkpoint, jsonl
from reward_models import allowlist as trust, files

RECORDS = ("metrics.jsonl", "evaluations.jsonl", "credit.jsonl", "alarms.jsonl", "refreshes.jsonl")
OUTPUTS = (  # what a run's folder holds
    *RECORDS, "config.yaml", "images", "checkpoints", "refreshed", "report.html", "votes.jsonl",
)  # fmt: skip
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
UNWRITABLE += (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)  # a file instead of a folder, or the reverse


@contextmanager
def locked(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Create the folder and lock it for this process, whose end, kill -9 included, releases the lock. BadInput where
    another process holds the lock or the folder is not writable. Folders that were created and stayed empty are
    removed."""
    try:
        made = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError) as error:  # ValueError: a file cannot have such a name
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
            say(f"{out}: this disk has no locks ({error.strerror}); make sure that no second run writes in this folder")
            return
        holder = {"pid": "?", "host": "?"}
        with suppress(ValueError, TypeError):  # it has just started
            holder |= json.loads(os.read(lock, 1000))
        raise BadInput(
            f"out: another run, process {holder['pid']} on {holder['host']}, is writing in {out}; "
            "let it end or choose another `out`"
        ) from None
    with suppress(OSError):  # recording the lock holder is best effort
        os.truncate(lock, 0)
        os.write(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())


def check(out: Path, c: Config, resume: bool) -> None:
    """BadInput for a folder that holds another run, or with `resume` for one without a run."""
    saved = out / "config.yaml"
    if resume:
        if not saved.is_file():
            raise BadInput(f"--resume: {out} holds no run")
        with errors.refusing():
            trust.no_links_out(out)
        now, before = c.model_dump(), configs.load(saved).model_dump()
        changed = [key for key in now if now[key] != before[key] and key not in RESUMABLE]
        if changed:
            key = changed[0]
            raise BadInput(f"--resume: {key} is {now[key]!r} and was {before[key]!r}; a run keeps its config")
    elif saved.exists():
        raise BadInput(f"{out} already holds a run; continue with --resume or choose another `out`")
    elif strange := [name for name in OUTPUTS if os.path.lexists(out / name)]:
        raise BadInput(f"out: {out / strange[0]} exists already and belongs to no run; choose another `out`")


def tidy(out: Path) -> None:
    """Remove the remains of interrupted writes and removals."""
    for folder in (out, out / "checkpoints"):
        checkpoint.tidy(folder)


def check_space(out: Path, needed: int) -> None:
    """BadInput unless `needed` bytes are free."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise BadInput(
            f"out: {free / 1e6:.1f} MB free at {out}, the checkpoints of this run need {needed / 1e6:.1f} MB"
        )


def rewind(out: Path, done: int, say: Callable[[str], None]) -> None:
    """Drop the rows that a run resumed after `done` iterations writes again, and incomplete lines."""
    for path in (out / name for name in RECORDS):
        if not path.exists():
            continue
        data = path.read_bytes()
        lines = jsonl.objects(data)
        complete = [row for row in lines if row is not None and isinstance(row.get("iteration"), int)]
        broken = len(lines) - len(complete)
        if broken:
            say(f"{path}: incomplete lines that are left out: {broken}")
        rewound = "".join(json.dumps(row) + "\n" for row in complete if row["iteration"] <= done).encode()
        if rewound != data:
            files.replace(path, rewound)


def sync(out: Path) -> None:
    """Flush all rows to the disk, before a checkpoint is written."""
    for path in (out / name for name in RECORDS):
        if path.exists():
            files.sync(path)


ROWS_ARE_WHOLE = "earlier results are on the disk: free some space and start the same command again"
CHECKPOINTS_ARE_WHOLE = "earlier checkpoints are complete: free some space and continue with --resume"


@contextmanager
def failing(out: Path, advice: str = CHECKPOINTS_ARE_WHOLE) -> Iterator[None]:
    """Turn out-of-space and read-only errors into Failed, with `advice`."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise Failed(f"cannot write {error.filename or f'in {out}'}: {error.strerror}; {advice}") from error
