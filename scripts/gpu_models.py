"""The two models that `check_gpu.py` checks: a velocity, a gradient and a rollout of each."""

import torch
from benchmark_gpu import MODEL, texts
from torch import Tensor

from mmalign import policy as policies
from mmalign.checks import estimate
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.loss import Clipped
from mmalign.objectives.replay import Surrogate, transitions
from mmalign.policy import meta
from mmalign.policy.pipeline import PipelinePolicy
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.types import Transitions

SMALL = {"num_layers": 2, "num_attention_heads": 4, "caption_projection_dim": 256, "pos_embed_max_size": 64}
CLIP, GUIDANCE, IMAGES, STEPS = 1e-4, 4.5, 8, 5
device = "cuda"  # or "cpu", with narrow layers, to try the checks


def embedded(dtype: str, quantize: str | None = None, place: str = "") -> PipelinePolicy:
    return policies.load("assets/tiny_sd3", dtype=dtype, device=place or device, guidance=GUIDANCE, quantize=quantize)


def medium(dtype: str, quantize: str | None = None) -> PipelinePolicy:
    size, changed = ((512, 512), {}) if device == "cuda" else ((128, 128), SMALL)
    policy = meta.load(estimate.folder(MODEL), dtype=dtype, guidance=GUIDANCE, size=size)
    torch.manual_seed(0)
    with torch.device(device):
        empty = policy.pipe.transformer
        transformer = type(empty).from_config({**empty.config} | changed)
    transformer = transformer.to(getattr(torch, dtype)).requires_grad_(False).eval()
    if quantize:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(transformer, Int8WeightOnlyConfig())
    policy.pipe.register_modules(transformer=transformer)
    return policy


def adapted(policy: PipelinePolicy, std: float = 0.02) -> PipelinePolicy:
    """With an adapter that changes the velocity, unless `std` is 0."""
    policy.attach_lora(32, 64.0, None, 0)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(std * torch.randn(p.shape, generator=draws).to(p))
    return policy


def starts(policy: PipelinePolicy, rows: int) -> Tensor:
    return torch.stack([gaussian(policy.latent_shape, i) for i in range(rows)]).to(policy.device)


def velocity(policy: PipelinePolicy, learn: bool = False, rows: int = 2) -> Tensor:
    """The velocity, or the adapter's gradient of its mean square, on the CPU in double precision."""
    with torch.set_grad_enabled(learn):
        x, index = starts(policy, rows), torch.arange(rows, device=policy.device)
        v = policy.velocity(x, torch.linspace(0.9, 0.1, rows).to(x), texts(policy, rows), index).float()
    if not learn:
        return v.cpu().double()
    parts = torch.autograd.grad(v.square().mean(), policy.parameters(), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts]).cpu().double()


def rollout(policy: PipelinePolicy, batch: int = IMAGES, measure: bool = False) -> tuple[Surrogate, Transitions]:
    """The stochastic steps of a rollout, and the loss of their replay."""
    plan, index = plans.sde(policy.times(STEPS), FlowSde(0.7)), torch.arange(IMAGES, device=policy.device)
    x, cond = starts(policy, IMAGES), texts(policy, IMAGES)
    noise = lambda *key: gaussian(policy.latent_shape, seed_of(*key))  # noqa: E731
    paths = sample(policy.velocity, x, cond, index, plan, noise, batch)
    rows = transitions(paths, torch.ones(IMAGES, STEPS, 1, 1))
    return Surrogate(policy, cond, plan.kernel, plan.t_max, Clipped(CLIP), measure=measure), rows
