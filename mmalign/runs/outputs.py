"""Check the files and folders that a command is about to write, before any work is spent on them."""

import os
from collections.abc import Callable
from pathlib import Path

from mmalign.errors import BadInput, refusing
from reward_models import files


def make_folder(folder: Path) -> None:
    """Make a folder. BadInput where nothing can be written in it."""
    with refusing():
        files.make_folder(folder)


def check_file(file: Path | None, option: str, ours: Callable[[str], bool] = lambda text: False) -> None:
    """Make the folder of a file that will be written; None stands for none. BadInput where the folder cannot be made,
    or where a file is there whose text is not `ours` and would be lost."""
    if file is None:
        return
    make_folder(file.parent)
    if not os.path.lexists(file):
        return
    try:
        if file.stat().st_size and not ours(files.text(file)):
            raise ValueError(f"{file}: another file is there")
    except (OSError, ValueError) as error:
        reason = f"{file}: {error.strerror}" if isinstance(error, OSError) else error
        raise BadInput(f"{option} {reason}; it is not overwritten, choose another name or remove it") from None


def has_rows(*keys: str) -> Callable[[str], bool]:
    """A test whether each line of a text is a JSON object with these keys."""
    return lambda text: all(files.is_record(line, *keys) for line in files.lines(text))
