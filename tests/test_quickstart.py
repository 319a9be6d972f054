"""What the README promises, by running it. Minutes long."""

from pathlib import Path

import pytest

from mmalign import run
from mmalign.config import load as configs
from mmalign.reporting import report
from mmalign.training import setup

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_raises_the_held_out_score(seed, tmp_path):
    config = configs.load(ROOT / "configs/quickstart.yaml", [f"seed={seed}", f"out={tmp_path / 'run'}"])
    strict = report.summary(run.train(config))["rises"]["shapes.strict"]
    assert strict["rise"] > 0.12
    assert strict["p"] < 0.01


@pytest.mark.parametrize("name", ["quickstart", "tiny_long", "tiny_things"])
def test_configs_of_the_embedded_model_open(name):
    session = setup.open_session(configs.load(ROOT / f"configs/{name}.yaml"))
    assert len(session.held_out) >= 300
    assert {name.rpartition(".")[0] for name in session.config.rewards} <= set(session.rewards.scorers)
