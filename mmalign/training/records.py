"""What an iteration learns from where images and their scores are given, and nothing is sampled."""

from collections.abc import Sequence

from mmalign.objectives.objective import TrainBatch
from mmalign.training.session import Session
from reward_models import Prompt


def batch(run: Session, prompts: Sequence[Prompt], iteration: int) -> tuple[TrainBatch, dict[str, int | float]]:
    """Train on the judged images of these prompts; also the iteration's row of metrics."""
    c, policy = run.config, run.policy
    with run.clock.of("learn"):
        images = run.records.finished(policy, prompts, c.region_grid or policy.latent_shape[1:])
        cond = policy.encode([p.text for p in prompts])
        rows = c.objective.of_images(run, prompts, cond, images, iteration)
    reward = run.ranks.gather(images.reward, "rewards")
    return rows, {"reward": float(reward.mean()), "images": len(reward), "rewards": 0}
