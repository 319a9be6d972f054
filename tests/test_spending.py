"""Selections and scouts in runs: what is replayed, what it costs, and that nothing else changes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from run_config import rows, run

from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.objectives.objective import finished
from mmalign.runs import checkpoint
from mmalign.seeds import gaussian, seed_of
from mmalign.selection.scouts import chosen
from mmalign.training import selecting, values
from mmalign.training.rollout import judged, sample_and_score
from mmalign.training.setup import open_session

SMOOTH = {"smooth:Smooth.red": 1.0}
SDE = {"plan": "sde", "credit": "terminal", "seeds": 5}
RFT = {"plan": "ode", "objective": {"type": "rft", "draws": 3}, "seeds": 5}
BETA = {"type": "grpo", "beta": 0.1}
SCOUTS = {"ratio": 3, "steps": 2}


@pytest.fixture
def base(settings):
    return settings | {"held_out": None, "rewards": SMOOTH, "iterations": 2, "eval_every": 0}


def opened(base, **changed):
    return open_session(configs.build(base | changed, "test"))


def rolled(session):
    rollout = sample_and_score(session, session.prompts(0), 0)
    return rollout, judged(session, rollout, 0)


def adapter(out):
    return checkpoint.read(checkpoint.latest(out / "checkpoints"))[0]["adapter"]


# selection


@pytest.mark.parametrize("compare", ["group", "selected"])
def test_the_gradient_is_that_of_the_selected_trajectories(base, compare):
    """Against the same sum written out: rows of the selected with advantages by hand, the others gone."""
    session = opened(base, **SDE, select={"type": "extremes", "keep": 2, "compare": compare})
    c, (rollout, judgement) = session.config, rolled(session)
    selected = selecting.choose(c, rollout.tree, judgement)
    advantage = selecting.advantages(c, rollout.tree, judgement, selected)
    reward = judgement.reward[:, -1].view(2, 5)
    for p, row in enumerate(reward):
        rows_here = slice(5 * p, 5 * p + 5)
        assert selected[rows_here].nonzero()[:, 0].tolist() == sorted([int(row.argmin()), int(row.argmax())])
        of = row if compare == "group" else row[selected[rows_here]]
        expected = torch.where(selected[rows_here], (row - of.mean()) / of.std(correction=0), 0.0)
        assert torch.allclose(advantage[rows_here, 0, 0, 0], expected, atol=1e-4)
    batch = c.objective.batch(session, *selecting.part(rollout, judgement, advantage, selected), 0)
    whole = c.objective.batch(session, rollout, judgement, advantage, 0)
    worth = selected.repeat_interleave(3)
    assert len(batch.rows) == 2 * 2 * 3
    for name, column in vars(batch.rows).items():
        if name == "node":
            assert len(column.unique()) == len(column)
            continue
        other = vars(whole.rows)[name]
        assert (column is other is None) or torch.equal(column, other[worth]), name


def test_finished_images_are_the_selected_ones(base):
    session = opened(base, **RFT, select={"type": "extremes", "keep": 3})
    c, (rollout, judgement) = session.config, rolled(session)
    selected = selecting.choose(c, rollout.tree, judgement)
    fewer, verdict, advantage = selecting.part(rollout, judgement, None, selected)
    images, whole = finished(fewer.paths, verdict), finished(rollout.paths, judgement)
    assert advantage is None
    assert torch.equal(images.x, whole.x[selected])
    assert torch.equal(images.reward, whole.reward[selected])
    assert images.prompt.tolist() == [0, 0, 0, 1, 1, 1]


def test_images_without_a_score_are_never_selected(base):
    session = opened(base, **SDE, select={"type": "extremes", "keep": 3})
    rollout, judgement = rolled(session)
    reward = judgement.reward.clone()
    reward[[0, 1, 2], -1] = torch.nan  # two of the first prompt are left
    reward[5:, -1] = torch.nan  # none of the second
    selected = selecting.choose(session.config, rollout.tree, replace(judgement, reward=reward))
    assert selected.nonzero()[:, 0].tolist() == [3, 4]


def test_an_iteration_without_any_score_learns_nothing(base):
    out = run(
        base, **SDE, select={"type": "extremes", "keep": 3}, scorers={"smooth:Smooth": {"limit": -1.0}}, max_failed=1.0
    )
    row = rows(out / "metrics.jsonl")[0]
    assert (row["selected"], row["transitions"], row["replay_forwards"]) == (0, 0, 0)


def test_a_selection_of_all_changes_nothing(base, tmp_path):
    """A budget may thin a plan to fewer images than `keep`; here a rule that leaves none out."""
    plain = run(base, **SDE)
    session = opened(base, **SDE)
    rollout, judgement = rolled(session)
    everything = selecting.choose(session.config, rollout.tree, judgement)
    assert bool(everything.all())
    assert selecting.part(rollout, judgement, None, everything)[0] is rollout
    other = run(base, **SDE, select={"type": "extremes", "keep": 4}, out=str(tmp_path / "other"))
    assert any(not torch.equal(value, adapter(other)[name]) for name, value in adapter(plain).items())


# scouts


def test_chosen_starts_are_sampled_again_exactly(base):
    """Each regenerated trajectory is the one of its member number in a run with so many seeds and no scouts."""
    scouting, plain = opened(base, **SDE | {"seeds": 2}, scouts=SCOUTS), opened(base, **SDE | {"seeds": 6})
    (some, verdict), (every, _) = rolled(scouting), rolled(plain)
    for p, members in enumerate(some.scouts.members.tolist()):
        for row, member in enumerate(members):
            assert torch.allclose(some.paths.x[2 * p + row], every.paths.x[6 * p + member], atol=1e-5)
            assert torch.equal(some.paths.x[2 * p + row, 0], every.paths.x[6 * p + member, 0])
    quick = opened(base, plan="ode", steps=2, seeds=6, objective={"type": "rft"})
    reward = rolled(quick)[1].reward[:, -1].view(2, 6)
    assert some.scouts.members.tolist() == [sorted([int(r.argmin()), int(r.argmax())]) for r in reward]
    assert torch.allclose(some.scouts.reward.view(2, 2), reward.gather(1, some.scouts.members), atol=1e-6)
    assert verdict.reward.shape[0] == 4


def test_scouts_of_the_runs_steps_without_noise_predict_exactly(base):
    out = run(base, **RFT, scouts={"ratio": 2, "steps": 4})
    assert rows(out / "metrics.jsonl")[0]["scouts/correlation"] == pytest.approx(1.0, abs=1e-6)


def test_parts_of_a_rollout_change_nothing(base, tmp_path):
    one = run(base, **SDE, scouts=SCOUTS, batch=1, decode_batch=1)
    two = run(base, **SDE, scouts=SCOUTS, batch=1, decode_batch=1, rollout_parts=2, out=str(tmp_path / "parts"))
    assert all(torch.equal(value, adapter(two)[name]) for name, value in adapter(one).items())


def test_scouts_that_fail_are_counted(base):
    out = run(base, **SDE, scouts=SCOUTS, scorers={"smooth:Smooth": {"limit": -1.0}}, max_failed=1.0)
    assert rows(out / "metrics.jsonl")[0]["scouts/failed"] == 2 * 3 * 5


VALUED = SDE | {"credit": {"type": "value", "warmup": 1, "width": 8}}


def test_a_value_head_chooses_starts_by_what_it_sees_after_some_steps(base, tmp_path):
    """Against the states and features written out, with the head of another run."""
    folder = run(base, **VALUED, out=str(tmp_path / "valued"))
    head = values.read(folder)
    session = opened(base, **RFT | {"seeds": 2, "decode_batch": 1}, scouts=SCOUTS | {"by": str(folder)})
    policy, (one, two), counts = session.policy, session.times[:2], session.policy.counts
    rollout = sample_and_score(session, session.prompts(1), 1)
    assert (counts["forwards"], counts["decodes"]) == (2 * 6 * 2 + 2 * 2 * 4, 2 * 2)
    for p, prompt in enumerate(session.prompts(1)):
        seeds = [seed_of(session.config.seed, "rollout", 1, prompt.id, member) for member in range(6)]
        x = torch.stack([gaussian(policy.latent_shape, seed) for seed in seeds])
        cond, index = policy.encode([prompt.text]), torch.zeros(6, dtype=torch.long)
        x = x + (two - one) * policy.velocity(x, one.expand(6), cond, index)
        with head.observed(policy) as features:
            policy.velocity(x, two.expand(6), cond, index)
            value = head.value(features(6).cpu(), two.expand(6))
        assert value.std() > 0
        expected = chosen(value, 1, 2)[0]
        assert rollout.scouts.members[p].tolist() == expected.tolist()
        assert torch.allclose(rollout.scouts.reward.view(2, 2)[p], value[expected], atol=1e-5)


def test_a_head_that_is_not_to_be_trusted_yet_chooses_nothing(base, tmp_path):
    plain = run(base, **VALUED | {"credit": ["terminal", VALUED["credit"] | {"warmup": 9}]})
    other = VALUED | {"credit": ["terminal", VALUED["credit"] | {"warmup": 9}], "scouts": SCOUTS | {"by": "value"}}
    scouted = run(base, **other, out=str(tmp_path / "scouted"))
    assert all(torch.equal(value, adapter(scouted)[name]) for name, value in adapter(plain).items())
    first = rows(scouted / "metrics.jsonl")[0]
    assert first["scouts/failed"] == 0
    assert first["scouts/correlation"] != first["scouts/correlation"]


# counts

COUNTED = {
    "select": SDE | {"objective": BETA, "select": {"type": "extremes", "keep": 3}},
    "select, branches": {
        "objective": BETA, "select": {"type": "extremes", "keep": 3}, "credit": {"type": "branch", "baseline": "prompt"}
    },
    "select, window": SDE
    | {"objective": BETA, "plan": {"type": "window", "steps": [1, 3], "children": 2}, "select": "extremes"},
    "scouts": SDE | {"objective": BETA, "scouts": SCOUTS, "guidance": 2.0},
    "scouts by value": VALUED | {"objective": BETA, "scouts": SCOUTS | {"by": "value"}, "guidance": 2.0},
    "both": SDE | {"objective": BETA, "scouts": SCOUTS, "select": {"type": "extremes", "keep": 2}, "draw": "pass_rate"},
    "noised again": {
        "plan": "ode", "objective": "nft", "seeds": 5, "scouts": SCOUTS, "select": {"type": "extremes", "keep": 3}
    },
    "finished images": RFT | {"scouts": SCOUTS, "select": {"type": "extremes", "keep": 3}},
    "budget": SDE | {"objective": BETA, "scouts": SCOUTS, "plan": {"type": "branch", "steps": [0, 1], "children": 2},
                     "max_forwards": 240},
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_the_estimate_counts_what_the_run_takes(base, name):
    c = base | COUNTED[name]
    figures, metrics = estimate.estimate(configs.build(c, "test")), rows(run(c) / "metrics.jsonl")
    shared = any("share a forward" in note for note in figures["bounds"])
    assert shared == (name in ("select, branches", "select, window"))
    for count in estimate.COUNTS:
        if shared and count == "replay_forwards":
            assert all(row[count] <= figures["iteration"][count] for row in metrics)
        else:
            assert [row[count] for row in metrics] == [figures["iteration"][count]] * 2, count


def test_the_closed_forms(base):
    """P = 2, S = 5, T = 4, three stochastic steps; 3 x 5 scouts of 2 steps; 3 of 5 images learnt from."""
    count = partial(lambda **c: estimate.estimate(configs.build(base | SDE | c, "test"))["iteration"])
    plain, select = count(), count(select={"type": "extremes", "keep": 3})
    assert (plain["forwards"], plain["replay_forwards"], plain["decodes"]) == (2 * 5 * 4, 2 * 5 * 3, 2 * 5)
    assert (select["forwards"], select["replay_forwards"], select["decodes"]) == (2 * 5 * 4, 2 * 3 * 3, 2 * 5)
    valued = count(**VALUED, scouts=SCOUTS | {"by": "value"})
    assert (valued["forwards"], valued["decodes"], valued["rewards"]) == (2 * 5 * 4 + 2 * 15 * 2, 2 * 5, 2 * 5)
    scouts = count(scouts=SCOUTS)
    assert (scouts["forwards"], scouts["decodes"]) == (2 * 5 * 4 + 2 * 15 * 2, 2 * 5 + 2 * 15)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (SDE | {"select": {"type": "extremes", "keep": 5}}, "keep: 5 of seeds x routes = 5 images leaves none out"),
        (SDE | {"select": {"type": "extremes", "keep": 1}}, "keep"),
        (SDE | {"select": {"type": "extremes", "keep": 3, "compare": "both"}}, "compare"),
        (SDE | {"select": "extreme"}, "did you mean 'extremes'"),
        ({"seeds": 1, "scouts": {}}, "got seeds: 1"),
        (SDE | {"scouts": {"ratio": 1}}, "ratio"),
        (SDE | {"scouts": SCOUTS | {"by": "value"}}, "by: value needs credit: value"),
        (VALUED | {"scouts": {"steps": 5, "by": "value"}}, "sees the run's 4 steps at most"),
        (SDE | {"scouts": {"ratio": 1000, "steps": 1000}, "seeds": 9000}, "states in memory"),
        ({"records": "judged.jsonl", "objective": "rft", "select": "extremes"}, "does not act with"),
    ],
)
def test_what_cannot_act_is_refused(base, changed, says):
    with pytest.raises(BadInput, match=says):
        configs.build(base | changed, "test")
