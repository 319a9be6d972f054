"""What the README promises, by running it. Minutes long."""

import subprocess
from pathlib import Path

import pytest

from mmalign import run
from mmalign.config import load as configs
from mmalign.reporting import report
from mmalign.training import setup

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "score", "least"), [("quickstart", "shapes", 0.12), ("tiny_things", "things", 0.08)])
def test_quickstart_raises_the_held_out_score(name, score, least, seed, tmp_path):
    config = configs.load(ROOT / f"configs/{name}.yaml", [f"seed={seed}", f"out={tmp_path / 'run'}"])
    strict = report.summary(run.train(config))["rises"][f"{score}.strict"]
    assert strict["rise"] > least
    assert strict["p"] < 0.01


@pytest.mark.parametrize(("word", "config"), [("shapes", "quickstart"), ("", "quickstart"), ("things", "tiny_things")])
def test_the_script_trains_on_the_world_that_it_is_given(word, config, tmp_path):
    """In a copy of the scripts whose environment has an `mmalign` that prints its arguments."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/quickstart.sh").write_text((ROOT / "scripts/quickstart.sh").read_text())
    (tmp_path / "scripts/setup.sh").write_text("cd " + str(tmp_path))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/mmalign").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / ".venv/bin/mmalign").chmod(0o755)
    command = ["bash", tmp_path / "scripts/quickstart.sh", *word.split(), "seed=3"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert printed[:2] == ["train", f"configs/{config}.yaml"]
    assert printed[2].startswith(f"out=runs/{config}-")
    assert printed[3:] == ["seed=3"]


def test_the_script_refuses_another_world_before_it_installs_anything():
    result = subprocess.run(["bash", ROOT / "scripts/quickstart.sh", "letters"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "quickstart: 'letters' is neither shapes, things nor key=value\n"


@pytest.mark.parametrize("name", ["quickstart", "tiny_long", "tiny_things"])
def test_configs_of_the_embedded_model_open(name):
    session = setup.open_session(configs.load(ROOT / f"configs/{name}.yaml"))
    assert len(session.held_out) >= 300
    assert {name.rpartition(".")[0] for name in session.config.rewards} <= set(session.rewards.scorers)
