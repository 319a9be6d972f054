"""The examples run, and do what they say."""

import runpy
from pathlib import Path

import pytest
import torch

from mmalign import run as runs
from mmalign.config import load as configs

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_grpo_finds_the_target_of_a_gaussian():
    example = runpy.run_path(str(EXAMPLES / "gaussian.py"))
    mean = example["train"](iterations=60, seed=0)
    assert torch.allclose(mean, example["TARGET"], atol=0.3)
    assert torch.equal(mean, example["train"](iterations=60, seed=0))


@pytest.mark.slow
def test_a_reward_function_is_learnt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "reward_function.py"))
    run = example["main"](iterations=8, out=tmp_path / "run")
    rewards = [row["reward"] for row in run.metrics]
    assert sum(rewards[-2:]) > sum(rewards[:2])
    assert (tmp_path / "run/lora/README.md").is_file()


def test_a_config_names_the_reward_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("MMALIGN_ALLOW", "reward_function")
    words = ["rewards={reward_function:redness.score: 1}", "watch=[]", "iterations=1", "cooldown=0", "warmup=0"]
    small = ["prompts_per_iteration=2", "seeds=2", "eval_prompts=2", "held_out=null", f"out={tmp_path / 'run'}"]
    assert runs.train(configs.load("quickstart", [*words, *small])).is_dir()
