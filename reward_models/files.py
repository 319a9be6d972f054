"""File reading and writing: regular files only, bounded, UTF-8 in any locale, strict JSON, and atomic writes.

All text and JSON in this project is read and written with these functions. A byte-order mark is not part of a text, and
a line ends only at a line feed (or a carriage return and a line feed): U+2028, U+0085 and form feeds are characters of
a prompt.
"""

import errno
import json
import math
import os
import stat
import tempfile
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from reward_models import limits


def opened(path: str | Path) -> BinaryIO:
    """A regular file, open for reading in binary. OSError if it is missing, or is a folder, FIFO, socket or
    device, without waiting."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(number, "rb")
    os.close(number)
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "not a regular file", str(path))


def content(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file. OSError as `opened`; ValueError for more than `most` bytes."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"longer than {most} bytes")
    return data


def text(path: str | Path, most: int = limits.TEXT) -> str:
    """The text of a UTF-8 file without its byte-order mark; line ends unchanged. ValueError, in one line that names
    the file, for a file that cannot be read, is longer than `most` bytes, or is not UTF-8."""
    try:
        return decoded(content(path, most))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def decoded(data: bytes) -> str:
    """Bytes as UTF-8 text without a byte-order mark. ValueError that says where it is not UTF-8."""
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError("the text is UTF-16; save it as UTF-8")
    try:
        return data.removeprefix(BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8") from None


def lines(text: str) -> list[str]:
    """The lines of a text, without their ends; no empty line after the last end."""
    parts = text.split("\n")
    if not parts[-1]:
        parts.pop()
    return [part.removesuffix("\r") for part in parts]


def parsed(text: str | bytes, strict: bool = True) -> Any:
    """The value of a JSON text. ValueError, in one line, for invalid JSON, an object with a key twice, NaN, infinities,
    numbers too large for a float, a lone surrogate, and nesting too deep for the parser. Unless `strict`, duplicate
    keys, NaN and infinities are accepted, because a run's own metrics contain NaN."""
    text = decoded(text) if isinstance(text, bytes) else text
    checks = {"object_pairs_hook": _once, "parse_constant": _no_constant, "parse_float": _finite} if strict else {}
    try:
        value = json.loads(text, **checks)
        if "\\u" in text:  # only an escape can encode a lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("JSON with half a surrogate pair, which is no character") from None
    return value


def is_record(text: str, *names: str) -> bool:
    """Whether a text is a JSON object with these keys, as in our own files."""
    try:
        value = parsed(text)
    except ValueError:
        return False
    return isinstance(value, dict) and set(names) <= value.keys()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is there twice in one object")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return value


def write(path: str | Path, text: str) -> None:
    """Write a UTF-8 file with the text's own line ends, whatever the locale and the system."""
    Path(path).write_bytes(text.encode())


def put(path: Path, data: bytes) -> None:
    """Write a file and fsync it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Fsync a file, or the entries of a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace(path: Path, data: bytes) -> None:
    """Replace a file atomically: readers see either the old or the new one. The old one remains after an OSError."""
    with _swapped(path) as partial:
        put(partial, data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces the one at `path` at the end, as `replace`; after any error the old one stays."""
    with _swapped(path) as partial, partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _swapped(path: Path) -> Iterator[Path]:
    """Where to write what replaces a file at the end of the block."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, *rows: dict) -> None:
    """Append rows to a JSONL file; none of them if that fails."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:
            file.truncate(end)
            raise


def make_folder(folder: Path) -> None:
    """Make a folder. ValueError where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write in {folder}: {error.strerror}") from None


def named(name: str) -> str:
    """The name of a file for system calls: UTF-8 on disk, in any locale."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def home(path: str) -> str:
    """A path with a leading `~` or `~NAME` expanded. ValueError without such a home folder."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"{path}: there is no home folder {path.partition('/')[0]!r}; write the path in full, or ./~")
    return expanded
