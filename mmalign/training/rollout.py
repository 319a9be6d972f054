"""Rollout: sample trajectories for the prompts, decode the images, score them.

With `rollout_parts` the images of some prompts are scored in a thread while the next ones are sampled, which pays where
judges are slow and elsewhere (a server). A prompt's images stay together, and rewards are combined and credited over
the global batch, so that nothing changes but time, and the rounding of forwards over other rows.

Memory grows with the number of images by what the update reads alone: images are decoded, scored and released, those of
some prompts at a time; latents are written where they stay.
"""

from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.credit.gain import gains
from mmalign.credit.more.density import of_states
from mmalign.evaluation.evaluate import deviation
from mmalign.flow import plan as plans
from mmalign.flow.sample import chunks, sample
from mmalign.latents import Columns, Room
from mmalign.policy.protocol import fused
from mmalign.rewards.judge import Scored, beginning, joined, score, unscored
from mmalign.seeds import gaussian, seed_of
from mmalign.selection.scouts import chosen
from mmalign.training import drift, finite, planning
from mmalign.training.reuse import Reuse
from mmalign.training.session import Session
from mmalign.training.values import Head
from mmalign.types import Judgement, Plan, Trajectories, Tree
from reward_models import Prompt

AHEAD = 2  # batches of images in flight without scores, at most: sampling blocks when scoring falls behind
DECODED = 2**30  # bytes of the images that are decoded and scored at once, at most, unless one prompt has more


@dataclass(frozen=True)
class Rollout:
    """This rank's prompts, their conditioning, trajectories and the raw scores of the finished images; how far each
    trajectory's image is from its siblings' mean (`mmalign.evaluation.evaluate.deviation`); the images themselves, on
    the CPU, if they are kept; the scouts that chose the starting noises, if any; and the log-ratios of `Judgement`, if
    the credit needs them; and with `reuse` the rollout's own forwards, for the update."""

    prompts: list[Prompt]
    cond: Any
    paths: Trajectories
    scored: Scored
    deviation: Float[Tensor, "N"]
    images: Float[Tensor, "E 3 H W"] | None = None
    scouts: "Scouted | None" = None
    log_ratio: Float[Tensor, "N T"] | None = None
    forwards: Reuse | None = None

    @property
    def tree(self) -> Tree:
        return self.paths.tree


@dataclass(frozen=True)
class Scouted:
    """The starting noises that scouts have chosen, by number; the reward of each trajectory's scout, or what a value
    head expects of it, NaN where it has none; how many scouts could not be scored."""

    members: Int[Tensor, "P seeds"]
    reward: Float[Tensor, "N"]
    failed: int


def sample_and_score(run: Session, prompts: list[Prompt], iteration: int, whole: bool = False) -> Rollout:
    """Sample the trajectories of all seeds of the prompts, or of those that scouts choose, and score their images by
    the trained rewards. With `whole` the images and all latents are kept. Raises NonFinite where latents, images or
    scores are not finite, once all is sampled: other ranks may be sampling too."""
    c = run.config
    with run.clock.of("rollout"):
        cond = run.policy.encode(run.rewards.texts(prompts, iteration))
    if c.scouts is None:
        members = torch.arange(c.seeds).repeat(len(prompts), 1)
        return rolled_out(run, prompts, cond, iteration, members, whole=whole)
    every, failed = torch.arange(c.scouts.starts(c.seeds)).repeat(len(prompts), 1), 0
    if c.scouts.images(c.seeds):
        scouts = rolled_out(run, prompts, cond, iteration, every, plans.ode(run.policy.times(c.scouts.steps)))
        verdict = judged(run, scouts, iteration)
        reward, failed = verdict.reward[:, -1], len(unscored(scouts.tree, verdict))
    else:
        reward = foreseen(run, prompts, cond, iteration, every)
    members = chosen(reward, len(prompts), c.seeds)
    rollout = rolled_out(run, prompts, cond, iteration, members, whole=whole)
    of_start = reward.view(every.shape).gather(1, members).flatten()
    return replace(rollout, scouts=Scouted(members, of_start[rollout.tree.member], failed))


def foreseen(
    run: Session, prompts: Sequence[Prompt], cond: Any, iteration: int, members: Int[Tensor, "P starts"]
) -> Float[Tensor, "B"]:
    """What a value head expects of these starts after the first forwards of the run's schedule, prompt by prompt, up to
    a number that those of a prompt share; NaN while the run's head is not to be trusted there."""
    k, head = run.config.scouts.steps - 1, run.scouting or run.values.head
    peek = [plans.ode(torch.cat([run.times[: k + 1], torch.zeros(1)]))] * len(prompts)
    room = Room.of(*_counts(peek, members), Columns(), run.policy.latent_shape, run.policy.device)
    with run.clock.of("rollout"):
        paths = trajectories(run, prompts, cond, iteration, members, peek, Columns(), room, head, range(len(prompts)))
    finite.check_trajectories(paths, prompts)
    value = head.value(paths.features[:, k], paths.tree.t[:, k])
    trusted = run.scouting is not None or bool(run.values.trusted(iteration)[k])
    return value if trusted else torch.full_like(value, torch.nan)


def rolled_out(
    run: Session,
    prompts: list[Prompt],
    cond: Any,
    iteration: int,
    members: Int[Tensor, "P starts"],
    plan: Plan | None = None,
    whole: bool = False,
) -> Rollout:
    """The trajectories of the starting noises with these numbers, by `plan` (None: the run's), and their scores."""
    c, clock = run.config, run.clock
    drawn = [plan or planning.plan_for(c, run.times, planning.position_of(c, iteration, p.id)) for p in prompts]
    keep = Columns() if plan is not None else planning.read(c, drawn)
    keep = Columns.all(drawn[0].steps) if whole else keep
    head = run.values.head if run.values is not None and plan is None else None
    times = {float(each.t[0, k]) for each in drawn for k in each.stochastic}
    reuse = Reuse(run.policy, times) if c.reuse and plan is None else None

    def check_and_score(paths: Trajectories, rows: slice, images: Tensor) -> tuple[Scored, Tensor]:
        if rows.start == 0:
            finite.check_trajectories(paths, prompts)
        owner, end = paths.tree.owner[rows], paths.tree.final[:, -1]
        finite.check_images(images, owner, prompts)
        here = (end >= rows.start) & (end < rows.stop)
        finished = (end[here] - rows.start).unique()
        scored = clock.timed("reward", score)(
            images, [prompts[i] for i in owner.tolist()], run.rewards.trained, c.late, finished
        )
        return scored, deviation(images[end[here] - rows.start], paths.tree.prompt[here])

    sampled, scores, images = [], [], []
    parts = torch.arange(len(prompts)).tensor_split(min(c.rollout_parts, len(prompts)))
    room = Room.of(*_counts(drawn, members), keep, run.policy.latent_shape, run.policy.device)
    before = 0, 0  # trajectories and finished images of the parts before
    with beginning(len(parts) > 1) as begin:
        for part in parts:
            wait(scores[: max(0, len(scores) + 1 - AHEAD)])
            more = _counts([drawn[p] for p in part.tolist()], members[part])
            space = room.part(*(slice(a, a + n) for a, n in zip(before, more, strict=True)))
            before = before[0] + more[0], before[1] + more[1]
            with clock.of("rollout"):
                paths = trajectories(
                    run, prompts, cond, iteration, members, drawn, keep, space, head, part.tolist(), reuse
                )
            sampled.append(paths)
            for rows in together(paths.tree.owner, run.policy.image_size):
                wait(scores[: max(0, len(scores) + 1 - AHEAD)])
                with clock.of("decode"):
                    some = decoded(run, paths, rows)
                images += [some] if whole else []
                scores.append(begin(check_and_score, paths, rows, some))
                del some
        each, apart = zip(*(future.result() for future in scores), strict=True)
    rollout = Rollout(
        prompts, cond, stacked(sampled, room), joined(each), torch.cat(apart), torch.cat(images) if whole else None,
        forwards=reuse,
    )  # fmt: skip
    if c.credit is None or not c.credit.drifts or plan is not None:
        return rollout
    with clock.of("rollout"):
        from_reference = partial(drift.from_reference, run.policy, rollout.paths, cond)
        return replace(rollout, log_ratio=run.fits["batch"](from_reference))


def _counts(plans: Sequence[Plan], members: Int[Tensor, "P starts"]) -> tuple[int, int]:
    """How many trajectories and finished images the starts of prompts with these plans give."""
    starts = members.shape[1]
    return starts * sum(plan.trained for plan in plans), starts * sum(plan.routes for plan in plans)


def together(owner: Int[Tensor, "E"], size: tuple[int, int]) -> list[slice]:
    """Finished images to decode and score at once: those of a prompt, or of several while they take no more than
    `DECODED` bytes. `owner` is sorted."""
    most, ends = DECODED // (4 * 3 * prod(size)), [0]
    for count in owner.unique_consecutive(return_counts=True)[1].tolist():
        if len(ends) > 1 and ends[-1] + count - ends[-2] <= most:
            ends[-1] += count
        else:
            ends.append(ends[-1] + count)
    return [slice(a, b) for a, b in pairwise(ends)]


def trajectories(
    run: Session,
    prompts: Sequence[Prompt],
    cond: Any,
    iteration: int,
    members: Int[Tensor, "P starts"],
    plans: Sequence[Plan],
    keep: Columns,
    room: Room,
    head: Head | None,
    rows: Sequence[int],
    reuse: Reuse | None = None,
) -> Trajectories:
    """The trajectories of the `members` of the prompts in these `rows`, which are those of `cond`, each by its plan;
    what is to `keep` of them is written into `room`, and their features are those that a value `head` looks at, or the
    numbers of the forwards that an update is to `reuse`."""
    c, policy = run.config, run.policy
    starts = [(p, m) for p in rows for m in members[p].tolist()]

    def noise(start: int, *rest: Any) -> Tensor:
        p, member = starts[start]
        return gaussian(policy.latent_shape, seed_of(c.seed, "rollout", iteration, prompts[p].id, member, *rest))

    index = torch.tensor([p for p, _ in starts], device=policy.device)
    each = [plans[p] for p, _ in starts]
    velocity, before = (policy.velocity, 0) if reuse is None else (reuse.velocity, len(reuse.drawn))
    observed = nullcontext(reuse and reuse.numbers) if head is None else head.observed(policy)

    def work(size: int) -> Trajectories:
        if reuse is not None:
            reuse.forget(before)
        with fused(policy) if reuse is None else nullcontext():  # an adapter in the weights takes no gradients
            return sample(velocity, noise, cond, index, each, noise, size, features=features, keep=keep, room=room)

    with observed as features:
        return run.fits["batch"](work)


def stacked(parts: Sequence[Trajectories], room: Room) -> Trajectories:
    """The trajectories of several parts, whose latents lie one after the other in `room`, with finished images, nodes
    and members numbered through."""
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
    features = None if parts[0].features is None else torch.cat([part.features for part in parts])
    return replace(parts[0], tree=tree, features=features, **vars(room))


def decoded(run: Session, paths: Trajectories, rows: slice | Int[Tensor, "n"]) -> Float[Tensor, "n 3 H W"]:
    """The images of these finished latents, on the CPU."""
    latents = paths.finals[rows]

    def work(size: int) -> Tensor:
        images = torch.empty(len(latents), 3, *run.policy.image_size)
        for part in chunks(len(latents), size):
            images[part] = run.policy.decode(latents[part]).cpu()
        return images

    return run.fits["decode_batch"](work)


def judged(run: Session, rollout: Rollout, iteration: int) -> Judgement:
    """Raw scores as rewards, by the weights of the iteration. Raises NonFinite where one is not finite."""
    result = run.rewards.judge(rollout.paths, rollout.scored, run.policy.image_size, iteration, rollout.prompts)
    finite.check_rewards(result, rollout.tree, rollout.prompts)
    return replace(result, log_ratio=rollout.log_ratio)


def step_gains(run: Session, levels: Float[Tensor, "T"], number: int) -> Float[Tensor, "N T"]:
    """Gains of the trajectories of one batch of prompts with this noise, NaN at deterministic steps."""
    kernel = replace(run.config.kernel, noise=tuple(levels.tolist()))
    noisy = replace(run, config=run.config.model_copy(update={"kernel": kernel, "scouts": None, "reuse": False}))
    rollout = sample_and_score(noisy, run.prompts(number), number)
    gain = gains(rollout.tree, of_states(judged(run, rollout, 0)))
    return torch.where(rollout.tree.std > 0, gain, torch.nan)[:, : run.config.steps]
