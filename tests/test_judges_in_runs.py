"""Judges that write as rewards of a run: overlap, full groups, aspects, budgets."""

import time
from pathlib import Path

import pytest
import torch
from chats import chatting, said
from judge_texts import FULL
from services import running
from slow_judge import Slow
from whole_runs import rows, run

from mmalign import checkpoint, config as configs, session, train
from mmalign.config import BadInput
from reward_models import load


def adapter(out):
    return checkpoint.read(checkpoint.latest(out / "checkpoints"))[0]["adapter"]


@pytest.fixture
def captions(tmp_path):
    """Prompts with ground truth."""
    lines = Path("assets/prompts/train.jsonl").read_text().splitlines()[:12]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return {"prompts": str(tmp_path / "captions.jsonl"), "held_out": None, "rewards": {"slow.partial": 1.0}}


def test_judging_overlaps_the_next_rollout(settings, captions):
    c = configs.build(
        settings | captions | {"scorers": {"slow": {"scorer": "slow_judge:Slow"}}, "overlap": True}, "test"
    )
    opened = session.open_session(c)
    slow = opened.scorers["slow"]
    assert isinstance(slow, Slow)
    drawn = []
    roll_out = train.roll_out

    def seen(*args):
        began = time.perf_counter()
        found = roll_out(*args)
        drawn.append((began, time.perf_counter()))
        return found

    train.roll_out = seen
    try:
        out = [train.iterate(opened, i) for i in range(4)]
    finally:
        train.roll_out = roll_out
    assert [row["iteration"] for row in out] == [1, 2, 3, 4]
    assert len(drawn) == len(slow.times) == 4
    for judged, ahead in zip(slow.times[:3], drawn[1:], strict=True):
        assert judged[0] <= ahead[1]  # the next batch was drawn
        assert ahead[0] <= judged[1]  # while this one was judged
    assert not opened.ahead


def test_overlap_learns_what_it_would_from_walks_one_update_old(settings, captions, tmp_path):
    """With a rate of nearly nothing the walks are the same, and so is all that is logged of them."""
    same = captions | {"scorers": {"slow": {"scorer": "slow_judge:Slow", "seconds": 0.0}}, "learning_rate": 1e-12}
    plain = run(settings, **same, out=str(tmp_path / "plain"))
    ahead = run(settings, **same, overlap=True, out=str(tmp_path / "ahead"))
    for one, two in zip(rows(plain / "metrics.jsonl"), rows(ahead / "metrics.jsonl"), strict=True):
        assert one["reward"] == pytest.approx(two["reward"], abs=1e-5)
        assert one["group_std"] == pytest.approx(two["group_std"], abs=1e-5)
    first, second = adapter(plain), adapter(ahead)
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in first)


def test_constraints_need_the_judgement_in_time(settings):
    with pytest.raises(BadInput, match="overlap judges before the constraints"):
        configs.build(settings | {"overlap": True, "at_least": {"jpeg_size.kilobytes": {"bound": -1}}}, "test")


def test_full_groups_teach_nothing_and_are_counted(settings, tmp_path):
    good = {"rewards": {"full.good": 1.0}, "scorers": {"full": {"scorer": "slow_judge:Full"}}, "held_out": None}
    c = configs.build(settings | good | {"saturated": 0.9}, "test")
    opened = session.open_session(c)
    row = train.iterate(opened, 0)
    even = [own.id % 2 == 0 for own in opened.prompts]
    assert 0 <= row["saturated_groups"] <= 1
    seen = [train.iterate(opened, i)["saturated_groups"] for i in range(1, 4)]
    assert sum([row["saturated_groups"], *seen]) / 4 == pytest.approx(sum(even) / len(even))
    srum = {"draws": 1, "alpha_range": [0, 1], "background": 0, "anchor": 0.5, "margin": 0}
    with pytest.raises(BadInput, match="saturated does not act with objective: srum"):
        configs.build(settings | srum | {"objective": "srum", "region": "shapes", "saturated": 0.9}, "test")


def test_a_written_judgement_is_a_reward_with_its_aspects(settings):
    scores = iter(range(10**6))

    def answer(request):
        return said(FULL.replace("3.5", f"{1 + (next(scores) * 7) % 30 / 10:.1f}"))

    with chatting(answer) as (url, requests):
        judge = {"rational": {"model": "m", "url": url, "retries": 0}}
        rewards = {"rational.faithfulness": 0.7, "rational.quality": 0.3}
        out = run(settings, rewards=rewards, scorers=judge, iterations=2, held_out=None, overlap=True)
        asked = len(requests)
    last = rows(out / "metrics.jsonl")[-1]
    assert last["judge/rational/calls"] == asked
    assert last["judge/rational/reply_tokens"] == 3 * asked
    assert last["part/rational.quality"] == pytest.approx(2 / 3)
    assert 0 <= last["part/rational.faithfulness"] <= 1
    assert last["failed"] == 0


def test_a_run_whose_calls_are_spent_stops_and_says_so(settings):
    with chatting(lambda request: said(FULL)) as (url, _):
        judge = {"rational": {"model": "m", "url": url, "retries": 0, "max_calls": 20}}
        with pytest.raises(RuntimeError, match="budget of 20 calls is spent"):
            run(settings, rewards={"rational.overall": 1.0}, scorers=judge, iterations=3, held_out=None)


def test_a_cache_saves_the_second_run_its_calls(settings, tmp_path):
    with chatting(lambda request: said(FULL)) as (url, requests):
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
    assert configs.component(reward) == (scorer, part)


def test_a_run_learns_from_a_reward_service(settings):
    with running({"jpeg_size": load("jpeg_size")}) as url:
        out = run(settings, rewards={"remote.jpeg_size.kilobytes": 1.0}, scorers={"remote": {"url": url}}, iterations=2)
    local = run(settings, iterations=2, out=f"{out}_local")
    for far, near in zip(rows(out / "metrics.jsonl"), rows(local / "metrics.jsonl"), strict=True):
        assert far["part/remote.jpeg_size.kilobytes"] == near["part/jpeg_size.kilobytes"]
        assert far["grad_norm"] == near["grad_norm"]
