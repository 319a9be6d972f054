"""From prompts to walks, images and what the rewards say of them."""

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign import planner, prompts as prompt_files
from mmalign.credit.gain import gains
from mmalign.flow.plan import Noise
from mmalign.flow.sample import gaussian, sample, seed_of
from mmalign.judge import judge
from mmalign.session import Session
from mmalign.types import Judgement, Trajectories
from reward_models import Prompt


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
    own = [plan[at[p]] for p, _ in starts]
    return cond, run.fits["batch"](lambda rows: sample(policy.velocity, start, cond, index, own, noise, rows))


def decoded(run: Session, paths: Trajectories) -> Float[Tensor, "E 3 H W"]:
    """The images of the finished latents, on the CPU."""

    def work(size: int) -> Tensor:
        return torch.cat([run.policy.decode(latents).cpu() for latents in paths.ends.split(size)])

    with run.clock.of("decode"):
        return run.fits["decode_batch"](work)


def judge_all(
    run: Session, paths: Trajectories, images: Float[Tensor, "E 3 H W"], prompts: list[Prompt], iteration: int
) -> Judgement:
    """The judgement by the trained rewards."""
    c = run.config
    scorers = {name: run.clock.timed("reward", run.scorers[name]) for name in c.trained}
    return judge(paths, prompts, images, scorers, run.combination(iteration), c.region, c.region_grid)


def step_gains(run: Session, levels: Tensor, number: int) -> Tensor:
    """Gains `[N, T]` of the walks of one batch of prompts with this noise, NaN at deterministic steps."""
    c = run.config
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, number, c.seed)
    _, paths = roll_out(run, prompts, levels.tolist(), number)
    judged = judge_all(run, paths, decoded(run, paths), prompts, 0)
    return torch.where(paths.std > 0, gains(paths, judged), torch.nan)[:, : c.steps].cpu()
