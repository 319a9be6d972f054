"""Rewards along a direction that the model reads: its draws, its words, its rewards, and the fan of evaluations."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from run_config import cut_off, rows, run

from mmalign import run as runs
from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.credit.groups import Units
from mmalign.credit.terminal import Terminal
from mmalign.errors import BadInput
from mmalign.evaluation import evaluate
from mmalign.reporting import report
from mmalign.rewards.combination import Combination, Directed
from mmalign.rewards.directions import lattice
from mmalign.runs import checkpoint, reader
from mmalign.training import saving
from mmalign.training.rollout import judged, sample_and_score
from mmalign.training.setup import Given, open_session
from reward_models import Card, Prompt, Scores

RED, EVEN = "smooth:Smooth.red", "smooth:Smooth.even"
TWO = {RED: 1.0, EVEN: 0.5}
SDE = {"plan": "sde", "credit": "terminal", "seeds": 3}
PURE = {"type": "directed", "parts": 1, "fan": 1, "suffix": f" {{{RED}}}"}
PROMPTS = [Prompt(f"prompt {i}", id=i) for i in range(300)]


class Listening:
    """Two numbers of an image, and the prompts that it is shown with them."""

    names, card = ("bright", "even"), Card("listening", sees_prompt=False)

    def __init__(self):
        self.prompts = []

    def __call__(self, images, prompts):
        self.prompts += [prompt.text for prompt in prompts]
        return Scores(self.names, torch.stack([images.mean((1, 2, 3)), -images.std((1, 2, 3))], 1))


@pytest.fixture
def base(settings):
    return settings | SDE | {"rewards": TWO, "combine": PURE, "iterations": 2, "eval_every": 1}


def adapter(out):
    return checkpoint.read(checkpoint.latest(out / "checkpoints"))[0]["adapter"]


def same(one, two):
    return all(torch.equal(value, adapter(two)[name]) for name, value in adapter(one).items())


def opened(rule, names=(RED, EVEN)):
    rule.check(dict.fromkeys(names, (1.0, 1.0)))
    return rule.opened(names, {})


def test_directions_are_the_unit_vectors_of_a_lattice_each_as_often_as_the_others():
    assert lattice(2, 2) == [(2, 0), (1, 1), (0, 2)]
    assert [len(lattice(k, 4)) for k in (1, 2, 3)] == [1, 5, 15]
    rule = opened(Directed(parts=2))
    directions = rule.for_prompts(PROMPTS, 0, 5).directions
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(300))
    known = torch.tensor([[1, 0], [0.5**0.5, 0.5**0.5], [0, 1]])
    each = [int(((directions - one).abs().sum(1) < 1e-6).sum()) for one in known]
    assert sum(each) == 300
    assert min(each) > 70
    assert torch.equal(rule.for_prompts(PROMPTS[:-51:-1], 0, 5).directions, directions.flip(0)[:50])
    for seed, iteration in ((1, 5), (0, 6)):
        other = rule.for_prompts(PROMPTS, seed, iteration).directions
        assert 50 < int((other == directions).all(1).sum()) < 150


def test_each_direction_has_words_of_its_own():
    assert Directed().words((RED, "clip.cosine"), (3, 1)) == " | red 3, cosine 1"
    assert Directed(suffix=f", {{{EVEN}}} to {{{RED}}}").words((RED, EVEN), (3, 1)) == ", 1 to 3"
    assert opened(Directed(2, 1, (", red", "", ", even"))).fan == {"2:0": ", red", "0:2": ", even"}
    rule = opened(Directed(parts=10, fan=2))
    assert rule.fan == {"05:05": " | red 5, even 5", "10:00": " | red 10, even 0", "00:10": " | red 0, even 10"}
    assert rule.rule.measured(2) == 3
    assert rule.rule.measured(3) == len(lattice(3, 2)) == 6
    suffixes = rule.suffixes(PROMPTS, 0, 1)
    directions = rule.for_prompts(PROMPTS, 0, 1).directions
    for suffix, direction in zip(suffixes, directions, strict=True):
        counts = torch.tensor([float(word.strip(",")) for word in suffix.split() if word.strip(",").isdigit()])
        torch.testing.assert_close(counts / counts.norm(), direction)


def test_advantages_are_linear_in_the_direction(base):
    session = open_session(configs.build(base | {"combine": PURE | {"parts": 4}}, "test"))
    prompts = session.prompts(0)
    rollout = sample_and_score(session, prompts, 0)
    advantage = partial(Terminal(), rollout.tree, units=Units("none"))
    along = advantage(judged(session, rollout, 0))[:, 0, 0, 0]
    parts = []
    for name, weight in TWO.items():
        alone = Combination({name: weight})(rollout.scored.parts, rollout.tree.owner)
        parts.append(advantage(replace(judged(session, rollout, 0), reward=rollout.tree.at_states(alone)))[:, 0, 0, 0])
    rule = Directed(parts=4).opened([*TWO], {}).for_prompts(prompts, session.config.seed, 0)
    v = rule.directions[rollout.tree.prompt]
    torch.testing.assert_close(along, v[:, 0] * parts[0] + v[:, 1] * parts[1])
    assert along.abs().max() > 0


def test_a_score_that_does_not_count_may_be_missing():
    rule = opened(Directed(parts=1, fan=1)).for_prompts(PROMPTS[:20], 0, 0)
    first = rule.directions[:, 0] == 1
    assert first.any()
    assert not first.all()
    parts = {RED: torch.arange(20.0), EVEN: torch.full((20,), torch.nan)}
    reward = Combination(TWO, rule)(parts, torch.arange(20))
    assert torch.equal(reward[first], torch.arange(20.0)[first])
    assert reward[~first].isnan().all()


def test_the_model_reads_the_direction_and_scorers_do_not(base):
    listening = Listening()
    rewards = {"listening.bright": 1.0, "listening.even": 1.0}
    combine = {"type": "directed", "suffix": " {listening.bright}"}
    c = configs.build(base | {"rewards": rewards, "combine": combine}, "test")
    session = open_session(c, given=Given(scorers={"listening": listening}))
    prompts = session.prompts(1)
    rollout = sample_and_score(session, prompts, 1)
    assert {*listening.prompts} == {prompt.text for prompt in prompts}
    rule = session.rewards.rule
    read = [prompt.text + suffix for prompt, suffix in zip(prompts, rule.suffixes(prompts, c.seed, 1), strict=True)]
    start = partial(session.policy.velocity, torch.ones(2, *session.policy.latent_shape), torch.ones(2))
    plain, heard = (session.policy.encode(texts) for texts in ([prompt.text for prompt in prompts], read))
    index = torch.arange(2)
    assert torch.equal(start(rollout.cond, index), start(heard, index))
    assert not torch.equal(start(heard, index), start(plain, index))


def test_a_direction_that_the_model_would_not_read_is_refused(base):
    """The model of the tests reads 10 tokens, and the default names rewards."""
    with pytest.raises(BadInput, match=r"4 of 4 prompts, with ' | red 2, even 2'.*the direction"):
        open_session(configs.build(base | {"combine": "directed"}, "test"))


def test_one_direction_is_training_with_that_reward_alone_to_the_bit(base, tmp_path):
    """On prompts that hold its words. The seed is one whose draws are all the direction (1, 0)."""
    c = configs.build(base, "test")
    session = open_session(c)
    prompts, drawn = session.prompts.all, session.rewards.rule.drawn
    seed = next(s for s in range(10_000) if {*drawn(prompts, s, 0), *drawn(prompts, s, 1)} == {(1, 0)})
    worded = tmp_path / "worded.jsonl"
    worded.write_text("".join(json.dumps({"prompt": p.text + " 1", "id": p.id}) + "\n" for p in prompts))
    changed = dict(seed=seed, held_out=None, eval_every=0)
    directed = run(base, **changed)
    alone = run(base, **changed, combine="sum", rewards={RED: 1.0}, prompts=str(worded), out=str(tmp_path / "alone"))
    assert same(directed, alone)
    plain = run(base, **changed, combine="sum", rewards={RED: 1.0}, out=str(tmp_path / "plain"))
    assert not same(directed, plain)
    for one, two in zip(rows(directed / "metrics.jsonl"), rows(alone / "metrics.jsonl"), strict=True):
        assert one["reward"] == two["reward"]


def test_a_run_measures_a_fan_and_resumes_to_the_bit(base, tmp_path):
    changed = dict(combine=PURE | {"parts": 4, "fan": 2}, iterations=3, checkpoint_every=1)
    complete = run(base, **changed, out=str(tmp_path / "complete"))
    with cut_off(2):
        run(base, **changed)
    out = run(base, resume=True, **changed)
    assert same(out, complete)
    first, *_, last = evaluations = rows(complete / "evaluations.jsonl")
    timed = {"seconds"}
    for one, two in zip(evaluations, rows(out / "evaluations.jsonl"), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}
    assert not any(key.startswith("fan/") for key in first)
    assert {key.split("/")[1] for key in last if key.startswith("fan/")} == {"4:0", "2:2", "0:4"}
    assert last[RED] == last[f"fan/2:2/{RED}"]

    session = open_session(configs.load(complete / "config.yaml"))
    saving.restore(session, complete, print)
    held_out = session.held_out
    scored = partial(evaluate.evaluate, session.policy, members=2, steps=2, scorers=session.rewards.scorers, batch=128)
    with session.learner.averaged():
        for direction, suffix in (("4:0", " 4"), ("2:2", " 2"), ("0:4", " 0")):
            means = scored([replace(prompt, text=prompt.text + suffix) for prompt in held_out]).means()
            assert {name: last[f"fan/{direction}/{name}"] for name in TWO} == {name: means[name] for name in TWO}
        plain = scored(held_out).means()
    assert plain[RED] != last[RED]
    front = report._front(reader.read(complete).evaluations)
    assert [row[0] for row in front["rows"]] == ["before", "4:0", "2:2", "0:4"]
    assert front["rows"][0][1] == f"{first[RED]:.3f}"
    assert front["rows"][1][1] == f"{last[f'fan/4:0/{RED}']:.3f}"
    assert "<h2>Directions</h2>" in report.write(complete).read_text()


def test_the_estimate_counts_all_directions(base):
    listening = Listening()
    changed = base | {
        "rewards": {"listening.bright": 1.0, "listening.even": 1.0}, "eval_siblings": 2, "eval_prompts": 1,
        "combine": {"type": "directed", "fan": 4, "suffix": " {listening.even}"},
    }  # fmt: skip
    c = configs.build(changed, "test")
    runs.train(c, given=Given(scorers={"listening": listening}))
    made = estimate.evaluations(c, PROMPTS[:2], guided=False)
    assert made["rewards"] == 4 + 5 * (4 + 2)
    assert len(listening.prompts) == made["rewards"] + 2 * 2 * 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewards": {RED: 1.0}}, "at least two rewards"),
        ({"combine": {"type": "directed", "parts": 4, "fan": 3}}, "fan: 3 does not divide parts: 4"),
        ({"combine": {"type": "directed", "suffix": " strict"}}, "' strict' is the same for two directions"),
        ({"combine": {"type": "directed", "suffix": [" a", " b"]}}, "suffix: 2 texts for 5 directions"),
        (
            {"combine": {"type": "directed", "parts": 1, "fan": 1, "suffix": [" a", " a"]}},
            "the same for two directions",
        ),
        ({"combine": {"type": "directed", "suffix": "\n{smooth:Smooth.red}"}}, "printable"),
        ({"rewards": {f"s.{i}": 1.0 for i in range(12)}}, "1365 directions, 1000 at most"),
        ({"at_least": {RED: {"bound": 0.1}}}, "at_least"),
        ({"extend": {"type": "frontier"}}, "extend"),
    ],
)
def test_directions_that_cannot_act_are_refused(base, changed, message):
    combine = {"type": "directed"} if "rewards" in changed else PURE
    with pytest.raises(BadInput, match=message):
        configs.build(base | {"combine": combine} | changed, "test")
