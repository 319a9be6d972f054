"""Imports, help and refusals are quick: they import none of the libraries that the work needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_config import run

import reward_models
from mmalign.runs import machine

ROOT = Path(__file__).parents[1]
HEAVY = {  # what the project requires, without typer, rich and what these need
    "PIL", "accelerate", "diffusers", "jaxtyping", "jinja2", "matplotlib", "numpy", "open_clip", "peft", "pydantic",
    "safetensors", "scipy", "torch", "torchvision", "transformers", "yaml",
}  # fmt: skip
COMMAND = "import sys; from mmalign.cli import main; sys.argv = ['mmalign', *{arguments}]; main()"


def imported(code: str) -> set[str]:
    """The heavy libraries among the modules of a new process after `code`, which may end it."""
    ending = "import sys, json\ntry:\n    exec(sys.argv[1])\nexcept SystemExit:\n    pass\n"
    ending += "print('\\n' + json.dumps([*sys.modules]))"
    command = [sys.executable, "-c", ending, code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return HEAVY & {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


@pytest.mark.parametrize("package", ["mmalign", "reward_models"])
def test_a_package_is_imported_quickly(package):
    assert imported(f"import {package}") == set()


def test_the_list_of_commands_is_shown_quickly():
    assert imported(COMMAND.format(arguments=["--help"])) == set()


@pytest.mark.parametrize("arguments", [["train", "--help"], ["train", "quikstart"], ["score", "--batch", "x"]])
def test_a_command_imports_what_it_needs_when_it_begins(arguments):
    assert imported(COMMAND.format(arguments=arguments)) <= {"pydantic"}  # which typer itself imports


PARTLY = {  # what begins its work -> what it does not need for it
    "estimate": (["estimate", "configs/quickstart.yaml"], {"matplotlib", "open_clip"}),
    "score": (
        ["score", "assets/pictures", "--rewards", "shapes", "--out", "{folder}/scores.jsonl"],
        {"accelerate", "diffusers", "matplotlib", "open_clip", "peft", "transformers"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTLY)
def test_a_command_imports_only_what_its_work_needs(name, tmp_path):
    arguments, unneeded = PARTLY[name]
    libraries = imported(COMMAND.format(arguments=[part.format(folder=tmp_path) for part in arguments]))
    assert "torch" in libraries
    assert not libraries & unneeded


def test_a_run_and_the_functions_of_python_import_no_library_of_models():
    unneeded = {"diffusers", "matplotlib", "open_clip", "peft", "transformers"}
    assert not imported("from mmalign import api, run") & unneeded


BEFORE_TORCH = """
import os, sys
from importlib.abc import MetaPathFinder
class Finder(MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            print("OMP_WAIT_POLICY is", os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()
sys.meta_path.insert(0, Finder())
from mmalign.cli import main
sys.argv = ["mmalign", "estimate", "configs/quickstart.yaml"]
main()
"""


@pytest.mark.parametrize(("given", "read"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given, read):
    """OpenMP reads the variable once, when torch is loaded."""
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", BEFORE_TORCH]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean | given)
    assert result.stdout == f"OMP_WAIT_POLICY is {read}\n"


@pytest.mark.parametrize(("load", "threads", "warned"), [(9.04, 2, True), (9.04, 1, False), (4.0, 2, False)])
def test_a_busy_machine_is_reported(monkeypatch, load, threads, warned):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    line = machine.busy(threads)
    assert (line is not None) == warned
    if warned:
        assert "9.0 on 4 cores" in line
        assert "OMP_NUM_THREADS=1" in line


def test_a_run_begins_with_that_line(settings, monkeypatch, capsys):
    monkeypatch.setattr(machine, "busy", lambda threads: f"{threads} threads wait")
    run(settings, iterations=1, held_out=None)
    assert f"mmalign: {torch.get_num_threads()} threads wait\n" in capsys.readouterr().err


def test_the_probe_sees_a_heavy_import():
    assert "numpy" in imported("import numpy")


def test_public_names_are_there():
    for name in reward_models.__all__:
        assert getattr(reward_models, name).__name__ == name
    with pytest.raises(AttributeError, match="'reward_models' has no attribute 'nothing'"):
        _ = reward_models.nothing
