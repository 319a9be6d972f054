"""Find the files that a config names."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout, whose assets/ a config may name from anywhere


def locate(path: str) -> str:
    """A file or folder as named, or below the checkout when it names one of the project's own; anything else
    unchanged."""
    shipped = ROOT / path
    return str(shipped) if not os.path.exists(path) and os.path.exists(shipped) else path
