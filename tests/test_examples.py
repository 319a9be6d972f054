"""The examples run, and do what they say."""

import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_grpo_finds_the_target_of_a_gaussian():
    example = runpy.run_path(str(EXAMPLES / "gaussian.py"))
    mean = example["train"](iterations=60, seed=0)
    assert torch.allclose(mean, example["TARGET"], atol=0.3)
    assert torch.equal(mean, example["train"](iterations=60, seed=0))
