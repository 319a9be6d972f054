"""An implicit reward model from judged images (implicit PRM, arXiv 2412.01981; PRIME, arXiv 2502.01456), for flows.

The adapter becomes a reward model. With e the error of flow matching at one noise and time, its reward of an image x is

    r(x) = scale mean_cells [ e_base(x) - e_adapter(x) ]       (above 0: the adapter explains the image better)

and its loss the cross-entropy of `sigmoid(r)` with the outcome of the image. The outcome has no place and the error
has: before the mean, r is a map, which says where an image is good or bad (`reward_map`). Noise and time are the same
in both errors, which removes most of their variance. The paper's ratio is of tokens; this counterpart is ours.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmalign.credit.more.implicit import ahead
from mmalign.flow.sample import chunks
from mmalign.objectives.flow_matching import Examples, error, examples, noise_like, times
from mmalign.objectives.objective import Draws, Finished, OnImages
from mmalign.policy.protocol import Trainable
from mmalign.types import Latents


@dataclass(frozen=True)
class Outcome(OnImages):
    """`draws`: noises and times of each image. `scale`: that of the reward. `label` "siblings": whether an image beats
    more images of its prompt than beat it, no row where neither; "reward": its reward, which counts within [0, 1]."""

    draws: Draws = 2
    scale: Annotated[float, Gt(0)] = 10.0
    label: Literal["siblings", "reward"] = "siblings"
    type = "outcome"
    uses = frozenset({"records"})
    reference = True
    fewer = "replay_forwards, transitions: fewer where an image has no score or no outcome"

    def examples(self, policy: Trainable, images: Finished, generator: torch.Generator) -> Examples:
        siblings = self.label == "siblings"
        label = ahead(images.reward, images.prompt) if siblings else images.reward.clamp(0, 1)
        known = (~label.isnan()).nonzero()[:, 0]
        weight = label[known, None, None]
        return examples(policy, images.x[known], images.prompt[known], weight, self.draws, generator)

    def replay(self, policy: Trainable, cond: Any, rows: Examples) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
        err = error(policy, rows.x, rows.noise, rows.t, cond, rows.index)
        with torch.no_grad(), policy.reference():
            base = error(policy, rows.x, rows.noise, rows.t, cond, rows.index)
        reward, label = self.scale * (base - err).mean((1, 2)), rows.weight[:, 0, 0]
        loss = F.binary_cross_entropy_with_logits(reward, label, reduction="none")
        agrees = ((reward.detach() > 0) == (label > 0.5)).float()
        return loss, {"loss": loss.detach(), "agrees": agrees, "error": err.detach().mean((1, 2))}


@torch.no_grad()
def reward_map(
    policy: Trainable,
    cond: Any,
    x: Latents,
    index: Int[Tensor, "M"],
    draws: int,
    generator: torch.Generator,
    scale: float = 10.0,
    batch: int = 128,
) -> Float[Tensor, "M h w"]:
    """The reward of each latent position of finished latents, by the policy's adapter: the mean over `draws` noises and
    times, the same for all rows. The value of a state is that of the clean latent that it predicts."""
    noise = noise_like(x[:1].expand(draws, *x.shape[1:]), generator)
    t = times(policy, draws, 1, generator)[0].to(x)
    total = torch.zeros(len(x), *x.shape[2:], device=x.device)
    for one, time in zip(noise, t, strict=True):
        for part in chunks(len(x), batch):
            rows = (x[part], one.expand_as(x[part]), time.expand(len(x[part])), cond, index[part])
            with policy.reference():
                base = error(policy, *rows)
            total[part] += scale * (base - error(policy, *rows)) / draws
    return total
