"""Extensions in runs: what is drawn, what it costs, what is learnt from, and resumption to the bit."""

from dataclasses import replace

import pytest
import torch
from ranks_in_processes import launch, learn
from run_config import cut_off, rows, run

from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.distributed.gather import gather
from mmalign.runs import checkpoint
from mmalign.training import extending, selecting
from mmalign.training.rollout import judged, sample_and_score
from mmalign.training.setup import open_session

SMOOTH = {"smooth:Smooth.red": 1.0}
SALVAGE = {"plan": "sde", "credit": "gain", "seeds": 4, "extend": {"type": "salvage", "drop": 0.0, "per_group": 2}}
FRONTIER = {
    "plan": {"type": "window", "steps": [0, 2], "children": 2}, "seeds": 1, "credit": "branch",
    "extend": {"type": "frontier", "leaves": 6, "expand": 1, "children": 3},
}  # fmt: skip
REVISE = {
    "plan": "sde", "credit": "terminal", "seeds": 3, "extend": {"type": "revise", "good": 1.1},
    "rewards": {"shapes_critic.overall": 1.0},
}  # fmt: skip
ALL = {"salvage": SALVAGE, "frontier": FRONTIER, "revise": REVISE}


@pytest.fixture
def base(settings):
    return settings | {"held_out": None, "rewards": SMOOTH, "iterations": 2, "eval_every": 0}


def extended(base, **changed):
    session = open_session(configs.build(base | changed, "test"))
    rollout = sample_and_score(session, session.prompts(0), 0, whole=True)
    judgement = judged(session, rollout, 0)
    return session, rollout, judgement, extending.extend(session, rollout, judgement, 0)


@pytest.mark.parametrize("name", ALL)
def test_the_cost_of_a_run_is_within_its_estimate(base, name):
    settings = base | ALL[name] | {"objective": {"type": "grpo", "beta": 0.1}}
    figures = estimate.estimate(configs.build(settings, "test"))
    plain = estimate.estimate(configs.build(settings | {"extend": None}, "test"))
    assert any("extend" in note for note in figures["bounds"])
    metrics = rows(run(settings) / "metrics.jsonl")
    assert sum(row["extend/drawn"] for row in metrics) > 0 or name == "revise"
    for row in metrics:
        for count in estimate.COUNTS:
            assert row[count] <= figures["iteration"][count], count
        assert row["decodes"] >= plain["iteration"]["decodes"] + row["extend/drawn"]
        assert row["rewards"] == row["decodes"]


@pytest.mark.parametrize("name", ["salvage", "frontier"])
def test_resumed_it_is_the_uninterrupted_run_to_the_bit(base, tmp_path, name):
    settings = base | ALL[name] | {"checkpoint_every": 1}
    whole = run(settings)
    settings |= {"out": str(tmp_path / "again")}
    with cut_off(1):
        run(settings)
    again = run(settings, resume=True)
    one, other = (checkpoint.read(checkpoint.latest(out / "checkpoints"))[0]["adapter"] for out in (whole, again))
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_what_is_kept_joins_its_group_and_the_rest_is_as_it_was(base):
    session, before, verdict, (rollout, judgement, counts) = extended(base, **SALVAGE)
    assert 0 < counts["kept"] <= counts["drawn"] <= 4
    tree, old = rollout.tree, len(verdict.reward)
    assert len(tree.prompt) == old + counts["kept"]
    assert tree.prompt.tolist() == sorted(tree.prompt.tolist())
    assert len(judgement.reward) == len(tree.prompt)
    new = tree.final[:, -1] >= len(before.tree.owner)
    assert int(new.sum()) == counts["kept"]
    for name, column in vars(before.tree).items():
        if name != "owner":
            assert torch.equal(getattr(tree, name)[~new], column), name
    assert torch.equal(rollout.paths.x[~new], before.paths.x)
    assert torch.equal(judgement.reward[~new].nan_to_num(), verdict.reward.nan_to_num())
    images = session.policy.decode(rollout.paths.x[new, -1])
    assert torch.allclose(images, rollout.images[tree.final[new, -1]], atol=1e-5)
    for row in new.nonzero()[:, 0].tolist():  # it shares its beginning with one trajectory of its prompt, and is better
        shared = (tree.node[:, :4] == tree.node[row, :4]).sum(1) * (~new) * (tree.prompt == tree.prompt[row])
        parent = int(shared.argmax())
        assert shared[parent] > 0
        assert judgement.reward[row, -1] > judgement.reward[parent, -1]
        counts["rise"] -= float(judgement.reward[row, -1] - judgement.reward[parent, -1])
    assert 0 < counts["kept"] <= counts["drawn"]
    assert counts["rise"] == pytest.approx(0, abs=1e-6)  # the sum of all rises


def test_a_scorer_of_finished_images_is_shown_one_image_of_what_is_drawn(base):
    """Whether it is kept or not, and none of the completions of its states; so it is counted, and estimated."""
    even = {"smooth:Positive.even": {"weight": 0.01, "density": "end"}}
    extend = SALVAGE["extend"] | {"gain": 9.0}
    late = base | SALVAGE | {"rewards": SMOOTH | even, "credit": ["gain", "terminal"], "extend": extend}
    [row] = rows(run(late, iterations=1) / "metrics.jsonl")
    assert row["extend/drawn"] > row["extend/kept"] == 0
    assert row["rewards"] == row["decodes"] + 2 * 4 + row["extend/drawn"]
    figures, without = (estimate.estimate(configs.build(each, "test")) for each in (late, late | {"extend": None}))
    more, images = (figures["iteration"][name] - without["iteration"][name] for name in ("rewards", "decodes"))
    assert more == images + 2 * 2
    _, before, _, (rollout, _, counts) = extended(late)
    new = rollout.scored.parts["smooth:Positive.even"][len(before.tree.owner) :]
    assert int((~new.isnan()).sum()) == counts["drawn"] < len(new)


def test_advantages_are_measured_with_what_was_kept(base):
    session, *_, (rollout, judgement, _) = extended(base, **SALVAGE | {"credit": {"type": "gain", "control": 0.0}})
    c = session.config
    selected = selecting.choose(c, rollout.tree, judgement)
    advantage = selecting.advantages(c, rollout.tree, judgement, selected)[:, 0, 0, 0]
    for p in (0, 1):
        value = judgement.reward[rollout.tree.prompt == p, 1]  # of the state after step 0
        expected = (value - value.mean()) / value.std(correction=0)
        assert torch.allclose(advantage[rollout.tree.prompt == p], expected, atol=1e-3)
    batch = c.objective.batch(session, rollout, judgement, advantage[:, None, None, None].expand(-1, 4, 1, 1), 0)
    nodes = {(k, int(n)) for r, k in (rollout.tree.std > 0).nonzero().tolist() for n in [rollout.tree.node[r, k + 1]]}
    assert len(batch.rows) == len(nodes) < int((rollout.tree.std > 0).sum())


def test_a_frontier_spends_its_images_and_none_more(base):
    *_, (rollout, _, counts) = extended(base, **FRONTIER)
    assert rollout.tree.prompt.bincount().tolist() == [6, 6]
    assert counts == {"drawn": 8, "kept": 8, "rise": counts["rise"]}
    assert len(rollout.images) == 12
    assert len(rollout.images.flatten(1).unique(dim=0)) == 12


def test_gathered_it_is_the_batch_itself(base):
    """Trajectories are sorted by prompt, as the update and the credit of all ranks need them."""
    session, *_, (rollout, judgement, _) = extended(base, **FRONTIER)
    tree, gathered = gather(session.ranks, rollout.tree, judgement)
    assert torch.equal(tree.node, rollout.tree.node)
    assert torch.equal(gathered.reward.nan_to_num(), judgement.reward.nan_to_num())


def test_a_revision_is_judged_and_learnt_from_as_an_image_of_the_prompt(base):
    """A critic that asks for the prompt itself gives ratio 1; one that asks for something else another."""
    session, before, verdict, _ = extended(base, **REVISE)
    texts = [session.prompts(0)[int(p)].text for p in before.tree.prompt]
    for text, same in ((texts, True), (["a very different thing"] * len(texts), False)):
        scored = replace(before.scored, requests={"shapes_critic": tuple(text)})
        lower = replace(verdict, reward=verdict.reward - 2)  # so that the revision is above them all
        low = replace(before, scored=replace(scored, parts={k: v - 2 for k, v in scored.parts.items()}))
        rollout, judgement, counts = extending.extend(session, low, lower, 0)
        assert counts["drawn"] == counts["kept"] == 2
        off = rollout.paths.off
        assert off.tolist() == [False] * 3 + [True] + [False] * 3 + [True]
        assert rollout.tree.prompt.tolist() == [0] * 4 + [1] * 4
        assert rollout.tree.owner[rollout.tree.final[off, -1]].tolist() == [0, 1]
        advantage = torch.ones(8, rollout.tree.steps, 1, 1)
        batch = session.config.objective.batch(session, rollout, judgement, advantage, 0)
        ratio = batch.replay(batch.rows)[1]["ratio"]
        assert torch.allclose(ratio[~batch.rows.off], torch.ones(()), atol=1e-5)
        assert torch.allclose(ratio[batch.rows.off], torch.ones(()), atol=1e-5) == same


@pytest.mark.slow
def test_two_processes_extend_as_one(base, tmp_path):
    settings = base | dict(prompts_per_iteration=3, batch=1, decode_batch=1, micro_batch=1)
    jobs = {name: settings | ALL[name] for name in ("salvage", "frontier")}
    both, *_ = launch(tmp_path, 2, jobs, {})
    for name, job in jobs.items():
        alone = learn(job)
        assert set(alone) == set(both[name])
        assert alone["row/0/extend/drawn"] > 0
        for key, value in alone.items():
            assert torch.allclose(both[name][key], value, rtol=1e-4, atol=1e-4, equal_nan=True), (name, key)
