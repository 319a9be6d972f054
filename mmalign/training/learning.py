"""What an iteration learns from: rows, and what to replay them with, by the config's `objective`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.data import prompts as prompt_files
from mmalign.distributed.deepspeed import ZeroOptimizer
from mmalign.flow.sample import seed_of
from mmalign.learn.update import Peers, Replay, surrogate, transitions, update
from mmalign.objectives import rgdpo, srum
from mmalign.objectives.flow_matching import Finished
from mmalign.training.masks import attended
from mmalign.training.session import Session
from mmalign.types import Judgement, Marks, Rows, Trajectories
from reward_models import Prompt


@dataclass(frozen=True)
class Lesson:
    """Rows, their replay, and which of them are worth a forward (None: all)."""

    batch: Rows
    replay: Replay
    needed: Bool[Tensor, "M"] | None = None


def of_walks(run: Session, cond, paths: Trajectories, advantage: Float[Tensor, "N T a b"]) -> Lesson:
    """GRPO: every stochastic step of the walks."""
    c, policy = run.config, run.policy
    batch = transitions(paths, advantage, c.weighting, lambda std: run.ranks.gather(std, "noise of the steps").mean())
    if c.focus == "prompt":
        batch = run.fits["batch"](lambda rows: attended(policy, cond, batch, c.focus_share, rows))
    replay = surrogate(
        policy, cond, kernel=c.kernel, t_max=paths.t_max, loss=c.loss, clip=c.clip, beta=c.beta, over=c.ratio_over,
        measure=c.measures_kl,
    )  # fmt: skip
    return Lesson(batch, replay, None if c.beta else batch.advantage.abs().amax((1, 2)) > 0)


def finished(paths: Trajectories, judged: Judgement) -> Finished:
    """The finished images of the walks that have a reward."""
    had = (~judged.reward[:, -1].isnan()).nonzero()[:, 0]
    ends = paths.shown[had, -1]
    place, x = ends.to(judged.regions.device), paths.ends[ends]
    marks = Marks(*(column.to(x.device) for column in vars(judged.marks[place]).values()))
    return Finished(x, paths.prompt[had], judged.reward[had, -1], judged.regions[place].to(x.device), marks)


def of_images(run: Session, prompts: Sequence[Prompt], cond, seen: Finished, iteration: int) -> Lesson:
    """SRUM, or R-GDPO: finished images, and what was found at places of them. The random numbers are the prompt's."""
    c, policy = run.config, run.policy

    def rows(p: int) -> Rows:
        generator = torch.Generator().manual_seed(seed_of(c.seed, c.objective, iteration, prompts[p].id))
        own = seen[seen.prompt == p]
        if c.objective == "rgdpo":
            return rgdpo.pairs(policy, own, c.draws, generator)
        return srum.examples(policy, own, srum.weights(own, *c.alpha_range, c.background), c.draws, generator)

    batch = joined([rows(p) for p in range(len(prompts))])
    if c.objective == "rgdpo":
        return Lesson(batch, rgdpo.replay(policy, cond, c.preference_scale, c.intra_weight))
    return Lesson(batch, srum.replay(policy, cond, c.anchor, c.margin))


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of records of one kind, one under the other."""
    return type(parts[0])(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def from_records(run: Session, iteration: int) -> tuple[Lesson, dict[str, int | float]]:
    c, policy = run.config, run.policy
    prompts = run.ranks.local(prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed))
    with run.clock.of("learn"):
        seen = run.records.finished(policy, prompts, c.region_grid or policy.latent_shape[1:])
        lesson = of_images(run, prompts, policy.encode([p.text for p in prompts]), seen, iteration)
    reward = run.ranks.gather(seen.reward, "rewards")
    return lesson, {"reward": float(reward.mean()), "images": len(reward), "rewards": 0}


def learn(run: Session, lesson: Lesson, iteration: int) -> dict[str, int | float]:
    """Step the optimiser along the lesson, with all processes, and move the averaged adapter; returns a row of it."""
    c, ranks = run.config, run.ranks
    prompts = ranks.local(prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed))
    shares = ranks.local_rows(lesson.batch.index, "rows to learn from")
    peers = Peers(shares, ranks.add_gradients, partial(ranks.all_gather_object, what="what was learnt"), ranks.replayed)
    micro_batch = run.fits["micro_batch"]
    if isinstance(run.optimizer, ZeroOptimizer):
        peers = replace(peers, add=run.optimizer.add, clip=run.optimizer.clip)
        micro_batch = run.optimizer.summing(micro_batch)
    statistics = update(
        run.policy.parameters(), run.optimizer, lesson.batch, lesson.replay, needed=lesson.needed,
        epochs=c.epochs, minibatches=c.minibatches, micro_batch=micro_batch, max_grad_norm=c.max_grad_norm,
        generator=torch.Generator().manual_seed(seed_of(c.seed, "shuffle", iteration)), peers=peers,
        may_step=partial(run.skips.may_step, iteration, prompts),
    )  # fmt: skip
    if not run.skips.reasons:
        run.average()
    return {"transitions": len(shares)} | statistics
