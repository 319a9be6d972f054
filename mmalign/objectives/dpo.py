"""Preferences between whole images (Diffusion-DPO, arXiv 2311.12908), for flow models.

With e the error of flow matching of the policy, and of a fixed one beside it, at the same noise and time for both,

    loss = -log sigmoid( -scale (D(x_w) - D(x_l)) ),   D(x) = e_policy - e_fixed

for the better image x_w and the worse x_l of a prompt: best with worst, second with second to last, and so on. Two
images of the same score give no pair.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmalign.flow.sample import chunks
from mmalign.objectives.flow_matching import error, noise_like, times
from mmalign.objectives.objective import AT_ONCE, Draws, Finished, Lag, OnImages, Run, TrainBatch
from mmalign.objectives.rgdpo import extremes
from mmalign.policy.protocol import Trainable
from mmalign.types import Plan, Rows


@dataclass(frozen=True)
class Pairs(Rows):
    """The better and the worse image of a pair, at one noise and time a row; `fixed` is the error of the fixed policy
    (None: not computed yet)."""

    x: Float[Tensor, "M 2 C h w"]
    noise: Float[Tensor, "M C h w"]
    t: Float[Tensor, "M"]
    index: Int[Tensor, "M"]
    step: Int[Tensor, "M"]
    fixed: Float[Tensor, "M 2"] | None = None


@dataclass(frozen=True)
class Dpo(OnImages):
    """`draws`: noises and times of each pair. `scale`: DPO's beta, times the number of latent elements. The fixed
    policy is the model without adapter. Pairs come from the rollout, or from the images of `records`."""

    draws: Draws = 2
    scale: Annotated[float, Gt(0)] = 10.0
    type = "dpo"
    uses = frozenset({"records"})
    siblings: ClassVar[int] = 2
    width: ClassVar[int] = 2
    fewer = "forwards, replay_forwards, transitions: fewer where two images have no score or the same"

    def rows(self, plan: Plan, seeds: int) -> int:
        return seeds * plan.trained // 2 * self.draws

    def prepared(self, updates: int) -> int:
        return 2

    def examples(self, policy: Trainable, images: Finished, generator: torch.Generator) -> Pairs:
        matches = extremes(images.prompt, images.reward)
        better, worse = images.reward[matches].unbind(1)
        matches = matches[better > worse]
        x = images.x[matches].repeat_interleave(self.draws, 0)
        index = images.prompt[matches[:, 0]].repeat_interleave(self.draws)
        noise = noise_like(x[:, 0], generator)
        t = times(policy, self.draws, len(matches), generator).flatten().to(noise)
        return Pairs(x, noise, t, index, torch.arange(self.draws, device=t.device).repeat(len(matches)))

    def batch_of(self, run: Run, cond: Any, rows: Pairs) -> TrainBatch:
        with run.policy.reference():
            fixed = run.fits["batch"](lambda size: self._fixed(run.policy, cond, rows, size))
        return super().batch_of(run, cond, replace(rows, fixed=fixed))

    @torch.no_grad()
    def _fixed(self, policy: Trainable, cond: Any, rows: Pairs, size: int) -> Float[Tensor, "M 2"]:
        fixed = [errors(policy, cond, rows[part]) for part in chunks(len(rows), max(1, size // 2))]
        return torch.cat(fixed) if fixed else torch.zeros(0, 2, device=rows.t.device)

    def replay(self, policy: Trainable, cond: Any, rows: Pairs) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
        err = errors(policy, cond, rows)
        ahead = ((err - rows.fixed) * err.new_tensor([-1.0, 1.0])).sum(1)
        value = -F.logsigmoid(self.scale * ahead)
        return value, {
            "loss": value.detach(), "agrees": (ahead.detach() > 0).float(), "error": err.detach().mean(1),
        }  # fmt: skip


@dataclass(frozen=True)
class OnlineDpo(Dpo):
    """DPO on the images of the rollout, against the policy that drew them: the one in training as it was before the
    update, or with `lag` one that follows it slowly."""

    lag: Lag = AT_ONCE
    type = "online_dpo"
    uses = frozenset()

    def batch_of(self, run: Run, cond: Any, rows: Pairs) -> TrainBatch:
        fixed = run.fits["batch"](lambda size: self._fixed(run.policy, cond, rows, size))
        return OnImages.batch_of(self, run, cond, replace(rows, fixed=fixed))


def errors(policy: Trainable, cond: Any, rows: Pairs) -> Float[Tensor, "M 2"]:
    """The error of flow matching of both images of each pair, mean over elements."""
    noise, t, index = (column.repeat_interleave(2, 0) for column in (rows.noise, rows.t, rows.index))
    return error(policy, rows.x.flatten(0, 1), noise, t, cond, index).mean((1, 2)).view(-1, 2)
