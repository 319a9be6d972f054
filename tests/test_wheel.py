"""One wheel: it holds the packages and the files that commands name, nothing else, and works from any folder."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = (  # what a build could take from a fresh checkout
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "assets", "configs", "constraints.txt",
    "docs", "examples", "mmalign", "pyproject.toml", "reward_models", "scripts", "setup.py", "tests",
)  # fmt: skip
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
COMMANDS = """
import json, sys
from mmalign.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mmalign", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{arguments}: exit code {end.code}")
import mmalign, reward_models
names = [name for name in sys.modules if name.partition(".")[0] in ("mmalign", "reward_models")]
files = [getattr(sys.modules[name], "__file__", None) for name in names]
print("\\n" + json.dumps(sorted(filter(None, files))))
"""


def build(kind: str, source: Path, into: Path) -> Path:
    """The `wheel` or `sdist` of a source tree."""
    into.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, kind, into], cwd=source, check=True, capture_output=True)
    (file,) = into.iterdir()
    return file


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("build") / "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel alone; the libraries are those of this environment."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", target, wheel], check=True, env=os.environ | {"PIP_CONFIG_FILE": os.devnull})
    return target


def below(source: Path, folder: str) -> set[str]:
    return {path.relative_to(source).as_posix() for path in (source / folder).rglob("*") if path.is_file()}


def test_the_wheel_holds_the_packages_and_what_commands_name(source, wheel):
    assets, configs = below(source, "assets"), below(source, "configs")
    folders = "tiny_clip", "tiny_things_clip", "shapes_classifier", "things_classifier", "things"
    models = {name for name in assets if name.split("/")[1] in folders}
    figures = {name for name in assets if name.startswith("assets/figures/")}  # of the README
    expected = below(source, "mmalign") | below(source, "reward_models")
    expected |= {f"mmalign/{name}" for name in (assets - models - figures) | configs}
    expected |= {f"reward_models/{name}" for name in models}
    assert {name for name in names(wheel) if ".dist-info/" not in name} == expected
    assert figures
    assert models
    assert 28e6 < wheel.stat().st_size < 36e6


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(source, wheel, tmp_path):
    with tarfile.open(build("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names(build("wheel", unpacked, tmp_path / "again")) == names(wheel)
    assert not (unpacked / "tests").exists()
    assert not (unpacked / "assets/figures").exists()


def run(installed: Path, folder: Path, *commands: list[str]) -> str:
    """What commands print in one process in `folder`, where only the installed packages can be imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MMALIGN")}
    environment |= {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    output, modules = result.stdout.rstrip().rsplit("\n", 1)
    assert [file for file in json.loads(modules) if not Path(file).is_relative_to(installed)] == []
    return output


SHORT = ["iterations=1", "warmup=0", "cooldown=0", "prompts_per_iteration=2", "eval_seeds=1", "eval_steps=1"]


def test_commands_work_with_their_defaults_from_an_empty_folder(installed, tmp_path):
    output = run(
        installed,
        tmp_path,
        ["train", "quickstart", *SHORT, "held_out=null"],
        ["score", "assets/pictures"],
        ["sample", "a red circle", "--adapter", "runs/quickstart"],
        ["refine", "a purple circle and a square"],
        ["collect", "a purple circle and a square"],
    )
    assert "16 images scored now" in " ".join(output.split())
    produced = {"report.html", "scores.jsonl", "00000-0.png"}
    assert produced <= {path.name for path in tmp_path.rglob("*")}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "scores.jsonl", "samples", "refined", "collected"}


@pytest.mark.slow
def test_the_other_commands_do_too(installed, tmp_path):
    run(
        installed,
        tmp_path,
        ["doctor"],
        ["doctor", "--rewards", "clip"],
        ["evaluate"],
        ["calibrate", "tiny_branch", "--rounds", "2"],
        ["estimate", "quickstart"],
        ["estimate", "flux_mixgrpo_hps"],
        ["refine", "--images", "assets/pictures"],
        ["train", "quickstart.yaml", *SHORT],
        ["export", "runs/quickstart"],
        ["report", "runs/quickstart"],
    )
