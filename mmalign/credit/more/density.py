"""The two rewards of a run in which some scorers are shown finished images alone."""

from dataclasses import replace

import torch

from mmalign.types import Judgement


def of_states(judged: Judgement) -> Judgement:
    """The rewards that every state has, without those of finished images alone."""
    if judged.ends is None:
        return judged
    reward = judged.reward.clone()
    reward[:, -1] = torch.where(reward[:, -1].isnan(), torch.nan, judged.ends[:, 0])
    return replace(judged, reward=reward, ends=None)


def of_ends(judged: Judgement) -> Judgement:
    """The rewards of finished images alone where there are any; otherwise all rewards."""
    if judged.ends is None:
        return judged
    reward = torch.full_like(judged.reward, torch.nan)
    reward[:, -1] = torch.where(judged.reward[:, -1].isnan(), torch.nan, judged.ends[:, 1])
    return replace(judged, reward=reward, ends=None)
