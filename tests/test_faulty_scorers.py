"""A scorer's faults are its images': they have reasons, cost the others nothing, and stop a run once they are many."""

import os
import re
import signal
import sqlite3

import pytest
import torch
from command_line import mmalign
from faulty_scorers import Faulty
from run_config import rows, run

from mmalign.config import load as configs
from mmalign.errors import Failed
from mmalign.rewards.judge import score
from mmalign.runs import signals
from reward_models import Prompt, Scores
from reward_models.cache import Cached
from reward_models.scoring import score_isolated, score_pictures
from reward_models.types import Unusable

PROMPTS = [Prompt("a cat", {}, 0), Prompt("bad", {}, 1), Prompt("a dog", {}, 2), Prompt("a cow", {}, 3)]
IMAGES = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 8, 8)
SAYS = {
    "exit": "SystemExit: 0",
    "exit with words": "SystemExit: the licence has run out",
    "disk": "OSError: [Errno 28] No space left on device: '/tmp/of-the-scorer'",
    "bug": "KeyError: 'absent'",
    "memory": "MemoryError",
    "no scores": "it returned NoneType; Scores are needed",
    "another name": "it returned scores called other; it gives value",
}


@pytest.mark.parametrize("groupwise", [False, True])
@pytest.mark.parametrize("fault", SAYS)
def test_a_fault_is_that_images_failure_and_the_others_have_their_scores(fault, groupwise):
    scorer = Faulty(fault, everywhere=False, groupwise=groupwise)
    results = score_isolated(scorer, IMAGES, PROMPTS)
    assert results.failures == {1: SAYS[fault]}
    assert results.values[[0, 2, 3], 0].tolist() == pytest.approx([0, 2 / 3, 1])
    assert results.values[1].isnan().all()
    observed = score(IMAGES, PROMPTS, {"own": scorer})
    assert observed.failures == {1: f"own: {SAYS[fault]}"}
    rows = score_pictures([image[None] for image in IMAGES], PROMPTS, {"own": scorer})
    assert [row["failures"] for row in rows] == [{}, {"own": SAYS[fault]}, {}, {}]


def test_too_few_scores_are_not_spread_over_all_images():
    two = score_isolated(Faulty("one score", everywhere=False), IMAGES[:2], PROMPTS[:2])
    assert two.values.tolist() == [[0.0], [1.0]]  # of one image one score is right
    siblings = [Prompt("bad", {}, 1)] * 3
    results = score_isolated(Faulty("one score", groupwise=True), IMAGES[:3], siblings)
    assert results.failures == dict.fromkeys(range(3), "it was given 3 images, but returned 1 scores")


def test_what_is_sound_comes_back_as_it_was_and_in_one_call():
    calls = []

    class Counted(Faulty):
        def __call__(self, images, prompts):
            calls.append(len(images))
            return Scores(self.names, images.mean((1, 2, 3))[:, None], critiques=("a", "b", "c", "d"))

    results = score_isolated(Counted("exit"), IMAGES, PROMPTS)
    assert calls == [4]
    assert results.critiques == ("a", "b", "c", "d")
    assert torch.equal(results.values, IMAGES.mean((1, 2, 3))[:, None])
    assert score_isolated(Counted("exit"), IMAGES[:0], []).values.shape == (0, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_scorer_still_stops(number):
    class Long(Faulty):
        def __call__(self, images, prompts):
            os.kill(os.getpid(), number)
            return super().__call__(images, prompts)

    with signals.stopping(), pytest.raises(signals.Stopped) as stopped:
        score_isolated(Long("exit"), IMAGES, PROMPTS)
    assert stopped.value.code == 128 + number


def test_ctrl_c_without_a_run_around_it_passes():
    class Long(Faulty):
        def __call__(self, images, prompts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_isolated(Long("exit"), IMAGES, PROMPTS)


def test_a_cache_that_breaks_is_named_and_asked_once(tmp_path):
    path = tmp_path / "scores.sqlite"
    cached = Cached(Faulty("exit", everywhere=False), path)
    assert score(IMAGES, PROMPTS, {"own": cached}).failures == {1: "own: SystemExit: 0"}
    with sqlite3.connect(path) as store:
        store.execute("DROP TABLE scores")
    with pytest.raises(Unusable, match=r"cache .*scores.sqlite: no such table"):
        score_isolated(cached, IMAGES, PROMPTS)
    with pytest.raises(Failed, match=r"own: cache .*scores.sqlite: no such table"):
        score(IMAGES, PROMPTS, {"own": cached})


FAULTY = "faulty_scorers:Faulty"


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("silent", "value: NaN, for which the scorer gives no reason"),
        ("exit", ": SystemExit: 0"),
        ("disk", ": OSError: [Errno 28] No space left on device: '/tmp/of-the-scorer'"),
    ],
)
def test_a_run_whose_scorer_gives_nothing_ends_with_1_and_a_line(settings, tmp_path, fault, says, held_out):
    """At the first evaluation, or where there is none in the first iteration."""
    changed = {} if held_out else {"held_out": None, "eval_every": 0}
    c = configs.build(
        settings | {"rewards": {f"{FAULTY}.value": 1.0}, "scorers": {FAULTY: {"fault": fault}}} | changed, ""
    )
    (tmp_path / "config.yaml").write_text(configs.dump(c))
    result = mmalign("train", tmp_path / "config.yaml")
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert re.match(r"mmalign: (\d+) of \1 images could not be scored \(limit 20%\): ", line)
    assert line.endswith(says)
    assert "resume" not in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("fault", ["silent", "exit"])
def test_one_prompt_of_four_without_a_score_is_counted_and_the_run_goes_on_within_the_limit(settings, tmp_path, fault):
    (tmp_path / "four.txt").write_text("a cat\na dog\nbad\na cow\n")
    changed = {
        "scorers": {FAULTY: {"fault": fault, "everywhere": False}}, "rewards": {f"{FAULTY}.value": 1.0},
        "held_out": None, "eval_every": 0, "prompts": str(tmp_path / "four.txt"), "prompts_per_iteration": 4,
        "iterations": 1,
    }  # fmt: skip
    (row,) = rows(run(settings, **changed, max_failed=0.25) / "metrics.jsonl")
    assert row["failed"] == row["rewards"] / 4
    assert row[f"missing/{FAULTY}.value"] == 0.25
    with pytest.raises(Failed, match=r"images could not be scored \(limit 24%\)"):
        run(settings, **changed, max_failed=0.24, out=str(tmp_path / "again"))
