"""The files that come with the project: models, prompts and pictures below `assets/`, recipes below `configs/`.

They lie in these two folders of a checkout, and in a wheel inside the package that reads them (`setup.py`).
"""

from importlib.resources import files
from pathlib import Path


def folder(package: str) -> Path:
    """The folder that holds the `assets/` of a package: that of the installed package, or else the checkout."""
    inside = Path(str(files(package)))
    return inside if (inside / "assets").is_dir() else inside.parent
