"""A fitted reward that is refreshed during a run: what is learnt, what stays, what a resumed run goes on with."""

import json
import shutil
from dataclasses import replace

import kill_and_resume
import pytest
import torch
from drawn_pairs import drawn_pairs
from run_config import cut_off, rows, run

from mmalign import policy as policies
from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.config.schema import Config
from mmalign.errors import BadInput
from mmalign.evaluation.collect import Pairing, collect
from mmalign.rewards.refresh import Refresh
from mmalign.runs import alarms, checkpoint
from mmalign.training import refreshing
from reward_models import Card, Prompt, Scores, load, pairs as preferences
from reward_models.meaning import meaning
from reward_models.training import fit

TEXTS = [f"{count} {colour} {shape}" for count in ("one", "two") for colour in ("red", "blue") for shape in ("cross", "bar", "disc")]


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
def refreshed(settings, drifted, tmp_path):
    """The settings of a run that refreshes the head that was fitted to the opposite."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    refresh = {"by": "smooth:Smooth.red", "every": 2, "prompts": 12, "seeds": 4}
    return settings | {
        "prompts": str(prompts), "rewards": {"fitted.score": 1.0}, "watch": ["smooth:Smooth"], "iterations": 5,
        "scorers": {"fitted": {"folder": str(drifted / "head")}}, "refresh": refresh, "eval_prompts": 1,
    }  # fmt: skip


def adapter(out, iteration):
    return checkpoint.read(out / f"checkpoints/{iteration:06d}")[0]["adapter"]


def test_a_reward_that_prefers_the_opposite_learns_what_the_judge_prefers(refreshed):
    out = run(refreshed)
    first, second = rows(out / "refreshes.jsonl")
    assert [first["iteration"], second["iteration"]] == [2, 4]
    assert first["images"] == 48
    assert first["before"] < 0.4 and first["after"] > 0.6
    assert first["kept"] == "new"
    assert first["fitted_to"] == first["pairs"]
    assert second["fitted_to"] == first["pairs"] + second["pairs"]
    old, new = (load("fitted", folder=str(folder)).card.version for folder in (
        refreshed["scorers"]["fitted"]["folder"], out / "refreshed/000002/model"))
    assert first["version"] == new != old
    after = 4 if second["kept"] == "new" else 2
    assert [row["refresh"] for row in rows(out / "metrics.jsonl")] == [0, 0, 2, 2, after]
    assert [row["refresh"] for row in rows(out / "evaluations.jsonl")] == [0, 0, 2, after]
