"""Sample images by ODE from fixed seeds."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.utils import save_image

from mmalign.activity import doing
from mmalign.evaluation.toward import Toward
from mmalign.flow.plan import ode
from mmalign.flow.sample import Features, chunks, sample
from mmalign.policy.protocol import Policy, fused
from mmalign.seeds import gaussian
from mmalign.types import Trajectories, Velocity
from reward_models import Prompt


def sample_images(
    policy: Policy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    steps: int,
    out: Path,
    batch: int = 64,
    velocity: Velocity | None = None,
    toward: Toward | None = None,
) -> list[dict[str, Any]]:
    """Sample an image of each prompt from each seed (`generate`) and write it as a PNG into the folder `out`, which is
    there. Returns for each image its file `image`, its `prompt` and its `seed`."""
    images, owner = generate(policy, prompts, [seeds] * len(prompts), steps, batch, velocity, toward)
    rows = []
    for image, p, seed in zip(images, owner.tolist(), [*seeds] * len(prompts), strict=True):
        rows.append({"image": str(image_file(out, prompts[p], seed)), "prompt": prompts[p].text, "seed": seed})
        save_image(image, rows[-1]["image"])
    return rows


def image_file(out: Path, prompt: Prompt, seed: int) -> Path:
    return out / f"{prompt.id:05d}-{seed}.png"


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
    steps: int,
    batch: int,
    velocity: Velocity | None = None,
    toward: Toward | None = None,
) -> tuple[Float[Tensor, "N 3 H W"], Int[Tensor, "N"]]:
    """Images of each prompt from each of its seeds, by ODE along `velocity`, by default the policy's, with guidance
    `toward` a scorer if it is given; and the prompt of each image.

    A seed gives the initial noise that a stock pipeline draws from a CPU generator with that seed.
    """
    noise, owner = initial_noise(policy, seeds)
    parts = trajectories(policy, prompts, noise, owner, policy.times(steps), batch, velocity, toward)
    return torch.cat([policy.decode(paths.finals).cpu() for paths in parts]), owner


def initial_noise(policy: Policy, seeds: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "N C h w"], Int[Tensor, "N"]]:
    """The initial noise of each seed of each prompt, and the prompt of each row."""
    rows = [(p, seed) for p, of_prompt in enumerate(seeds) for seed in of_prompt]
    noise = torch.stack([gaussian(policy.latent_shape, seed) for _, seed in rows]).to(policy.device)
    return noise, torch.tensor([p for p, _ in rows])


def trajectories(
    policy: Policy,
    prompts: Sequence[Prompt],
    noise: Float[Tensor, "N C h w"],
    owner: Int[Tensor, "N"],
    times: Float[Tensor, "states"],
    batch: int,
    velocity: Velocity | None = None,
    toward: Toward | None = None,
    features: Features | None = None,
) -> Iterator[Trajectories]:
    """ODE trajectories from each initial noise, for the prompt `owner` of each row, `batch` at a time; with `features`
    those of their states are kept (`mmalign.flow.sample.sample`)."""
    acting = fused if velocity is None else nullcontext  # another velocity may switch adapters at each step
    velocity = velocity or policy.velocity
    with doing("sampling", "images", len(noise)) as work:
        for rows in chunks(len(noise), batch):
            used, index = owner[rows].unique(return_inverse=True)
            requests = [prompts[p] for p in used.tolist()]
            cond, index = policy.encode([prompt.text for prompt in requests]), index.to(policy.device)
            guided = toward.guided(policy, velocity, requests) if toward else velocity
            with acting(policy):
                paths = sample(guided, noise[rows], cond, index, ode(times), batch=batch, features=features)
            yield paths
            work.did("images", len(index))
