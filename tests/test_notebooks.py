"""The notebooks run from top to bottom, and the outputs that are stored in them are theirs and name no machine."""

import re
from pathlib import Path

import nbformat
import notebooks
import pytest

SHORTER = {"quickstart": {"iterations=30, eval_every=15": "iterations=4, eval_every=2"}}
NAMES = sorted(notebooks.EXAMPLES.glob("*.ipynb"))


def texts(notebook):
    """All that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NAMES, ids=lambda path: path.stem)
def test_it_runs_and_shows_as_many_pictures_as_are_stored(path):
    stored, run = nbformat.read(path, as_version=4), notebooks.executed(path, SHORTER.get(path.stem, {}))
    assert pictures(run) == pictures(stored) > 2
    assert not [output for cell in run.cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NAMES, ids=lambda path: path.stem)
def test_what_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size <= notebooks.BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for text in texts(notebook):
        assert not re.search(r"/(work|root|home|tmp|usr)/|site-packages", text), text


def test_both_are_there():
    assert [path.stem for path in NAMES] == ["quickstart", "score_and_refine"]
    assert Path(notebooks.EXAMPLES, "reward_function.py").is_file()
