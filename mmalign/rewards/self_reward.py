"""A reward without a reward model: what the base model makes of an image that is noised again.

The image's latent x0 is noised to `x_t = (1 - t) x0 + t e`, and the model without its adapter predicts the velocity
`e - x0`, with the prompt and without it; E are the mean squared errors.

- `self.gap`: `(E_empty - E_prompt) / E_empty`, the share of the error that the prompt removes: 0 where the prompt says
  nothing about the image (after SAR's relative gap of likelihoods);
- `self.recovery`: `-log E_prompt`, how well the model recovers the noise that was put in (after ARC, arXiv 2603.00918).

Both are means over some times and noises, which depend on the prompt and so are the same for its images. An image takes
`2 x times x noises` forwards, for both components together. Left out: ARC's choice of times.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.policy.protocol import Contrasting, EncodesImages
from mmalign.seeds import gaussian, seed_of
from reward_models import Card, Prompt, Scores

NAME = "self"


class SelfReward:
    """The scorer `self` of a run. `times` in (0, 1), `noises` of each; `policy` is the run's, once it is loaded."""

    names = ("gap", "recovery")

    def __init__(self, times: Sequence[float] = (0.85, 0.7, 0.5), noises: int = 2, seed: int = 0, batch: int = 32):
        if not times or not all(isinstance(t, float) and 0 < t < 1 for t in times):
            raise ValueError(f"scorers: self: times: {times}; some between 0 and 1 are needed, such as [0.5]")
        for name, number, least in (("noises", noises, 1), ("seed", seed, 0), ("batch", batch, 1)):
            if not isinstance(number, int) or number < least:
                raise ValueError(f"scorers: self: {name}: {number!r}; an integer from {least} is needed")
        self.times, self.noises, self.seed, self.batch = tuple(times), noises, seed, batch
        self.policy: Any = None

    @property
    def card(self) -> Card:
        """Its version changes with the model."""
        settings = {"times": self.times, "noises": self.noises, "seed": self.seed}
        weights = "" if self.policy is None else self.policy.fingerprint()
        return Card(NAME, model="the model in training, without its adapter", checkpoint=weights, settings=settings)

    @property
    def forwards(self) -> int:
        """Network forwards of an image."""
        return 2 * len(self.times) * self.noises

    def bind(self, policy: Any) -> None:
        """Score by this policy. ValueError for one that cannot."""
        for ability, what in ((Contrasting, "velocities"), (EncodesImages, "encode_images")):
            if not isinstance(policy, ability):
                raise ValueError(f"rewards: self: a {type(policy).__name__} cannot do that: it has no {what}")
        self.policy = policy

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "N 3 H W"], prompts: Sequence[Prompt]) -> Scores:
        with self.policy.reference():
            parts = [
                self._scores(images[i : i + self.batch], prompts[i : i + self.batch])
                for i in range(0, len(images), self.batch)
            ]
        return Scores(self.names, torch.cat(parts))

    def _scores(self, images: Float[Tensor, "M 3 H W"], prompts: Sequence[Prompt]) -> Float[Tensor, "M 2"]:
        policy, texts = self.policy, list(dict.fromkeys(p.text for p in prompts))
        x = policy.encode_images(images.to(policy.device)).float()
        index = torch.tensor([texts.index(p.text) for p in prompts], device=x.device)
        cond, scores = policy.encode(texts), torch.zeros(len(x), 2)
        for t in self.times:
            for number in range(self.noises):
                each = [gaussian(x.shape[1:], seed_of(self.seed, NAME, text, str(t), number)) for text in texts]
                noise = torch.stack(each).to(x)[index]
                rows = torch.full((len(x),), t, device=x.device)
                velocities = policy.velocities((1 - t) * x + t * noise, rows, cond, index)
                empty, wanted = ((v.float() - (noise - x)).square().mean((1, 2, 3)).cpu() for v in velocities)
                scores += torch.stack([(empty - wanted) / empty, -wanted.log()], 1)
        return scores / (len(self.times) * self.noises)


def opened(c: Any) -> dict[str, SelfReward]:
    """The scorer of a config, which is to be bound to its policy. ValueError for settings that it does not have."""
    if NAME not in c.judging or c.scorers.get(NAME, {}).get("scorer", NAME) != NAME:
        return {}
    try:
        return {NAME: SelfReward(**c.scorers.get(NAME, {}))}
    except TypeError:
        raise ValueError(f"scorers: self: {c.scorers[NAME]}; it has times, noises, seed, batch") from None


def forwards(c: Any, among: Sequence[str]) -> int:
    """Network forwards that the scorers of these names take for an image."""
    return sum(scorer.forwards for name, scorer in opened(c).items() if name in among)
