"""Which starting noises scouts choose, and how well they have predicted."""

import math

import torch

from mmalign.selection.scouts import Scouts, chosen, correlation

NAN = float("nan")


def test_the_most_contrastive_starts_of_each_prompt():
    reward = torch.tensor([3.0, 1.0, 2.0, 5.0, 0.0, 0.0, 7.0, 0.0])
    assert chosen(reward, 2, 2).tolist() == [[1, 3], [2, 3]]


def test_starts_without_a_reward_fill_up():
    reward = torch.tensor([NAN, NAN, 2.0, NAN, NAN, NAN, NAN, NAN])
    assert chosen(reward, 2, 2).tolist() == [[0, 2], [0, 1]]


def test_scouts_of_a_prompt():
    assert Scouts(ratio=6, steps=3).images(seeds=4) == 24


def test_correlation_is_that_within_prompts():
    """By hand: prompts differ by 100 and count for nothing; deviations (-1, 0, 1) and (-1, 1, 0) of the one prompt
    correlate by 1/2; those of the other are the same."""
    scouted = torch.tensor([-1.0, 0.0, 1.0, 100.0, 102.0, NAN])
    reward = torch.tensor([-1.0, 1.0, 0.0, 0.0, 2.0, 1.0])
    prompt = torch.tensor([0, 0, 0, 1, 1, 1])
    assert correlation(scouted[:3], reward[:3], prompt[:3]) == 0.5
    assert abs(correlation(scouted, reward, prompt) - (1 + 2) / (2 + 2)) < 1e-12
    assert math.isnan(correlation(scouted[:2] * 0, reward[:2], prompt[:2]))
