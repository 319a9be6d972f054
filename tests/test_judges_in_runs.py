"""Judges that write as rewards of a run: parts, full groups, aspects, budgets."""

import threading
import time
from pathlib import Path

import pytest
import torch
from chats import chatting, completion
from judge_texts import FULL
from kill_and_resume import outcome
from run_config import rows, run
from services import running

from mmalign import errors, train
from mmalign.config import load as configs
from mmalign.config.checks import component
from mmalign.errors import BadInput
from mmalign.evaluation import evaluate as evaluation
from mmalign.training import rollout, setup
from reward_models import load


@pytest.fixture
def captions(tmp_path):
    """Prompts with ground truth."""
    lines = Path("assets/prompts/train.jsonl").read_text().splitlines()[:12]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return {"prompts": str(tmp_path / "captions.jsonl"), "held_out": None, "rewards": {"slow.partial": 1.0}}


def test_a_part_is_judged_while_the_next_is_drawn(settings, captions, monkeypatch):
    """The judge waits until the next part is begun, which a rollout that waits for the judge would never do; and no
    part is begun with more than one, besides that which is judged, waiting for the judge."""
    changed = {"scorers": {"slow": {"scorer": "slow_judge:Slow"}}, "prompts_per_iteration": 5, "rollout_parts": 5}
    opened = setup.open_session(configs.build(settings | captions | changed, "test"))
    slow, trajectories = opened.rewards.scorers["slow"], rollout.trajectories
    begun, answered = [threading.Event() for _ in range(6)], []

    def sampling(*args):
        (part,) = args[9]  # the rows
        begun[part].set()
        answered.append(slow.answered)
        return trajectories(*args)

    def waiting(number):
        assert begun[number + 1].wait(600), f"part {number + 1} was not begun"
        time.sleep(0.05)

    begun[5].set()  # after the last there is nothing to wait for
    slow.wait = waiting
    monkeypatch.setattr(rollout, "trajectories", sampling)
    train.iterate(opened, 0)
    assert slow.answered == 5
    assert all(count >= part - 1 for part, count in enumerate(answered))


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"plan": "sde", "credit": "gain"},
        {
            "at_least": {"slow.strict": {"bound": 0.5, "rate": 0.1}},
            "combine": "mrn",
            "advantage": {"scale": "none"},
            "plan": {"type": "branch", "steps": [0, 1], "children": 3},
        },
        {"region": "slow", "rewards": {"slow.partial": 1.0, "jpeg_size.kilobytes": 0.1}},
    ],
    ids=["branch", "gain", "constraint", "region"],
)
def test_parts_change_nothing_but_when_images_are_judged(settings, captions, tmp_path, method):
    """To the bit, where a forward has the same rows."""
    same = {"scorers": {"slow": {"scorer": "slow_judge:Slow"}}, "prompts_per_iteration": 4, "iterations": 2}
    same |= {"batch": 1, "decode_batch": 1}
    whole = run(settings, **captions | same | method, out=str(tmp_path / "whole"))
    parts = run(settings, **captions | same | method, rollout_parts=3, out=str(tmp_path / "parts"))
    assert outcome(parts) == outcome(whole)
    assert len(rows(whole / "credit.jsonl")) == len(rows(parts / "credit.jsonl")) > 0


def test_an_evaluation_is_judged_while_its_next_part_is_drawn(settings, captions, monkeypatch):
    """The same evaluation to the bit, by a judge that waits until the next part is begun."""
    changed = {"scorers": {"slow": {"scorer": "slow_judge:Slow"}}}
    opened = setup.open_session(configs.build(settings | captions | changed, "test"))
    slow, generate, prompts = opened.rewards.scorers["slow"], evaluation.generate, opened.prompts.all[:3]
    scorers = {"slow": slow}
    whole = evaluation.evaluate(opened.policy, prompts, 2, 2, scorers, 1)
    begun = [threading.Event() for _ in range(4)]
    begun[3].set()  # after the last there is nothing to wait for

    def sampling(policy, some, *args, **options):
        begun[prompts.index(some[0])].set()
        return generate(policy, some, *args, **options)

    def waiting(number):
        assert begun[number].wait(60), f"part {number} was not begun"

    before = slow.answered
    slow.wait = lambda number: waiting(number - before + 1)
    monkeypatch.setattr(evaluation, "generate", sampling)
    parts = evaluation.evaluate(opened.policy, prompts, 2, 2, scorers, 1, parts=3)
    assert slow.answered == before + 3
    assert torch.equal(parts.images, whole.images)
    assert torch.equal(parts.prompt, whole.prompt)
    assert {name: values.tolist() for name, values in parts.parts.items()} == {
        name: values.tolist() for name, values in whole.parts.items()
    }


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_not_finite_in_a_part_is_shown_to_no_judge(settings, captions, monkeypatch, parts):
    changed = {"scorers": {"slow": {"scorer": "slow_judge:Slow"}}, "prompts_per_iteration": 3, "rollout_parts": parts}
    opened = setup.open_session(configs.build(settings | captions | changed, "test"))
    decoded = rollout.decoded

    def spoilt(session, paths, rows):
        images = decoded(session, paths, rows)
        images[paths.tree.owner[rows] == 1] = torch.nan
        return images

    monkeypatch.setattr(rollout, "decoded", spoilt)
    bad = opened.prompts(0)[1]
    with pytest.raises(
        errors.NonFinite, match=f"^iteration 1: decoded images not finite; prompts: {bad.id} '{bad.text}'$"
    ):
        train.iterate(opened, 0)
    assert opened.rewards.scorers["slow"].answered <= parts - 1


def test_a_part_needs_a_prompt(settings):
    with pytest.raises(BadInput, match="rollout_parts: 9 of 8 prompts; each part needs one"):
        configs.build(settings | {"prompts_per_iteration": 8, "rollout_parts": 9}, "test")


def test_full_groups_teach_nothing_and_are_counted(settings, tmp_path):
    good = {"rewards": {"full.good": 1.0}, "scorers": {"full": {"scorer": "slow_judge:Full"}}, "held_out": None}
    c = configs.build(settings | good | {"advantage": {"saturated": 0.9}}, "test")
    opened = setup.open_session(c)
    row = train.iterate(opened, 0)
    even = [prompt.id % 2 == 0 for prompt in opened.prompts.all]
    assert 0 <= row["saturated_groups"] <= 1
    shares = [train.iterate(opened, i)["saturated_groups"] for i in range(1, 4)]
    assert sum([row["saturated_groups"], *shares]) / 4 == pytest.approx(sum(even) / len(even))
    with pytest.raises(BadInput, match="advantage does not act with objective: srum"):
        configs.build(settings | {"objective": "srum", "region": "shapes", "advantage": {"saturated": 0.9}}, "test")


def test_a_written_judgement_is_a_reward_with_its_aspects(settings):
    scores = iter(range(10**6))

    def answer(request):
        return completion(FULL.replace("3.5", f"{1 + (next(scores) * 7) % 30 / 10:.1f}"))

    with chatting(answer) as (url, requests):
        judge = {"rational": {"model": "m", "url": url, "retries": 0}}
        rewards = {"rational.faithfulness": 0.7, "rational.quality": 0.3}
        out = run(settings, rewards=rewards, scorers=judge, iterations=2, held_out=None, rollout_parts=2)
        count = len(requests)
    last = rows(out / "metrics.jsonl")[-1]
    assert last["judge/rational/calls"] == count
    assert last["judge/rational/reply_tokens"] == 3 * count
    assert last["part/rational.quality"] == pytest.approx(2 / 3)
    assert 0 <= last["part/rational.faithfulness"] <= 1
    assert last["failed"] == 0


def test_a_run_whose_calls_are_spent_stops_and_says_so(settings):
    with chatting(lambda request: completion(FULL)) as (url, _):
        judge = {"rational": {"model": "m", "url": url, "retries": 0, "max_calls": 20}}
        with pytest.raises(RuntimeError, match="budget of 20 calls is spent"):
            run(settings, rewards={"rational.overall": 1.0}, scorers=judge, iterations=3, held_out=None)


def test_a_cache_saves_the_second_run_its_calls(settings, tmp_path):
    with chatting(lambda request: completion(FULL)) as (url, requests):
        judge = {"rational": {"model": "m", "url": url}}
        same = {"rewards": {"rational.overall": 1.0}, "scorers": judge, "iterations": 1, "held_out": None}
        run(settings, **same, cache=str(tmp_path / "cache.sqlite"))
        first = len(requests)
        out = run(settings, **same, cache=str(tmp_path / "cache.sqlite"), out=str(tmp_path / "again"))
        assert len(requests) == first > 0
    assert rows(out / "metrics.jsonl")[-1]["cache_hits"] > 0.9


@pytest.mark.parametrize(
    ("reward", "scorer", "part"),
    [
        ("clip.cosine", "clip", "cosine"),
        ("remote.clip.cosine", "remote", "clip.cosine"),
        ("my.module:Scorer.part", "my.module:Scorer", "part"),
    ],
)
def test_a_reward_names_its_scorer_and_component(reward, scorer, part):
    assert component(reward) == (scorer, part)


def test_a_run_learns_from_a_reward_service(settings):
    with running({"jpeg_size": load("jpeg_size")}) as url:
        out = run(settings, rewards={"remote.jpeg_size.kilobytes": 1.0}, scorers={"remote": {"url": url}}, iterations=2)
    local = run(settings, iterations=2, out=f"{out}_local")
    for far, near in zip(rows(out / "metrics.jsonl"), rows(local / "metrics.jsonl"), strict=True):
        assert far["part/remote.jpeg_size.kilobytes"] == near["part/jpeg_size.kilobytes"]
        assert far["grad_norm"] == near["grad_norm"]
