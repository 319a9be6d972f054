"""What files from others may do here: name code only where it was allowed, and files only within their own folder.

A config, a run's folder or a model's index may name a class by import path (`my_module:MyScorer`). Importing runs code,
so a module is imported only when the user allowed its top-level name, by `--allow my_module` on the command line or in
the environment variable MMALIGN_ALLOW (comma-separated). No file can: not a config, not a run's own `config.yaml`. This
holds for modules that are installed or imported already, too: `os:system` is an import path like any other.
"""

import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

VARIABLE = "MMALIGN_ALLOW"


def allow_modules(names: Iterable[str]) -> None:
    """Allow modules by top-level name in this process and those it starts. ValueError for anything else."""
    names = list(names)
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"--allow {name!r}: the top-level name of a module is needed, e.g. my_module")
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*allowed(), *names]))


def allowed() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def check(module: str, what: str) -> None:
    """ValueError unless `module` was allowed; `what` names its user."""
    top = module.partition(".")[0]
    if top not in allowed():
        raise ValueError(
            f"{what} runs code of the module {top!r}, which is not allowed; if you trust it: --allow {top}, or "
            f"{VARIABLE}={top} in the environment"
        )


def import_allowed(path: str, what: str, ours: bool = False) -> Any:
    """What an import path `my_module:name` stands for; `what` names its user. ValueError if the module is not allowed
    (unless it is `ours`), cannot be imported or has no such name."""
    module, _, name = path.partition(":")
    if not ours:
        check(module, what)
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what}: no module named {error.name!r}") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error


def inside(folder: str | Path, name: str) -> Path:
    """The file called `name` in `folder`. ValueError if that is outside of it, be it by `..`, a root or a link."""
    path = Path(folder) / name
    try:
        end = path.resolve()
    except (OSError, RuntimeError):
        raise ValueError(f"{folder}: {name!r} is a link in a circle") from None
    if not end.is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{folder}: {name!r} leads out of that folder; it is not touched")
    return path


def no_links_out(folder: str | Path) -> None:
    """ValueError if a link in `folder` leads out of it: what is read there would be from, and what is written to,
    elsewhere. `folder` itself may be a link."""
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(where, name)):
                inside(folder, os.path.relpath(os.path.join(where, name), folder))
