"""Show images to reward models, once each, and bring the scores back to the trajectories."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.types import Judgement, Trajectories
from reward_models import Prompt, Scores

Scorers = Mapping[str, Callable[..., Scores]]  # by name: (images, prompts) -> Scores


def score(
    images: Float[Tensor, "N 3 H W"], prompts: Sequence[Prompt], scorers: Scorers
) -> tuple[dict[str, Float[Tensor, "N"]], dict[int, str]]:
    """Every component as "scorer.component" -> `[N]`, NaN where it failed, and the reasons by image."""
    parts, failures = {}, {}
    for name, scorer in scorers.items():
        scores = scorer(images, prompts)
        failures |= {i: f"{name}: {why}" for i, why in scores.failures.items()}
        parts |= {f"{name}.{component}": scores.column(component).float() for component in scores.names}
    return parts, failures


def total(parts: Mapping[str, Float[Tensor, "N"]], weights: Mapping[str, float]) -> Float[Tensor, "N"]:
    """Weighted sum; NaN where any component is, for a sum with a part missing would not compare with its siblings'."""
    return torch.stack([weight * parts[name] for name, weight in weights.items()]).sum(0)


def judge(
    paths: Trajectories,
    prompts: Sequence[Prompt],
    decode: Callable[[Tensor], Tensor],
    scorers: Scorers,
    weights: Mapping[str, float],
    batch: int = 32,
) -> tuple[Judgement, Float[Tensor, "E 3 H W"]]:
    """Decode, `batch` at a time, and score each finished latent once, and give every shown state the reward of its end.

    Returns the judgement and the images `[E, ...]` of the ends, both on the CPU.
    """
    images = torch.cat([decode(latents).cpu() for latents in paths.ends.split(batch)])
    parts, failures = score(images, [prompts[i] for i in paths.owner.tolist()], scorers)
    own = {name: values[paths.shown[:, -1].cpu()] for name, values in parts.items()}
    return Judgement(paths.at_states(total(parts, weights)), own, failures=failures), images
