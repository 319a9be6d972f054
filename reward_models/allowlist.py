"""The allowlist of importable modules, and checks that untrusted paths stay in their folder.

A config, a run folder or a model index may name a class by import path (`my_module:MyScorer`). Importing runs code, so
a module is imported only if the user allowed its top-level name, by `--allow my_module` on the command line or in the
environment variable MMALIGN_ALLOW (comma-separated). A file cannot allow a module, not even a run's own `config.yaml`.
The rule includes modules that are already installed or imported: `os:system` is an import path like any other.
"""

import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

VARIABLE = "MMALIGN_ALLOW"


def allow_modules(names: Iterable[str]) -> None:
    """Allow modules by top-level name in this process and its children. ValueError for anything but such a name."""
    names = list(names)
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"--allow {name!r}: the top-level name of a module is needed, e.g. my_module")
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*allowed(), *names]))


def allowed() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def check(module: str, what: str) -> None:
    """ValueError unless `module` is allowed; `what` names what needs it."""
    top = module.partition(".")[0]
    if top not in allowed():
        raise ValueError(
            f"{what} runs code of the module {top!r}, which is not allowed; if you trust it: --allow {top}, or "
            f"{VARIABLE}={top} in the environment"
        )


def import_allowed(path: str, what: str, ours: bool = False) -> Any:
    """The object at an import path `my_module:name`; `what` names what needs it. ValueError if the module is not
    allowed (unless it is `ours`), cannot be imported or lacks the name."""
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
    """The path of `name` in `folder`. ValueError if it lies outside, by `..`, an absolute path or a link."""
    path = Path(folder) / name
    try:
        end = path.resolve()
    except (OSError, RuntimeError):
        raise ValueError(f"{folder}: {name!r} is a circular link") from None
    if not end.is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{folder}: {name!r} leads out of that folder; it is not used")
    return path


def no_links_out(folder: str | Path) -> None:
    """ValueError if a link in `folder` leads out of it, because reads and writes would go elsewhere. `folder` itself
    may be a link."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(parent, name)):
                inside(folder, os.path.relpath(os.path.join(parent, name), folder))
