"""Bytes that are on the disk whole or not at all, whenever the process is killed or the disk is full."""

import json
import os
from pathlib import Path


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
    """Put a file in the place of another: whoever looks finds one of the two."""
    partial = path.with_name(f".{path.name}.partial")
    put(partial, data)
    os.replace(partial, path)
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


def rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines, none where there is no file. Lines that a kill left half are left out."""
    return [row for row in objects(path.read_bytes()) if row is not None] if path.exists() else []


def objects(data: bytes) -> list[dict | None]:
    """The JSON object of each line, None where a line is none."""
    return [object_in(line) for line in data.splitlines()]


def object_in(data: bytes) -> dict | None:
    """The JSON object that these bytes are, None where they are none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
