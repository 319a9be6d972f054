"""Read a run's files of JSON lines, tolerating lines that a kill left half written."""

from pathlib import Path

from reward_models.files import parsed


def rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines, none where there is no file. Lines that a kill left half are left out."""
    return [row for row in objects(path.read_bytes()) if row is not None] if path.exists() else []


def objects(data: bytes) -> list[dict | None]:
    """The JSON object of each line, None where a line is none."""
    parts = data.split(b"\n")
    return [object_in(part) for part in (parts if parts[-1] else parts[:-1])]


def object_in(data: bytes) -> dict | None:
    """The JSON object that these bytes are, None where they are none. Its numbers may be NaN or infinite."""
    try:
        found = parsed(data, strict=False)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
