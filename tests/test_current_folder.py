"""Starting the program in a stranger's folder imports nothing that lies there and says nothing of its own accord."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_scorers
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
NAMES = ("yaml", "torch", "typer", "rich", "numpy", "json", "PIL", "pydantic", "diffusers", "sitecustomize_", "logging")


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A folder of modules, half of them packages, that leave a mark beside them when they are imported."""
    folder = tmp_path / "here"
    for number, name in enumerate(NAMES):
        path = folder / (f"{name}.py" if number % 2 else f"{name}/__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    return folder


def run(folder: Path, *command, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


STARTS = {
    "python -m": (sys.executable, "-m", "mmalign"),
    "console script": (str(SCRIPTS / "mmalign"),),
    "torchrun": (str(SCRIPTS / "torchrun"), "--nproc_per_node", "1", "-m", "mmalign"),
}
ELSE = [start for start in STARTS if start != "console script"]


@pytest.mark.parametrize("start", ["console script", *(pytest.param(s, marks=pytest.mark.slow) for s in ELSE)])
def test_nothing_is_imported_from_the_current_folder(hostile, start):
    (hostile / "config.yaml").write_text("model: none\nplan: none\n")
    result = run(hostile, *STARTS[start], "train", "config.yaml")
    assert "mmalign: config.yaml: " in result.stderr
    assert result.returncode == (1 if start == "torchrun" else 2)
    assert not (hostile.parent / "ran").exists()


@pytest.mark.slow
def test_accelerate_imports_nothing_from_the_current_folder(hostile):
    (hostile / "config.yaml").write_text("model: none\nplan: none\n")
    result = run(hostile, str(SCRIPTS / "accelerate"), "launch", "--cpu", "-m", "mmalign", "train", "config.yaml")
    assert "mmalign: config.yaml: " in result.stderr
    assert not (hostile.parent / "ran").exists()


def test_a_folder_that_the_user_named_stays(hostile):
    """What stands on PYTHONPATH is wanted, even if it is the current folder."""
    (hostile / "mine.py").write_text(
        "class Scorer:\n    def __init__(self):\n        raise ValueError('mine was made')\n"
    )
    for name in NAMES:
        (hostile / f"{name}.py").unlink(missing_ok=True)
        (hostile / name / "__init__.py").unlink(missing_ok=True)
    command = (sys.executable, "-m", "mmalign", "score", ".", "--rewards", "mine:Scorer", "--allow", "mine")
    (hostile / "a.png").touch()
    assert "no module named 'mine'" in run(hostile, *command).stderr
    assert "mine was made" in run(hostile, *command, PYTHONPATH=os.pathsep.join((str(hostile), str(ROOT)))).stderr


def test_what_the_program_starts_does_not_look_there_either(hostile):
    """Compilers and loaders are Python processes too."""
    code = "import sys; sys.path.pop(0); sys.argv = ['mmalign', '--help']\nfrom mmalign.cli import app as cli\n"
    code += "try:\n    cli.main()\nexcept SystemExit:\n    import subprocess\n"
    code += "    subprocess.run([sys.executable, '-m', 'rich'])\n"
    run(hostile, sys.executable, "-c", code)
    assert not (hostile.parent / "ran").exists()


@pytest.mark.parametrize("start", ["console script"])
def test_sampling_says_nothing_that_the_user_did_not_cause(random_model, tmp_path, start):
    command = (*STARTS[start], "sample", "a circle", "--model", random_model, "--steps", "2", "--out", str(tmp_path))
    result = run(tmp_path, *command)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize("scorer", ["pickscore", pytest.param("vqa", marks=pytest.mark.slow)])
def test_scoring_says_nothing_of_its_models(tmp_path, scorer):
    folder = tmp_path / "model"
    folder.mkdir()
    given = [f"--set={scorer}.{key}={value}" for key, value in tiny_scorers.settings(scorer, folder).items()]
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures/a.png")
    command = (*STARTS["console script"], "score", "pictures", "--rewards", scorer, *given, "--prompt", "x")
    result = run(tmp_path, *command)
    assert result.returncode == 0, result.stderr
    assert [
        line for line in result.stderr.replace("\r", "\n").splitlines() if "scoring" not in line and line.strip()
    ] == []
