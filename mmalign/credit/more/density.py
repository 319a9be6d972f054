"""The two rewards of a run in which some scorers are shown finished images alone."""

from dataclasses import replace

import torch

from mmalign.types import Judgement


def of_states(judged: Judgement) -> Judgement:
    """The rewards that every state has, without `rest`."""
    if judged.rest is None:
        return judged
    last = judged.reward[:, -1:] - judged.rest[:, None]
    return replace(judged, reward=torch.cat([judged.reward[:, :-1], last], 1), rest=None)


def of_ends(judged: Judgement) -> Judgement:
    """`rest` alone where there is one, at the finished image; otherwise all rewards."""
    if judged.rest is None:
        return judged
    reward = torch.full_like(judged.reward, torch.nan)
    reward[:, -1] = torch.where(judged.reward[:, -1].isnan(), torch.nan, judged.rest)
    return replace(judged, reward=reward, rest=None)
