"""Rewards of steps from an adapter that learns from outcomes (`mmalign.credit.more.implicit`): its training and use.

The gradient of a loss of whole trajectories is that of their steps, each weighted by the slope of the loss at the
present scores. So steps are replayed one by one, in micro-batches of any size, as those of the policy are.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.config.schema import Config
from mmalign.credit.groups import Credit
from mmalign.credit.more.density import of_ends
from mmalign.errors import BadInput, non_finite
from mmalign.flow.kernels import log_ratio
from mmalign.flow.sample import chunks, distinct
from mmalign.learn.loss import pool
from mmalign.learn.update import update
from mmalign.objectives.objective import Rollout, Run
from mmalign.objectives.replay import transitions
from mmalign.policy.protocol import HoldsAdapters, Trainable
from mmalign.seeds import seed_of
from mmalign.training import finite
from mmalign.training.learner import optimizer_class
from mmalign.types import Judgement, Rows, Trajectories, Transitions

NAME = "reward"  # of the adapter on the network, and of its files in a checkpoint


@dataclass(frozen=True)
class Steps:
    """The distinct stochastic steps of trajectories, with the mean of the model without adapter in `rows.mean`; and of
    each step of a trajectory, `trajectory [S]` and `column [S]`, the row of `rows` that it is."""

    rows: Transitions
    trajectory: Int[Tensor, "S"]
    column: Int[Tensor, "S"]
    row: Int[Tensor, "S"]

    def spread(self, values: Float[Tensor, "M a b"], paths: Trajectories) -> Float[Tensor, "N T a b"]:
        """The values of the rows at the steps of all trajectories, 0 at a deterministic one."""
        table = values.new_zeros(*paths.tree.std.shape, *values.shape[1:])
        table[self.trajectory, self.column] = values[self.row]
        return table


@dataclass(frozen=True)
class StepRewards:
    """The `credit` that says what the adapter learns, and the adapter's optimiser."""

    credit: Credit
    optimizer: torch.optim.Optimizer

    def learn(self, run: Run, rollout: Rollout, steps: Steps, judged: Judgement, iteration: int) -> dict[str, float]:
        """Train the adapter on the outcomes of all ranks' trajectories; `rollout` and `judged` are this rank's. Of
        rewards of finished images alone, where there are such, as its credit measures them."""
        c, paths, ranks, judged = run.config, rollout.paths, run.ranks, of_ends(judged)
        local = ranks.local_rows(steps.rows.index, "steps to learn rewards from")
        for number in range(self.credit.updates):
            score = self._process(run, rollout, steps).sum(1).mean((1, 2)).requires_grad_()
            loss = self.credit.loss(score, paths.tree, judged)
            [slope] = torch.autograd.grad(loss.sum(), score)
            weight = torch.zeros(len(steps.rows)).index_add(0, steps.row, slope[steps.trajectory])
            rows = replace(steps.rows, weight=weight.to(steps.rows.weight))
            with run.policy.acting(NAME):
                update(
                    run.policy.parameters(NAME), self.optimizer, rows, partial(self._replay, run, rollout),
                    needed=rows.weight != 0, epochs=1, minibatches=1, micro_batch=run.learner.micro_batch,
                    max_grad_norm=c.max_grad_norm, local=local, peers=ranks,
                    generator=torch.Generator().manual_seed(seed_of(c.seed, NAME, iteration, number)),
                    may_step=partial(run.learner.skips.may_step, iteration, rollout.prompts),
                )  # fmt: skip
        self.optimizer.zero_grad()
        label = self.credit.outcomes(paths.tree, judged)
        agrees = torch.where(label == 0.5, torch.nan, ((score.detach() > 0) == (label > 0.5)).float())
        agrees = torch.where(label.isnan(), torch.nan, agrees)
        known = ~agrees.isnan()
        sums = {"loss": float(loss.detach().sum()), "agrees": float(agrees[known].sum()), "known": int(known.sum())}
        sums = ranks.all_reduce_sum(sums | {"all": len(loss)}, "statistics of the rewards of steps")
        return {
            "process/loss": sums["loss"] / sums["all"],
            "process/agrees": sums["agrees"] / sums["known"] if sums["known"] else float("nan"),
        }

    def of(self, run: Run, rollout: Rollout, steps: Steps) -> Float[Tensor, "n T a b"]:
        """The rewards of the steps of this rank's trajectories, on the CPU, 0 at deterministic ones. Raises
        NonFinite."""
        values = self._process(run, rollout, steps)
        good = values.isfinite().flatten(1).all(1)
        if not bool(good.all()):
            raise non_finite("rewards of steps", rollout.prompts, rollout.paths.tree.prompt[~good].tolist())
        return values

    def __call__(
        self, run: Run, rollout: Rollout, local: Judgement, judged: Judgement, iteration: int
    ) -> tuple[Judgement, dict[str, float]]:
        """Train, then the judgement of all ranks with the rewards of all steps, and statistics."""
        steps = self.steps(run, rollout)
        statistics = self.learn(run, rollout, steps, local, iteration)
        process = finite.on_all_ranks(run.ranks, partial(self.of, run, rollout, steps))
        process = run.ranks.in_order(process, rollout.paths.tree.prompt, "rewards of steps")
        return replace(judged, process=process), statistics

    def steps(self, run: Run, rollout: Rollout) -> Steps:
        """The steps of this rank's trajectories, with the means of the model without adapter."""
        tree = rollout.paths.tree
        trajectory, column = (tree.std > 0).nonzero(as_tuple=True)
        inverse, first = distinct(torch.stack([column, tree.node[trajectory, column + 1]], 1))
        rows = transitions(rollout.paths, torch.zeros(*tree.std.shape, 1, 1))  # in the order of `first`
        with run.policy.reference():
            base = self._means(run, rollout, rows)
        return Steps(replace(rows, mean=base), trajectory, column, first.argsort().argsort()[inverse])

    @torch.no_grad()
    def _means(self, run: Run, rollout: Rollout, rows: Transitions) -> Float[Tensor, "M C h w"]:
        def work(size: int) -> Tensor:
            parts = [_step(run.policy, rollout, rows[part])[0] for part in chunks(len(rows), size)]
            return torch.cat(parts) if parts else rows.mean

        return run.fits["batch"](work)

    @torch.no_grad()
    def _process(self, run: Run, rollout: Rollout, steps: Steps) -> Float[Tensor, "N T a b"]:
        def work(size: int) -> Tensor:
            parts = [self._rewards(run, rollout, steps.rows[part]) for part in chunks(len(steps.rows), size)]
            return torch.cat(parts) if parts else torch.zeros(0, *(self.credit.grid or (1, 1)))

        with run.policy.acting(NAME):
            values = run.fits["batch"](work)
        return steps.spread(values.cpu(), rollout.paths)

    def _rewards(self, run: Run, rollout: Rollout, rows: Transitions) -> Float[Tensor, "M a b"]:
        mean, std = _step(run.policy, rollout, rows)
        return self.credit.scale * pool(log_ratio(rows.y, mean, rows.mean, std), self.credit.grid or (1, 1))

    def _replay(self, run: Run, rollout: Rollout, rows: Rows) -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
        loss = rows.weight * self._rewards(run, rollout, rows).mean((1, 2))
        return loss, {"loss": loss.detach()}


def _step(policy: Trainable, rollout: Rollout, rows: Transitions) -> tuple[Tensor, Tensor]:
    v = policy.velocity(rows.x, rows.t, rollout.cond, rows.index).float()
    return rollout.paths.kernel.step(rows.x, v, rows.t, rows.s, rows.noise, rollout.paths.t_max)


def judged(
    run: Run, rollout: Rollout, local: Judgement, judgement: Judgement, iteration: int
) -> tuple[Judgement, dict[str, float]]:
    """The judgement of all ranks with the rewards of steps, and a row for the metrics; `local` is this rank's part."""
    if run.step_rewards is None:
        return judgement, {}
    return run.step_rewards(run, rollout, local, judgement, iteration)


def opened(c: Config, policy: Trainable) -> StepRewards | None:
    """The adapter of a config's credit, put on the network of its policy; None where the credit has none. BadInput
    where the policy holds one adapter alone, or the grid does not suit it."""
    learner = c.credit and c.credit.learner
    if learner is None:
        return None
    if not isinstance(policy, HoldsAdapters):
        raise BadInput(f"credit: model {c.model!r} holds one adapter alone, and this credit trains another (acting)")
    (a, b), (high, wide) = learner.grid or (1, 1), policy.latent_shape[1:]
    if high % a or wide % b:
        raise BadInput(f"credit: grid: {a}x{b} does not divide the latent's {high}x{wide} positions")
    policy.attach_lora(c.lora_rank, c.lora_alpha, c.lora_targets, seed_of(c.seed, "adapter", NAME), NAME)
    optimizer = optimizer_class(c)(policy.parameters(NAME), lr=learner.rate)
    return StepRewards(learner, optimizer)
