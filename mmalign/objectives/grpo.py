"""Policy gradient on the stochastic steps of trajectories (Flow-GRPO, arXiv 2505.05470), with any credit and loss."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from mmalign.latents import Columns
from mmalign.objectives.objective import Objective, Rollout, Run, TrainBatch
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.types import Judgement, Plan


@dataclass(frozen=True)
class Grpo(Objective):
    """`beta`: weight of the KL divergence to the model without adapter. `weighting` "noise" weighs steps by their
    standard deviation (TempFlow-GRPO). `ratio`: one ratio per "cell" of the credit grid, or per "credit", for all cells
    of an image with the same advantage."""

    beta: Annotated[float, Ge(0)] = 0.0
    weighting: Literal["none", "noise"] = "none"
    ratio: Literal["cell", "credit"] = "cell"
    type = "grpo"
    uses = frozenset({"credit", "loss", "advantage", "mask", "max_kl", "region"})
    stochastic, siblings, even, reuses = True, 2, True, True

    @property
    def reference(self) -> bool:
        return self.beta > 0

    @property
    def fewer(self) -> str | None:
        return None if self.beta else "replay_forwards: fewer where an advantage is 0 (beta: 0)"

    def rows(self, plan: Plan, seeds: int) -> int:
        return seeds * plan.cost[2]

    def states(self, plan: Plan, seeds: int) -> int:
        return seeds * plan.cost[3]

    def reads(self, plan: Plan) -> Columns:
        return Columns.around(plan.stochastic)

    def batch(
        self, run: Run, rollout: Rollout, judged: Judgement, advantage: Float[Tensor, "N T a b"], iteration: int
    ) -> TrainBatch:
        """Every distinct stochastic step. Those with advantage 0 need no forward, unless `beta` pulls."""
        c, paths = run.config, rollout.paths
        batch = transitions(
            paths, advantage, self.weighting, lambda std: run.ranks.gather(std, "noise of the steps").mean(),
            rollout.forwards,
        )  # fmt: skip
        if c.mask is not None:
            batch = run.fits["batch"](lambda rows: c.mask.masked(run.policy, rollout.cond, batch, rows))
        replay = Surrogate(
            run.policy, rollout.cond, paths.kernel, paths.t_max, c.loss, self.beta, self.ratio, self.measures(c),
            None if c.extend is None else c.extend.off_loss,
        )  # fmt: skip
        needed = None if self.beta else batch.advantage.abs().amax((1, 2)) > 0
        return TrainBatch(batch, replay, needed, rollout.forwards is not None)
