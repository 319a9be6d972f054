"""Find the files that a config or a command names; those that come with the project (`reward_models.shipped`) are found
from any folder."""

import os
from difflib import get_close_matches
from pathlib import Path

from mmalign.errors import BadInput
from reward_models import shipped

FOLDERS = ("assets", "configs")
ENDING = ".yaml"


def locate(path: str) -> str:
    """A file or folder as named, or one of the project's, where the name begins with `assets/` or `configs/` and
    nothing has that name here; anything else unchanged. A table of prompts may have `:COLUMN` after its name."""
    file, colon, column = path.partition(":")
    if os.path.exists(file) or not Path(file).parts or Path(file).parts[0] not in FOLDERS:
        return path
    ours = str(shipped.folder("mmalign") / file)
    return ours + colon + column if os.path.exists(ours) else path


def config(path: str | Path) -> Path:
    """The file of a config: as named, or with `.yaml` added, or the one of that name that comes with the project.
    BadInput, with the names that come with the project, for a bare name that is none of them."""
    name = str(path)
    for file in (locate(name), locate(name + ENDING)):
        if os.path.isfile(file):
            return Path(file)
    ours = {file.stem: file for file in (shipped.folder("mmalign") / "configs").glob(f"*{ENDING}")}
    bare = name.removesuffix(ENDING)
    if bare in ours:
        return ours[bare]
    if os.path.lexists(name) or Path(name).name != name:
        return Path(name)  # whoever reads it reports what is wrong with it
    near = ", ".join(get_close_matches(bare, sorted(ours), n=len(ours) or 1, cutoff=0))
    raise BadInput(f"{name}: no such file, and no config of that name comes with mmalign; nearest first: {near}")
