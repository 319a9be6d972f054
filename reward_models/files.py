"""Read and write what lies on disk: regular files alone, bounded, text as UTF-8 whatever the locale, JSON without
surprises, and bytes that are on the disk whole or not at all.

Every reader and writer of text or JSON in this project goes through here. A byte-order mark is no character of a text,
and a line ends at a line feed (or a carriage return and a line feed) and nowhere else: U+2028, U+0085 and form feeds
are characters of a prompt.
"""

import errno
import json
import math
import os
import stat
import tempfile
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path
from typing import Any, BinaryIO

from reward_models import limits


def opened(path: str | Path) -> BinaryIO:
    """A regular file, open for reading in binary. OSError for what is missing, and for a folder, FIFO, socket or
    device, none of which is waited for."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(number, "rb")
    os.close(number)
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "no regular file", str(path))


def content(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file. OSError as `opened`; ValueError for more than `most` bytes."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"longer than {most} bytes")
    return data


def text(path: str | Path, most: int = limits.TEXT) -> str:
    """The text of a UTF-8 file without its byte-order mark; line ends as they are. ValueError, in one line that names
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
    """The lines of a text, without their ends; none after the last end."""
    parts = text.split("\n")
    if not parts[-1]:
        parts.pop()
    return [part.removesuffix("\r") for part in parts]


def parsed(text: str | bytes, strict: bool = True) -> Any:
    """The value that a JSON text stands for. ValueError, in one line, for anything else, and for what JSON does not
    have or no one can compute with: an object with a key twice, NaN, infinities, numbers too large to be finite, half a
    surrogate pair, nesting deeper than the parser goes. `strict` False: the first three are taken, for a run's own
    metrics hold NaN."""
    text = decoded(text) if isinstance(text, bytes) else text
    checks = {"object_pairs_hook": _once, "parse_constant": _no_constant, "parse_float": _finite} if strict else {}
    try:
        value = json.loads(text, **checks)
        if "\\u" in text:  # only an escape can stand for half a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("JSON with half a surrogate pair, which is no character") from None
    return value


def is_record(text: str, *names: str) -> bool:
    """Whether a text is a JSON object that has these keys, as a file of ours does."""
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
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return value


def write(path: str | Path, text: str) -> None:
    """Write a UTF-8 file with the text's own line ends, whatever the locale and the system."""
    Path(path).write_bytes(text.encode())


def put(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of another: whoever looks finds one of the two. Where that fails (OSError), the other."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        put(partial, data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, *rows: dict) -> None:
    """Add rows to a file of JSON lines; where that fails, none of them."""
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
    """The name of a file as the system's calls take it: in UTF-8 on the disk, whatever the locale."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def home(path: str) -> str:
    """A path whose `~` or `~NAME`, if it begins with one, is the home folder. ValueError where there is none."""
    whole = os.path.expanduser(path)
    if path.startswith("~") and whole == path:
        raise ValueError(f"{path}: there is no home folder {path.partition('/')[0]!r}; write the path in full, or ./~")
    return whole
