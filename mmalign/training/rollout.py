"""Rollout: sample trajectories for the prompts, decode the images, score them.

With `rollout_parts` the images of some prompts are scored in a thread while the next ones are sampled, which pays where
judges are slow and elsewhere (a server). A prompt's images stay together, and rewards are combined and credited over
the global batch, so that nothing changes but time, and the rounding of forwards over other rows.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.credit.gain import gains
from mmalign.credit.more.density import of_states
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.rewards.judge import Scored, joined, score, unscored
from mmalign.seeds import gaussian, seed_of
from mmalign.selection.scouts import chosen
from mmalign.training import drift, finite, planning
from mmalign.training.session import Session
from mmalign.types import Judgement, Plan, Trajectories, Tree
from reward_models import Prompt

AHEAD = 2  # parts in flight without scores, at most: sampling blocks when scoring falls behind


@dataclass(frozen=True)
class Rollout:
    """This rank's prompts, their conditioning, trajectories, finished images (on the CPU) and their raw scores; the
    scouts that chose their starting noises, if any; and the log-ratios of `Judgement`, if the credit needs them."""

    prompts: list[Prompt]
    cond: Any
    paths: Trajectories
    images: Float[Tensor, "E 3 H W"]
    scored: Scored
    scouts: "Scouted | None" = None
    log_ratio: Float[Tensor, "N T"] | None = None

    @property
    def tree(self) -> Tree:
        return self.paths.tree


@dataclass(frozen=True)
class Scouted:
    """The starting noises that scouts have chosen, by number; the reward of each trajectory's scout, NaN where it has
    none; how many scouts could not be scored."""

    members: Int[Tensor, "P seeds"]
    reward: Float[Tensor, "N"]
    failed: int


def sample_and_score(run: Session, prompts: list[Prompt], iteration: int) -> Rollout:
    """Sample the trajectories of all seeds of the prompts, or of those that scouts choose, and score their images by
    the trained rewards. Raises NonFinite where latents, images or scores are not finite, once all is sampled: other
    ranks may be sampling too."""
    c = run.config
    with run.clock.of("rollout"):
        cond = run.policy.encode([p.text for p in prompts])
    if c.scouts is None:
        return rolled_out(run, prompts, cond, iteration, torch.arange(c.seeds).repeat(len(prompts), 1))
    every = torch.arange(c.scouts.images(c.seeds)).repeat(len(prompts), 1)
    scouts = rolled_out(run, prompts, cond, iteration, every, plans.ode(run.policy.times(c.scouts.steps)))
    verdict = judged(run, scouts, iteration)
    reward = verdict.reward[:, -1]
    members = chosen(reward, len(prompts), c.seeds)
    rollout = rolled_out(run, prompts, cond, iteration, members)
    of_start = reward.view(every.shape).gather(1, members).flatten()
    scouted = Scouted(members, of_start[rollout.tree.member], len(unscored(scouts.tree, verdict)))
    return replace(rollout, scouts=scouted)


def rolled_out(
    run: Session,
    prompts: list[Prompt],
    cond: Any,
    iteration: int,
    members: Int[Tensor, "P starts"],
    plan: Plan | None = None,
) -> Rollout:
    """The trajectories of the starting noises with these numbers, by `plan` (None: the run's), and their scores."""
    c, clock = run.config, run.clock
    timed_score = clock.timed("reward", score)

    def check_and_score(paths: Trajectories, images: Tensor) -> Scored:
        finite.check_trajectories(paths, images, prompts)
        owners, finished = [prompts[i] for i in paths.tree.owner.tolist()], paths.tree.final[:, -1].unique()
        return timed_score(images, owners, run.rewards.trained, c.late, finished)

    sampled, scores = [], []
    parts = torch.arange(len(prompts)).tensor_split(min(c.rollout_parts, len(prompts)))
    pool = ThreadPoolExecutor(1, thread_name_prefix="judge")
    begin = pool.submit if len(parts) > 1 else _now
    try:
        for part in parts:
            wait(scores[: max(0, len(scores) + 1 - AHEAD)])
            with clock.of("rollout"):
                paths = trajectories(run, prompts, cond, iteration, members, plan, part.tolist())
            sampled.append((paths, decoded(run, paths)))
            scores.append(begin(check_and_score, *sampled[-1]))
        scored = joined([future.result() for future in scores])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    paths, images = zip(*sampled, strict=True)
    rollout = Rollout(prompts, cond, stacked(paths), torch.cat(images), scored)
    if c.credit is None or not c.credit.drifts or plan is not None:
        return rollout
    with clock.of("rollout"):
        from_reference = partial(drift.from_reference, run.policy, rollout.paths, cond)
        return replace(rollout, log_ratio=run.fits["batch"](from_reference))


def _now(work: Callable[..., Scored], *args: Any) -> Future:
    done = Future()
    done.set_result(work(*args))
    return done


def trajectories(
    run: Session,
    prompts: Sequence[Prompt],
    cond: Any,
    iteration: int,
    members: Int[Tensor, "P starts"],
    plan: Plan | None,
    rows: Sequence[int],
) -> Trajectories:
    """The trajectories of the `members` of the prompts in these `rows`, which are those of `cond`."""
    c, policy = run.config, run.policy
    starts = [(p, m) for p in rows for m in members[p].tolist()]
    position = {p: planning.position_of(c, iteration, prompts[p].id) for p in rows}
    plan_at = {at: plan or planning.plan_for(c, run.times, at) for at in {*position.values()}}

    def noise(start: int, *rest: Any) -> Tensor:
        p, member = starts[start]
        return gaussian(policy.latent_shape, seed_of(c.seed, "rollout", iteration, prompts[p].id, member, *rest))

    index = torch.tensor([p for p, _ in starts], device=policy.device)
    start = torch.stack([noise(i) for i in range(len(starts))]).to(policy.device)
    plans = [plan_at[position[p]] for p, _ in starts]
    observed = nullcontext() if run.values is None or plan is not None else run.values.head.observed(policy)
    with observed as features:
        return run.fits["batch"](
            lambda size: sample(policy.velocity, start, cond, index, plans, noise, size, features=features)
        )


def stacked(parts: Sequence[Trajectories]) -> Trajectories:
    """The trajectories of several parts, one after the other, with finished images, nodes and members numbered
    through."""
    if len(parts) == 1:
        return parts[0]
    trees = [part.tree for part in parts]
    finals = [0, *accumulate(len(tree.owner) for tree in trees)]
    members = [0, *accumulate(int(tree.member.max()) + 1 for tree in trees)]
    moved = [
        replace(
            tree,
            node=tree.node + before,
            member=tree.member + starts,
            final=torch.where(tree.final < 0, -1, tree.final + before),
        )
        for tree, before, starts in zip(trees, finals, members, strict=False)
    ]
    tree = Tree(**{field.name: torch.cat([getattr(each, field.name) for each in moved]) for field in fields(Tree)})
    names = ("x", "mean", "finals", *(() if parts[0].features is None else ("features",)))
    latents = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], tree=tree, **latents)


def decoded(run: Session, paths: Trajectories) -> Float[Tensor, "E 3 H W"]:
    """The images of the finished latents, on the CPU."""

    def work(size: int) -> Tensor:
        return torch.cat([run.policy.decode(latents).cpu() for latents in paths.finals.split(size)])

    with run.clock.of("decode"):
        return run.fits["decode_batch"](work)


def judged(run: Session, rollout: Rollout, iteration: int) -> Judgement:
    """Raw scores as rewards, by the weights of the iteration. Raises NonFinite where one is not finite."""
    result = run.rewards.judge(rollout.paths, rollout.scored, rollout.images, iteration, rollout.prompts)
    finite.check_rewards(result, rollout.tree, rollout.prompts)
    return replace(result, log_ratio=rollout.log_ratio)


def step_gains(run: Session, levels: Float[Tensor, "T"], number: int) -> Float[Tensor, "N T"]:
    """Gains of the trajectories of one batch of prompts with this noise, NaN at deterministic steps."""
    kernel = replace(run.config.kernel, noise=tuple(levels.tolist()))
    noisy = replace(run, config=run.config.model_copy(update={"kernel": kernel, "scouts": None}))
    rollout = sample_and_score(noisy, run.prompts(number), number)
    gain = gains(rollout.tree, of_states(judged(run, rollout, 0)))
    return torch.where(rollout.tree.std > 0, gain, torch.nan)[:, : run.config.steps]
