"""Read a run's JSON-lines files, tolerating incomplete lines."""

from pathlib import Path

from reward_models.files import parsed


def rows(path: Path) -> list[dict]:
    """The rows of a JSON-lines file, none if it does not exist. Incomplete lines are left out."""
    return [row for row in objects(path.read_bytes()) if row is not None] if path.exists() else []


def objects(data: bytes) -> list[dict | None]:
    """The JSON object of each line, None where a line is something else."""
    lines = data.split(b"\n")
    return [object_in(line) for line in (lines if lines[-1] else lines[:-1])]


def object_in(data: bytes) -> dict | None:
    """The JSON object in these bytes, None where they are something else. Its numbers may be NaN or infinite."""
    try:
        value = parsed(data, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
