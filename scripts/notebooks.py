"""Run the notebooks of examples/ from top to bottom, in a folder that is removed afterwards, and store their outputs.

python scripts/notebooks.py [NAME ...]
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
KERNEL = "python3"
BYTES = 400_000  # of a notebook with its pictures


def executed(path: Path, instead: Mapping[str, str] = MappingProxyType({})) -> nbformat.NotebookNode:
    """The notebook with new outputs, each text of its code replaced by what is there `instead`.
    nbclient.exceptions.CellExecutionError for a cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    for text, other in instead.items():
        [cell] = [cell for cell in notebook.cells if text in cell.source]
        cell.source = cell.source.replace(text, other)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=600, kernel_name=KERNEL, resources={"metadata": {"path": folder}})
        client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})  # threads that share a core wait for each other
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the time of day
    return notebook


def main(names: list[str]) -> None:
    paths = [EXAMPLES / f"{name}.ipynb" for name in names] or sorted(EXAMPLES.glob("*.ipynb"))
    for path in paths:
        nbformat.write(executed(path), path)
        size = path.stat().st_size
        print(f"{path.name}: {size / 1000:.0f} kB")
        if size > BYTES:
            sys.exit(f"{path.name} has {size} bytes, more than {BYTES}: show fewer or smaller pictures")


if __name__ == "__main__":
    main(sys.argv[1:])
