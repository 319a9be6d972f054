"""Guidance at sampling by the gradient of a scorer.

A velocity v at time t predicts the clean latent `x0 = x - t v`. Toward a reward R, the prediction moves along the
gradient of the reward of its image, and the velocity points at the moved latent:

    g = grad R(decode(x0)),   x0' = x0 + push ||x0|| g / ||g||,   v' = (x - x0') / t = v - (x0' - x0) / t

`||.||` is over all elements of one latent, so `push` is the length of the move in units of the latent's root mean
square, whatever the scale of the reward, and images do not depend on their batch. An Euler step from t to s makes the
share `1 - s / t` of the move, the last step all of it. The gradient passes the decoder and the scorer, not the network
that gives v: a step takes one decode and one forward and backward of the scorer more than a step of the ODE.

R is a weighted sum of components of scorers; its gradient is taken as a whole, so that one move follows all of them.

After the guidance of VLM3D, whose reward is the sum of the log-odds of a yes of a vision-language model to questions of
content and arrangement (`vlm_yes_no`). The length of the move is ours: a gradient's size says nothing about how far to
go.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import BadInput, Failed, non_finite
from mmalign.flow.sample import chunks
from mmalign.policy.protocol import DecodesInGraph, Policy
from mmalign.types import Latents, Velocity
from reward_models import Prompt, RewardModel
from reward_models.registry import differentiable


def moved(x0: Latents, gradient: Latents, push: float) -> Latents:
    """Each latent, moved along its gradient by `push` times its length; unchanged where the gradient is 0."""
    lengths, sizes = (torch.linalg.vector_norm(value, dim=(1, 2, 3), keepdim=True) for value in (x0, gradient))
    return torch.where(sizes > 0, x0 + push * lengths * gradient / sizes, x0)


@dataclass(frozen=True)
class Term:
    """A `component` of a `scorer`, its first for "", with its `weight` in a sum. `name` of the scorer stands in errors.
    BadInput for a component that the scorer does not give, a weight that is 0 or not finite, and a scorer without
    gradients."""

    scorer: RewardModel
    component: str = ""
    weight: float = 1.0
    name: str = ""

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.scorer.card.scorer)
        object.__setattr__(self, "component", self.component or self.scorer.names[0])
        if self.component not in self.scorer.names:
            raise BadInput(f"toward {self.name}.{self.component}: that scorer gives {', '.join(self.scorer.names)}")
        if not 0 < abs(self.weight) < inf:
            raise BadInput(
                f"toward {self.name}.{self.component}: weight {self.weight}: a number other than 0 is needed"
            )
        try:
            object.__setattr__(self, "scorer", differentiable(self.scorer))
        except ValueError as error:
            raise BadInput(f"toward {self.name}: {error}") from None

    def __str__(self) -> str:
        factor = "" if self.weight == 1 else f"{self.weight:g} "
        return f"{factor}{self.name}.{self.component} {self.scorer.card.version}"


@dataclass(frozen=True)
class Toward:
    """Guidance toward the sum of `terms`, at the steps from time `since` on: 1 is noise, 0 the image. With `push` 0 or
    `since` 0 there is none. `batch`: most latents of one backward pass; it bounds memory and changes no result.
    BadInput for numbers out of range, for no term, and for one that is there twice."""

    terms: tuple[Term, ...]
    push: float = 0.05
    since: float = 0.9
    batch: int = 8

    def __post_init__(self):
        if not self.terms:
            raise BadInput("toward: a reward is needed, scorer.component")
        if len({(term.name, term.component) for term in self.terms}) < len(self.terms):
            raise BadInput(f"toward {self.name}: a component is there twice")
        if not 0 <= self.push < inf:
            raise BadInput(f"push {self.push}: a number from 0 is needed, in units of the latent's root mean square")
        if not 0 <= self.since <= 1:
            raise BadInput(f"from {self.since}: a time from 1 (noise) to 0 (image, no guidance) is needed")
        if self.batch < 1:
            raise BadInput(f"batch {self.batch}: at least one latent is needed")

    @property
    def name(self) -> str:
        """Its components."""
        return " + ".join(f"{term.name}.{term.component}" for term in self.terms)

    def __str__(self) -> str:
        return f"{' + '.join(map(str, self.terms))}, push {self.push:g}, from {self.since:g}"

    def guided(self, policy: Policy, velocity: Velocity, prompts: Sequence[Prompt]) -> Velocity:
        """`velocity` of the policy, guided; its `index` numbers the `prompts`. BadInput where the policy has no
        gradients of its images. The velocity raises Failed where the scorer cannot score, and NonFinite."""
        if self.push == 0 or self.since == 0:
            return velocity
        if not isinstance(policy, DecodesInGraph):
            raise BadInput(f"toward {self.name}: a {type(policy).__name__} does not decode with gradients")

        def toward(x, t, cond, index):
            v = velocity(x, t, cond, index)
            late = (t <= self.since).nonzero()[:, 0]
            if not len(late):
                return v
            v, time = v.float().clone(), t[late, None, None, None]
            x0 = x[late].float() - time * v[late]
            requests = [prompts[i] for i in index[late].tolist()]
            parts = [self.gradient(policy, x0[rows], requests[rows]) for rows in chunks(len(late), self.batch)]
            v[late] -= (moved(x0, torch.cat(parts), self.push) - x0) / time
            return v

        return toward

    def gradient(self, policy: DecodesInGraph, x0: Latents, prompts: Sequence[Prompt]) -> Latents:
        """The gradient of the sum at clean latents, one row a prompt. Each scorer sees the images once."""
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            images, score, known = policy.decode_in_graph(x0), 0.0, {}
            for term in self.terms:
                if term.name not in known:
                    known[term.name] = self._scores(term, images, prompts)
                score = score + term.weight * known[term.name][:, term.scorer.names.index(term.component)].to(x0.device)
            [gradient] = torch.autograd.grad(score.sum(), x0, allow_unused=True)
        gradient = torch.zeros_like(x0) if gradient is None else gradient
        wrong = ~(score.detach().to(x0.device).isfinite() & gradient.isfinite().flatten(1).all(1))
        if bool(wrong.any()):
            raise non_finite(f"{self.name} or its gradient", prompts, wrong.nonzero()[:, 0].tolist())
        return gradient

    @staticmethod
    def _scores(term: Term, images: Tensor, prompts: Sequence[Prompt]) -> Float[Tensor, "M K"]:
        try:
            return term.scorer.in_graph(images, prompts)
        except ValueError as error:
            raise Failed(f"toward {term.name}: {' '.join(str(error).split())}") from error
