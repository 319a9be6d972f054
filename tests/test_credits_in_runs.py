"""Credits in runs: what they cost, what they leave unchanged, and that an interruption changes nothing."""

import shutil

import pytest
import torch
from run_config import rows, run

from mmalign.checks import doctor, estimate
from mmalign.config import load as configs
from mmalign.credit.more.density import of_ends, of_states
from mmalign.runs import checkpoint
from mmalign.training.rollout import judged, sample_and_score
from mmalign.training.setup import open_session

BETA = {"type": "grpo", "beta": 0.1}
SDE = {"plan": "sde", "seeds": 3, "objective": BETA}
RAMP = {"start": 0.0, "end": 1.0}
SUM = [{"type": "gain", "completion": 2}, {"type": "terminal", "weight": RAMP}]
DENSITY = {"smooth:Smooth.red": 1.0, "smooth:Positive.even": {"weight": 0.5, "density": "end"}}
COUNTED = {
    "sum": SDE | {"credit": SUM},
    "sum, budget": SDE | {"credit": SUM, "max_forwards": 110},
    "density": SDE | {"credit": SUM, "rewards": DENSITY},
    "density, branches, scouts": {
        "objective": BETA, "seeds": 2, "credit": ["gain", {"type": "branch", "weight": 0.5}], "rewards": DENSITY,
        "scouts": {"ratio": 2, "steps": 2},
    },
    "renorm": SDE | {"credit": {"type": "renorm", "low": -1.0}},
    "prl": SDE | {"credit": "prl"},
    "prl, branches, guided": {"objective": BETA, "credit": ["prl", "branch"], "guidance": 2.0},
    "to go, damped": SDE
    | {"credit": [{"type": "gain", "returns": "to_go"}, {"type": "gain", "saturate": 0.1, "damping": 0.5}]},
    "prof": SDE | {"credit": "gain", "seeds": 4, "select": {"type": "prof", "keep": 2}},
}  # fmt: skip


@pytest.fixture
def base(settings):
    return settings | {"held_out": None, "rewards": {"smooth:Smooth.red": 1.0}, "iterations": 2, "eval_every": 0}


def adapter(out):
    return checkpoint.read(checkpoint.latest(out / "checkpoints"))[0]["adapter"]


def same(one, two):
    return all(torch.equal(value, adapter(two)[name]) for name, value in adapter(one).items())


@pytest.mark.parametrize("name", COUNTED)
def test_the_estimate_counts_what_the_run_takes(base, name):
    c = base | COUNTED[name]
    figures, metrics = estimate.estimate(configs.build(c, "test")), rows(run(c) / "metrics.jsonl")
    for count in estimate.COUNTS:
        assert [row[count] for row in metrics] == [figures["iteration"][count]] * 2, count


def test_a_list_of_one_and_weights_of_nothing_change_nothing(base, tmp_path):
    plain = run(base | SDE | {"credit": "gain"})
    one = run(base | SDE | {"credit": ["gain"]}, out=str(tmp_path / "one"))
    assert same(plain, one)
    nothing = run(base | SDE | {"credit": ["gain", {"type": "terminal", "weight": 0}]}, out=str(tmp_path / "nothing"))
    assert same(plain, nothing)
    both = run(base | SDE | {"credit": ["gain", "terminal"]}, out=str(tmp_path / "both"))
    assert not same(plain, both)


@pytest.mark.parametrize("credit", [SUM, "prl"])
def test_an_interruption_changes_nothing(base, tmp_path, credit):
    c = base | SDE | {"credit": credit, "iterations": 4}
    whole = run(c)
    shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/000004")
    assert same(whole, run(c, resume=True, out=str(tmp_path / "resumed")))


def test_files_and_checkpoints_from_before_lack_what_came_later(base):
    c = configs.build(base | {"plan": "sde", "credit": "gain"}, "test")
    assert [*c.model_dump(mode="json")["credit"]] == ["type", "states", "completion", "compare", "control"]
    assert "returns: to_go" in configs.dump(configs.build(base | {"credit": {"type": "gain", "returns": "to_go"}}, "t"))


def test_a_scorer_of_finished_images_is_shown_no_others(base):
    session = open_session(configs.build(base | SDE | {"credit": SUM, "rewards": DENSITY}, "test"))
    images, scorers = {}, session.rewards.scorers
    for name, scorer in [*scorers.items()]:
        scorers[name] = _Counting(scorer, images, name)
    rollout = sample_and_score(session, session.prompts(0), 0)
    starts, states = 2 * 3, 3  # before and after three stochastic steps; the last is followed by the ODE's step alone
    assert images == {"smooth:Smooth": starts * (1 + states), "smooth:Positive": starts}
    report, tree = judged(session, rollout, 0), rollout.tree
    ends, red = tree.final[:, -1], rollout.scored.parts["smooth:Smooth.red"]
    even = 0.5 * rollout.scored.parts["smooth:Positive.even"]
    assert torch.equal(report.reward[:, 0], red[tree.final[:, 0]])
    assert torch.equal(report.reward[:, -1], red[ends] + even[ends])
    assert torch.equal(of_ends(report).reward[:, -1], even[ends])
    torch.testing.assert_close(of_states(report).reward[:, -1], red[ends])
    assert int(even.isnan().sum()) == starts * states


class _Counting:
    def __init__(self, scorer, images, name):
        self.card, self.names, self.scorer, self.images, self.name = scorer.card, scorer.names, scorer, images, name

    def __call__(self, images, prompts):
        self.images[self.name] = self.images.get(self.name, 0) + len(images)
        return self.scorer(images, prompts)


def test_prl_sees_how_far_the_policy_has_moved(base):
    metrics = rows(run(base | SDE | {"credit": "prl"}) / "metrics.jsonl")
    assert metrics[0]["log_ratio/reference"] == pytest.approx(0, abs=1e-6)  # the adapter is the identity
    assert abs(metrics[1]["log_ratio/reference"]) > 1e-6


@pytest.mark.parametrize("name", ["sum", "prl"])
def test_the_doctor_still_finds_the_run_sound(base, name):
    plain, changed = (
        {check.check: check.good for check in doctor.examine(configs.build(base | settings, "test"))}
        for settings in (SDE | {"credit": "terminal"}, COUNTED[name])
    )
    assert changed == plain
    assert {"ratio", "gradient"} <= changed.keys()
