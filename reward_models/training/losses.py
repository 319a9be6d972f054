"""Losses of preferences between two images of one prompt, as pure functions.

Letters: `N` pairs. `difference` is the score of image a less that of image b. `preference` in [0, 1] is the share of
judges that prefer a: 1 for a, 0 for b, 0.5 for a tie. `margin` >= 0, by which the preferred image should win at least,
is subtracted from the preferred image's lead. Each function returns a loss for each pair, and exchanging a and b
changes none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Pairs = Float[Tensor, "N"]


def bradley_terry(difference: Pairs, preference: Pairs, margin: Pairs | float = 0.0) -> Pairs:
    """-p log P(a) - (1 - p) log P(b) with P(a) = sigmoid(difference). A preference of 0.5 pulls the scores together."""
    return -preference * F.logsigmoid(difference - margin) - (1 - preference) * F.logsigmoid(-difference - margin)


def rao_kupper(difference: Pairs, preference: Pairs, margin: Pairs | float, width: Float[Tensor, ""] | float) -> Pairs:
    """Rao and Kupper's model of ties: P(a) = sigmoid(difference - width), P(b) = sigmoid(-difference - width), and the
    rest is the tie, P = P(a) P(b) (exp(2 width) - 1). `width` > 0; a width of 0 knows no ties."""
    better, tie, worse = _shares(preference)
    width = torch.as_tensor(width, dtype=difference.dtype)
    wins, losses = F.logsigmoid(difference - margin - width), F.logsigmoid(-difference - margin - width)
    of_tie = F.logsigmoid(difference - width) + F.logsigmoid(-difference - width) + torch.log(torch.expm1(2 * width))
    return -better * wins - worse * losses - torch.where(tie > 0, tie * of_tie, torch.zeros_like(tie))


def davidson(difference: Pairs, preference: Pairs, margin: Pairs | float, width: Float[Tensor, ""] | float) -> Pairs:
    """Davidson's model of ties: a, b and the tie are as probable as exp(difference / 2), exp(-difference / 2) and
    `width`. `width` >= 0 is the ratio of ties to either outcome for equal images; a width of 0 knows no ties."""
    better, tie, worse = _shares(preference)
    log_width = torch.as_tensor(width, dtype=difference.dtype).log().expand_as(difference)

    def log_of(chosen: Pairs, shift: Pairs) -> Pairs:
        return chosen - torch.logsumexp(torch.stack([shift / 2, -shift / 2, log_width]), 0)

    wins = log_of((difference - margin) / 2, difference - margin)
    losses = log_of((-difference - margin) / 2, difference + margin)
    of_tie = log_of(log_width, difference)
    return -better * wins - worse * losses - torch.where(tie > 0, tie * of_tie, torch.zeros_like(tie))


def thurstone(
    difference: Pairs, preference: Pairs, margin: Pairs | float, spread_a: Pairs | float, spread_b: Pairs | float
) -> Pairs:
    """Thurstone's model with a spread for each image, as in HPSv3 (arXiv 2508.03789): P(a) = Phi(difference /
    sqrt(spread_a^2 + spread_b^2)), Phi the normal distribution."""
    scale = (torch.as_tensor(spread_a) ** 2 + torch.as_tensor(spread_b) ** 2).sqrt()
    wins = torch.special.log_ndtr((difference - margin) / scale)
    losses = torch.special.log_ndtr((-difference - margin) / scale)
    return -preference * wins - (1 - preference) * losses


def weighted_mean(losses: Pairs, weights: Pairs) -> Float[Tensor, ""]:
    """The mean of the losses with a positive weight; 0 without any. Others change nothing, not even if they are NaN."""
    counted = torch.where(weights > 0, losses * weights, torch.zeros_like(losses))
    return counted.sum() / weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)


def summed(
    loss: "Loss",
    a: Float[Tensor, "N K O"],
    b: Float[Tensor, "N K O"],
    preference: Pairs,
    margin: Pairs,
    weights: Float[Tensor, "K N"],
    log_width: Float[Tensor, "K"],
) -> Float[Tensor, ""]:
    """The sum of the mean losses of K components, each over the pairs that it has a weight for."""
    total = a.new_zeros(())
    for k, of_pairs in enumerate(weights):
        total = total + weighted_mean(loss(a[:, k], b[:, k], preference, margin, log_width[k]), of_pairs)
    return total


def _shares(preference: Pairs) -> tuple[Pairs, Pairs, Pairs]:
    """The shares of a, tie and b: a preference between 0.5 and 1 is part tie and part a."""
    lean = 2 * preference - 1
    return lean.clamp(min=0), 1 - lean.abs(), (-lean).clamp(min=0)


@dataclass(frozen=True)
class Loss:
    """A loss that a reward model can be trained by. `outputs`: numbers that the model gives for an image, the score
    and, with 2, the logarithm of its spread. `width`: whether a tie width is learnt."""

    outputs: int
    width: bool
    of: Callable[..., Pairs]

    def __call__(
        self,
        a: Float[Tensor, "N K"],
        b: Float[Tensor, "N K"],
        preference: Pairs,
        margin: Pairs,
        log_width: Float[Tensor, ""] | float = 0.0,
    ) -> Pairs:
        """The loss of each pair, from the outputs of both images and the logarithm of the tie width."""
        difference = a[:, 0] - b[:, 0]
        if self.outputs == 2:
            return self.of(difference, preference, margin, a[:, 1].exp(), b[:, 1].exp())
        if self.width:
            return self.of(difference, preference, margin, torch.as_tensor(log_width).exp())
        return self.of(difference, preference, margin)

    def log_odds(self, a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Pairs:
        """The logarithm of P(a is better) / P(b is better), if one is."""
        difference = a[:, 0] - b[:, 0]
        if self.outputs == 2:
            lead = difference / (a[:, 1].exp() ** 2 + b[:, 1].exp() ** 2).sqrt()
            return torch.special.log_ndtr(lead) - torch.special.log_ndtr(-lead)
        return difference

    def preferred(self, a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Pairs:
        """The probability that a is better than b, if one is."""
        return self.log_odds(a, b).sigmoid()


LOSSES: dict[str, Loss] = {
    "bradley_terry": Loss(1, False, bradley_terry),
    "rao_kupper": Loss(1, True, rao_kupper),
    "davidson": Loss(1, True, davidson),
    "thurstone": Loss(2, False, thurstone),
}
