"""A fitted reward that is refreshed during a run: what is learnt, what stays, what a resumed run continues with."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import kill_and_resume
import pytest
import torch
from ranks_in_processes import launch
from run_config import cut_off, rows, run

from mmalign import policy as policies
from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.evaluation import collect as collecting
from mmalign.evaluation.collect import Pairing, collect
from mmalign.rewards.refresh import Refresh
from mmalign.runs import alarms
from mmalign.training import refit as refits, refreshing
from reward_models import Card, Prompt, Scores, load, pairs as preferences
from reward_models.meaning import meaning
from reward_models.training import fit

FILES = ("metrics.jsonl", "evaluations.jsonl", "credit.jsonl", "alarms.jsonl")
TEXTS = [
    f"{count} {colour} {shape}"
    for count in ("one", "two")
    for colour in ("red", "blue")
    for shape in ("cross", "bar", "disc")
]


class Constant:
    """Every image is as good as any other."""

    names = ("same",)
    card = Card("constant")

    def __call__(self, images, prompts):
        return Scores(self.names, torch.zeros(len(images), 1))


@pytest.fixture(scope="module")
def drifted(random_model, tmp_path_factory):
    """A table of pairs of the base model's images labelled by how red they are, and a head fitted to the opposite."""
    folder = tmp_path_factory.mktemp("drifted")
    policy = policies.load(random_model, dtype="float32", device="cpu", guidance=1.0)
    prompts = [Prompt(text, id=100 + i) for i, text in enumerate(TEXTS)]
    judge = {"smooth": load("smooth:Smooth")}
    collect(policy, prompts, judge, range(6), "smooth.red", 2, folder / "collected", Pairing("all"))
    opposite = [replace(pair, preference=0.0) for pair in preferences.read(folder / "collected/pairs.jsonl")]
    fit(opposite, folder / "head", epochs=5)
    return folder


@pytest.fixture
def refreshed(settings, drifted, tmp_path, monkeypatch):
    """The settings of a run that refreshes the head that was fitted to the opposite."""
    monkeypatch.setenv("MMALIGN_ALLOW", "smooth,test_refresh")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    refresh = {"by": "smooth:Smooth.red", "every": 2, "prompts": 12, "seeds": 4}
    return settings | {
        "prompts": str(prompts), "rewards": {"fitted.score": 1.0}, "watch": ["smooth:Smooth"], "iterations": 5,
        "scorers": {"fitted": {"folder": str(drifted / "head")}}, "refresh": refresh, "eval_prompts": 1,
    }  # fmt: skip


def bare(row):
    """Without what only a run with a refresh, or only one without, writes."""
    return {key: value for key, value in row.items() if key not in ("refresh", "compared")}


@contextmanager
def interrupted(module, name, calls):
    """Inside, the call of a function after so many is an interruption, as by Ctrl-C."""
    function, before = getattr(module, name), []

    def called(*args, **kwargs):
        before.append(None)
        if len(before) > calls:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, called)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_reward_that_prefers_the_opposite_learns_what_the_judge_prefers(refreshed):
    out = run(refreshed)
    first, second = rows(out / "refreshes.jsonl")
    assert [first["iteration"], second["iteration"]] == [2, 4]
    assert first["images"] == 48
    assert first["before"] < 0.4
    assert first["after"] > 0.6
    assert first["replaced"] is True
    assert first["fitted_to"] == first["pairs"]
    assert second["fitted_to"] == first["pairs"] + second["pairs"]
    old, new = (
        load("fitted", folder=str(folder)).card.version
        for folder in (refreshed["scorers"]["fitted"]["folder"], out / "refreshed/000002/model")
    )
    assert first["version"] == new != old
    after = 4 if second["replaced"] else 2
    assert [row["refresh"] for row in rows(out / "metrics.jsonl")] == [0, 0, 2, 2, after]
    assert [row["refresh"] for row in rows(out / "evaluations.jsonl")] == [0, 0, 2, after]


def test_a_judge_that_tells_no_images_apart_changes_nothing(refreshed, tmp_path):
    refresh = refreshed["refresh"] | {"by": "test_refresh:Constant.same"}
    out = run(refreshed, refresh=refresh, iterations=3)
    plain = run(
        refreshed, refresh=None, iterations=3, out=str(tmp_path / "plain")
    )  # the first reward chooses the best checkpoint
    for row in rows(out / "refreshes.jsonl"):
        assert row["replaced"] is False
        assert row["pairs"] == row["held_out"] == 0
        assert row["reason"] == "no two images of a prompt to learn from have unequal scores"
    ours, theirs = (kill_and_resume.outcome(folder) for folder in (out, plain))
    for part in ("adapter", "ema", "optimizer"):
        assert ours[part] == theirs[part]
    for name in FILES:
        assert [bare(row) for row in ours[name]] == [bare(row) for row in theirs[name]]
    assert not (out / "refreshed/000002/model").exists()


def test_a_model_that_is_no_better_does_not_replace_the_old_one(refreshed):
    """The judge is the old model, which no other can agree with in more pairs."""
    scorers = refreshed["scorers"] | {"judge": refreshed["scorers"]["fitted"] | {"scorer": "fitted"}}
    refresh = refreshed["refresh"] | {"by": "judge.score"}
    out = run(refreshed, scorers=scorers, refresh=refresh, iterations=3)
    [row] = rows(out / "refreshes.jsonl")
    assert row["before"] == 1.0
    assert row["after"] <= 1.0
    assert row["replaced"] is False
    assert row["reason"] == "the new model is no better on the held-out pairs"
    assert [row["refresh"] for row in rows(out / "metrics.jsonl")] == [0, 0, 0]
    assert not any("judge" in name for row in rows(out / "evaluations.jsonl") for name in row)


def test_images_that_the_judge_cannot_score_are_counted(refreshed):
    scorers = refreshed["scorers"] | {"blind": {"scorer": "smooth:Smooth", "limit": -1.0}}
    refresh = refreshed["refresh"] | {"by": "blind.red"}
    [row] = rows(run(refreshed, scorers=scorers, refresh=refresh, iterations=3) / "refreshes.jsonl")
    assert (row["images"], row["failed"], row["replaced"]) == (48, 48, False)


def test_a_run_that_is_interrupted_again_and_again_is_the_uninterrupted_one(refreshed, monkeypatch, tmp_path):
    """While images are judged, once the row is written, an iteration after that, which no checkpoint has, and before
    the next model is fitted. No image is judged twice."""
    judged, collected = [], collecting._collected

    def counted(policy, prompt, *rest):
        rows = collected(policy, prompt, *rest)
        judged.append(rows[0]["image"])
        return rows

    monkeypatch.setattr(collecting, "_collected", counted)
    refreshed |= {"checkpoint_every": 100, "eval_every": 0}
    whole = run(refreshed, out=str(tmp_path / "whole"))
    with interrupted(collecting, "_collected", 5):
        run(refreshed)
    with interrupted(refreshing, "_line", 0):
        run(refreshed, resume=True)
    with cut_off(3):
        run(refreshed, resume=True)
    with interrupted(refits, "fit", 0):
        run(refreshed, resume=True)
    out = run(refreshed, resume=True)
    assert kill_and_resume.outcome(out) == kill_and_resume.outcome(whole)
    assert sorted(judged) == sorted(2 * [*dict.fromkeys(judged)])


@pytest.mark.slow
def test_two_processes_refresh_as_one(refreshed, tmp_path):
    """One of them draws, judges and fits; both use the model."""
    settings = refreshed | {"batch": 1, "decode_batch": 1, "micro_batch": 1}
    alone = run(settings, out=str(tmp_path / "alone"))
    _, ended, *_ = launch(tmp_path, 2, {}, {"two": (settings, False)}, MMALIGN_ALLOW="smooth")
    assert [job["two"][0] for job in ended] == ["done"] * 2
    one, two = (rows(out / "refreshes.jsonl") for out in (alone, tmp_path / "run"))
    for row, other in zip(one, two, strict=True):
        same = ("iteration", "images", "pairs", "held_out", "fitted_to", "replaced")
        assert [row[key] for key in same] == [other[key] for key in same]
        assert row["after"] == pytest.approx(other["after"], abs=0.1)
    after = [[row["refresh"] for row in rows(out / "metrics.jsonl")] for out in (alone, tmp_path / "run")]
    assert after[0] == after[1]
    assert after[0][2] == 2


# --------------------------------------------------------------------------------------------------- prompts, refusals


def test_prompts_are_drawn_from_two_groups_that_stay_apart():
    prompts = [
        Prompt(text, id=i) for i, text in enumerate([*TEXTS, "red cross and the disc", "the disc and a red cross"])
    ]
    refresh = Refresh("judge.score", prompts=8, held_out=0.25)
    learnt, apart = refresh.groups(prompts, 3)
    assert [*learnt, *apart] != prompts
    assert {p.id for p in (*learnt, *apart)} == {p.id for p in prompts}
    assert not {meaning(p.text) for p in learnt} & {meaning(p.text) for p in apart}
    assert len({meaning(p.text) for p in apart}) == 3  # a quarter of 13 meanings
    for done in (50, 100):
        some, others = refresh.drawn(prompts, 3, done)
        assert (len({p.id for p in some}), len({p.id for p in others})) == (6, 2)
        assert {p.id for p in some} <= {p.id for p in learnt}
        assert {p.id for p in others} <= {p.id for p in apart}
    assert refresh.drawn(prompts, 3, 50) == refresh.drawn(prompts, 3, 50) != refresh.drawn(prompts, 3, 100)
    with pytest.raises(ValueError, match="8 need 6 to learn from, and 3 of the 4 training prompts are"):
        refresh.groups(prompts[:4], 3)


FITTED = {"fitted": {"folder": "head"}}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rewards": {"jpeg_size.kilobytes": 1.0}}, "'fitted' is not among the scorers of rewards: jpeg_size"),
        ({"refresh": {"by": "a.b", "scorer": "other"}}, "'other' is not among the scorers of rewards: fitted"),
        ({"scorers": {"fitted": {"scorer": "clip"}}}, "'fitted' is not a scorer of type fitted"),
        ({"scorers": {}}, "'fitted' is not a scorer of type fitted with a folder"),
        ({"refresh": {"by": "shapes"}}, "'shapes': the component of another scorer"),
        ({"refresh": {"by": "fitted.score"}}, "'fitted.score': the component of another scorer"),
        ({"refresh": {}}, "by"),
        ({"refresh": {"by": "a.b", "every": 0}}, "every: .* got 0"),
        ({"refresh": {"by": "a.b", "every": 100}}, "every: 100 of 100 iterations: it would never act"),
        ({"refresh": {"by": "a.b", "prompts": 3}}, "prompts: 3 with held_out: 0.25 leaves 2 prompts to learn from"),
        ({"refresh": {"by": "a.b", "prompts": 10_000, "seeds": 64}}, "more than 1000000 pairs"),
        ({"rewards": {"fitted.better": 1.0}}, "fitted.better: a refit has the components score, sigma, spread alone"),
        ({"scorers": {"fitted": {"folder": "head", "better": True}}}, "needs a calibration"),
        ({"reference": "reference.json"}, "reference: it is in the units of the first fit"),
        ({"at_least": {"fitted.score": {"bound": 0.0}}}, "at_least: it is in the units of the first fit"),
        ({"keep_best": "fitted.score"}, "keep_best: it is in the units of the first fit"),
        ({"combine": {"type": "experts", "file": "mixture"}}, "refresh: it does not go with combine: experts"),
        ({"records": "r.jsonl", "objective": "dpo"}, "refresh does not act with records"),
    ],
)
def test_settings_without_sense_are_refused(changed, words):
    settings = {"rewards": {"fitted.score": 1.0}, "scorers": FITTED, "refresh": {"by": "shapes.partial"}}
    with pytest.raises(BadInput, match=words):
        configs.build(settings | changed, "test")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"by": "smooth:Smooth.blue"}, "refresh.by: no component 'blue'; smooth:Smooth gives red, even"),
        ({"by": "no_such.red"}, "no scorer called 'no_such'"),
        ({"prompts": 32}, "prompts: 32 need 24 to learn from, and 9 of the 12 training prompts are"),
        ({"pairs": "no_such.jsonl"}, "no_such.jsonl"),
    ],
)
def test_what_a_refresh_needs_is_checked_before_anything_is_written(refreshed, changed, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        run(refreshed, refresh=refreshed["refresh"] | changed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda card: card.pop("settings"), "card.json: settings: Field required"),
        (lambda card: card.update(fit="forest"), "is not known: no fit called 'forest'"),
        (lambda card: card.update(settings={"steps": 0}), "is not known: clip_head: steps"),
        (lambda card: card.update(held_out=2), "card.json: held_out"),
    ],
)
def test_a_folder_that_does_not_say_how_it_was_fitted_is_refused(refreshed, drifted, change, words, tmp_path):
    folder = tmp_path / "forged"
    shutil.copytree(drifted / "head", folder)
    card = json.loads((folder / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))
    c = configs.build(refreshed | {"scorers": {"fitted": {"folder": str(folder)}}}, "test")
    with pytest.raises(BadInput, match=words):
        refits.opened(c, {"smooth:Smooth": Constant()}, print)


# ------------------------------------------------------------------------------------------------------ what it changes


def test_the_best_checkpoint_is_chosen_by_a_score_that_no_refresh_changes():
    def best_by(**changed):
        settings = {"rewards": {"fitted.score": 1.0}, "scorers": FITTED, "refresh": {"by": "shapes.partial"}}
        return configs.build(settings | changed, "test").best_by

    assert best_by() is None
    assert best_by(watch=["shapes"]) == "shapes.partial"
    assert best_by(rewards={"fitted.score": 1.0, "jpeg_size.kilobytes": 0.1}) == "jpeg_size.kilobytes"
    assert best_by(refresh=None) == "fitted.score"


def test_the_alarm_of_hacking_does_not_compare_scores_across_a_refresh():
    """The reward rises in training while a watched score falls, in ten evaluations: before the refresh after five."""
    c = Config(rewards={"fitted.score": 1.0}, watch=["shapes"])
    metrics = [{"part/fitted.score": float(i)} for i in range(10)]
    falling = [{"iteration": i, "name": None, "shapes.partial": -float(i)} for i in range(1, 11)]
    assert "may be hacked" in alarms.ALARMS["hacking"](c, metrics, falling)
    split = [row | {"refresh": 0 if row["iteration"] <= 6 else 6} for row in falling]
    assert alarms.ALARMS["hacking"](c, metrics, split) is None


def test_the_estimate_counts_the_images_of_refreshes(refreshed):
    figures = estimate.estimate(configs.build(refreshed, "test"))
    assert figures["refreshes"] == {"refreshes": 2, "decodes": 96, "forwards": 192, "rewards": 96}
    assert estimate.estimate(configs.build(refreshed | {"refresh": None}, "test"))["refreshes"]["decodes"] == 0
