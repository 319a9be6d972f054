"""The iteration: prompts -> rollout -> judgement -> advantages -> update.

Every random number comes from a seed derived from (run seed, iteration, prompt id, member, step), so results depend
neither on batch sizes nor on whether the run was interrupted.

Left out on purpose: a replay buffer (each iteration learns from its own images) and reward models that are trained
along.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mmalign import credit, evaluate, planner, prompts as prompt_files
from mmalign.config import Config
from mmalign.credit.gain import balance, gains
from mmalign.credit.groups import Units, dead, group_std
from mmalign.credit.region import by_place
from mmalign.flow.plan import Noise
from mmalign.flow.sample import gaussian, sample, seed_of
from mmalign.judge import judge
from mmalign.learn.update import transitions, update
from mmalign.session import Session
from mmalign.types import Judgement, Trajectories
from reward_models import Prompt, combine
from reward_models.cache import Cached


def choose_credit(c: Config) -> Callable:
    settings = {"baseline": c.baseline, "compare": c.compare, "control": c.control}
    units = Units(c.advantage_scale, c.advantage_floor, c.advantage_clip, c.dead_spread)
    return partial(credit.CREDITS[c.credit], units=units, **{k: v for k, v in settings.items() if v is not None})


def weights(c: Config) -> tuple[float, float]:
    """Of the whole image's advantage and of a place's own."""
    given = (c.whole_weight, c.region_weight) if c.region else (1.0, 0.0)
    return tuple(1.0 if weight is None else weight for weight in given)


def iterate(run: Session, iteration: int) -> dict[str, int | float]:
    """Roll out, judge, credit, learn. Returns the row for metrics.jsonl."""
    c, policy, clock = run.config, run.policy, run.clock
    policy.spent.clear()
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed)
    with clock.of("rollout"):
        cond, paths = roll_out(run, prompts, run.levels, iteration)
    judged, images, rewards = judge_all(run, paths, prompts, iteration)
    _stop_if_failing(judged, len(images), c.max_failed)
    with clock.of("learn"):
        advantage = by_place(paths, judged, choose_credit(c), *weights(c))
        batch = transitions(paths, advantage, c.weighting)
        _set_rate(run.optimizer, c, iteration)
        forwards = policy.spent["forwards"]
        statistics = update(
            policy, run.optimizer, batch, cond,
            kernel=c.kernel, t_max=paths.t_max, loss=c.loss, clip=c.clip, beta=c.beta, epochs=c.epochs,
            minibatches=c.minibatches, micro_batch=c.micro_batch, max_grad_norm=c.max_grad_norm,
            generator=torch.Generator().manual_seed(seed_of(c.seed, "shuffle", iteration)),
        )  # fmt: skip
        _average(run.ema, policy.adapter(), c.ema)
    reward = judged.reward[:, -1]
    row = {"iteration": iteration + 1, "reward": float(reward.nanmean())}
    row |= {f"part/{name}": float(values.nanmean()) for name, values in judged.parts.items()}
    row |= combine.health(torch.stack([*judged.parts.values()], 1), [*judged.parts], paths.prompt.cpu(), c.dead_spread)
    row |= run.move_multipliers(judged)
    row |= {
        "group_std": float(group_std(reward, paths.prompt).nanmean()),
        "dead_groups": float(dead(reward, paths.prompt, c.dead_spread).mean()),
        "diversity": evaluate.diversity(images[paths.shown[:, -1].cpu()], paths.prompt.cpu()),
        "failed": len(judged.failures),
        "forwards": forwards,
        "replay_forwards": policy.spent["forwards"] - forwards,
        "decodes": policy.spent["decodes"],
        "rewards": rewards,
        **cache_hits(run),
        "transitions": len(batch),
        "lr": run.optimizer.param_groups[0]["lr"],
    }
    if c.score_states:
        row |= balance(paths, judged)
    row |= {f"std/{k}": float(q[q > 0].mean()) for k, q in enumerate(paths.std.T) if bool((q > 0).any())}
    row |= statistics | {f"seconds/{name}": seconds for name, seconds in clock.read().items()}
    return row


def roll_out(run: Session, prompts: list[Prompt], levels: Noise, iteration: int) -> tuple[object, Trajectories]:
    """The conditioning of the prompts, and the walks of all their seeds."""
    c, policy = run.config, run.policy
    starts = [(p, m) for p in range(len(prompts)) for m in range(c.seeds)]
    at = [planner.window_start(c, iteration, prompt.id) for prompt in prompts]
    plan = {start: planner.plan_for(c, run.times, levels, start) for start in set(at)}

    def noise(start: int, *rest) -> Tensor:
        p, member = starts[start]
        return gaussian(policy.latent_shape, seed_of(c.seed, "rollout", iteration, prompts[p].id, member, *rest))

    cond = policy.encode([p.text for p in prompts])
    index = torch.tensor([p for p, _ in starts], device=policy.device)
    start = torch.stack([noise(i) for i in range(len(starts))]).to(policy.device)
    paths = sample(policy.velocity, start, cond, index, [plan[at[p]] for p, _ in starts], noise, c.batch)
    return cond, paths


def judge_all(
    run: Session, paths: Trajectories, prompts: list[Prompt], iteration: int
) -> tuple[Judgement, Tensor, int]:
    """The judgement by the trained rewards, the images, and how many images were scored, counted for each scorer."""
    c, clock = run.config, run.clock
    scorers = {name: clock.timed("reward", scorer) for name, scorer in run.scorers.items() if name in c.trained}
    decode, combination = clock.timed("decode", run.policy.decode), run.combination(iteration)
    judged, images = judge(paths, prompts, decode, scorers, combination, c.decode_batch, c.region, c.region_grid)
    return judged, images, len(images) * len(scorers)


def step_gains(run: Session, levels: Tensor, number: int) -> Tensor:
    """Gains `[N, T]` of the walks of one batch of prompts with this noise, NaN at deterministic steps."""
    c = run.config
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, number, c.seed)
    _, paths = roll_out(run, prompts, levels.tolist(), number)
    judged, _, _ = judge_all(run, paths, prompts, 0)
    return torch.where(paths.std > 0, gains(paths, judged), torch.nan)[:, : c.steps].cpu()


def cache_hits(run: Session) -> dict[str, float]:
    """The share of all scores so far that were had before, evaluations included."""
    cached = [scorer for scorer in run.scorers.values() if isinstance(scorer, Cached)]
    return {"cache_hits": sum(s.hits for s in cached) / max(1, sum(s.asked for s in cached))} if cached else {}


def _stop_if_failing(judged: Judgement, images: int, limit: float) -> None:
    if len(judged.failures) > limit * images:
        why = next(iter(judged.failures.values()))
        raise RuntimeError(f"{len(judged.failures)} of {images} images could not be scored (limit {limit:.0%}): {why}")


def _set_rate(optimizer: torch.optim.Optimizer, c: Config, iteration: int) -> None:
    up = (iteration + 1) / c.warmup if c.warmup else 1.0
    down = (c.iterations - iteration) / c.cooldown if c.cooldown else 1.0
    for group in optimizer.param_groups:
        group["lr"] = c.learning_rate * min(1.0, up, down)


def _average(ema: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    for name, value in now.items():
        ema[name].lerp_(value, 1 - decay)


@contextmanager
def averaged(run: Session) -> Iterator[None]:
    """The policy with its averaged adapter."""
    kept = run.policy.adapter()
    run.policy.load_adapter(run.ema)
    try:
        yield
    finally:
        run.policy.load_adapter(kept)
