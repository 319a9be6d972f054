"""Show images to reward models, once each, and bring the scores back to the trajectories."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.flow.sample import chunks, distinct
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
    batch: int = 256,
) -> tuple[Judgement, Float[Tensor, "N 3 H W"]]:
    """Decode and score each distinct finished image once. Returns the judgement and the images, both on the CPU."""
    number, first = distinct(paths.node[:, -1])
    spread = number.cpu()
    latents = paths.x[first, -1]
    images = torch.cat([decode(latents[part]).cpu() for part in chunks(len(first), batch)])
    parts, failures = score(images, [prompts[i] for i in paths.prompt[first].tolist()], scorers)
    reward = torch.full(paths.node.shape, torch.nan)
    reward[:, -1] = total(parts, weights)[spread]
    judged = Judgement(
        reward.to(paths.x.device), {name: values[spread] for name, values in parts.items()}, failures=failures
    )
    return judged, images[spread]
