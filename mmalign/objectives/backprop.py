"""The gradient of a differentiable reward, through scorer, decoder and some steps of the sampler.

With x the latents that a way gives in a graph (`mmalign.objectives.ways`) and R the reward of their images,

    loss = mean over images of  -R  or  max(0, ceiling - R)  +  pull * mean (v - v_base)^2

where v are the velocities on the way and v_base those of the model without adapter at the same states. There are
neither advantages nor siblings: one image of a prompt is enough. DRaFT (arXiv 2309.17400), ReFL (arXiv 2304.05977) and
FlowBP (arXiv 2606.11075) differ in the way.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.objectives.objective import Objective, Rollout, Run, TrainBatch, joined, name_of
from mmalign.objectives.ways import WAYS, Picked, Sparse, Visited
from mmalign.policy.protocol import Trainable
from mmalign.seeds import seed_of
from mmalign.types import Judgement, Latents, Plan

Score = Callable[[Float[Tensor, "M 3 H W"], Int[Tensor, "M"]], Float[Tensor, "M"]]  # (images, prompt) -> reward


@dataclass(frozen=True)
class Backprop(Objective):
    """`way`: which steps carry the gradient. `ceiling`: images with this reward and more give none; null: all do.
    `pull`: weight of `mean (v - v_base)^2`. `recompute`: compute the decoder's activations again in the backward pass,
    image by image: less memory, more time."""

    way: Any = field(default=Sparse(), metadata={"one_of": WAYS})
    ceiling: float | None = None
    pull: Annotated[float, Ge(0)] = 0.1
    recompute: bool = False
    type = "backprop"
    uses: ClassVar[frozenset[str]] = frozenset()
    fewer = "replay_forwards, transitions, decodes: fewer where an image has no score"

    def check(self, c: Any) -> None:
        if not c.combine.linear:
            raise ValueError(f"combine: {name_of(c.combine)}: objective: {self.type} needs combine: sum")
        self.way.check(c.steps)

    @property
    def width(self) -> int:
        return self.way.width

    @property
    def decoded(self) -> int:
        return self.way.images

    def replayed(self, measured: bool) -> int:
        """Velocities with gradient; the pull takes those of the base too, and some again from fixed states."""
        return self.width + (self.width + self.way.again if self.pull else 0)

    def rows(self, plan: Plan, seeds: int) -> int:
        return seeds * plan.trained

    def stored(self, updates: int) -> int:
        """The picked states, the finished latent, and the noise of copies."""
        return self.width + 1 + self.way.copies

    def batch(
        self, run: Run, rollout: Rollout, judged: Judgement, advantage: Tensor | None, iteration: int
    ) -> TrainBatch:
        """A row for each trajectory with a reward. The steps and the noise of a prompt's rows depend on the prompt."""
        paths, tree = rollout.paths, rollout.paths.tree
        scored = ~judged.reward[:, -1].isnan()

        def rows(p: int) -> Picked:
            mine = (scored & (tree.prompt == p)).nonzero()[:, 0]
            seed = seed_of(run.config.seed, name_of(self), iteration, rollout.prompts[p].id)
            return self.way.picked(paths, mine, run.config.steps, torch.Generator().manual_seed(seed))

        score = run.rewards.in_graph(rollout.prompts, iteration)
        batch = joined([rows(p) for p in range(len(rollout.prompts))])
        return TrainBatch(batch, partial(self.replay, run.policy, rollout.cond, score))

    def replay(
        self, policy: Trainable, cond: Any, score: Score, rows: Picked
    ) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
        latents, visited = self.way.latents(lambda x, t, index: policy.velocity(x, t, cond, index).float(), rows)
        count = latents.shape[1]
        images = policy.decode_in_graph(latents.flatten(0, 1), self.recompute)
        reward = score(images, rows.index.repeat_interleave(count)).to(latents.device).unflatten(0, (-1, count))
        value, graded = gap(reward, self.ceiling)
        loss = value + 0 * latents.flatten(1).sum(1)  # a graph even where no reward looks at the image
        statistics = {"reward_in_graph": reward.detach().nanmean(1), "graded": graded.float().mean(1)}
        if self.pull:
            drift = pulled(policy, cond, rows.index, visited)
            loss = loss + self.pull * drift
            statistics["drift"] = drift.detach()
        return loss, statistics | {"loss": loss.detach()}


def gap(
    reward: Float[Tensor, "M images"], ceiling: float | None
) -> tuple[Float[Tensor, "M"], Bool[Tensor, "M images"]]:
    """The mean over a row's images of what reward they lack, and which of them have a gradient. One without a reward
    (NaN) counts as 0, without gradient."""
    known = ~reward.isnan()
    lacking = -reward if ceiling is None else (ceiling - reward).relu()
    graded = known if ceiling is None else known & (reward < ceiling)
    return torch.where(known, lacking, 0.0).mean(1), graded


def pulled(policy: Trainable, cond: Any, index: Int[Tensor, "M"], visited: Visited) -> Float[Tensor, "M"]:
    """`mean (v - v_base)^2` over elements and visited states. States are fixed: the pull holds velocities, and has no
    gradient through the steps that led to a state."""
    return torch.stack([_distance(policy, cond, index, *each) for each in visited]).mean(0)


def _distance(
    policy: Trainable, cond: Any, index: Int[Tensor, "M"], x: Latents, t: Float[Tensor, "M"], v: Latents
) -> Float[Tensor, "M"]:
    if x.requires_grad:
        x = x.detach()
        v = policy.velocity(x, t, cond, index).float()
    with torch.no_grad(), policy.reference():
        base = policy.velocity(x, t, cond, index).float()
    return ((v - base) ** 2).mean((1, 2, 3))
