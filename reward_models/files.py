"""Read what lies on disk: regular files alone, bounded, text as UTF-8 whatever the locale, JSON without surprises.

Every reader of text or JSON in this project goes through here. A byte-order mark is no character of a text, and a line
ends at a line feed (or a carriage return and a line feed) and nowhere else: U+2028, U+0085 and form feeds are
characters of a prompt.
"""

import errno
import json
import math
import os
import stat
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


def parsed(text: str | bytes) -> Any:
    """The value that a JSON text stands for. ValueError, in one line, for anything else, and for what JSON does not
    have or no one can compute with: NaN, infinities, numbers too large to be finite, half a surrogate pair, nesting
    deeper than the parser goes."""
    text = decoded(text) if isinstance(text, bytes) else text
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if "\\u" in text:  # only an escape can stand for half a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("JSON with half a surrogate pair, which is no character") from None
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
