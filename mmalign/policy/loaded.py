"""A pipeline that the caller has loaded: as a policy, and afterwards as it came, but for the adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from mmalign import policy as policies
from mmalign.policy import lora
from mmalign.policy.pipeline import PipelinePolicy
from reward_models.allowlist import import_allowed

PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FLAGS = ("training", "gradient_checkpointing", "use_tiling", "_compiled_call_impl")  # of modules, changed for a run
MISSING = object()


def check(pipe: Any, adapters: bool = False) -> None:
    """ValueError for an object that is not a pipeline of a known family, lacks a component, has hooks that move its
    components, or has another precision than float32 and bfloat16; and unless `adapters`, for one with an adapter."""
    what = f"the {type(pipe).__name__}"
    if not isinstance(pipe, DiffusionPipeline) or _family(pipe) is None:
        raise ValueError(f"{what} is not a pipeline of a known family: {', '.join(policies.POLICIES)}")
    missing = [name for name in ("transformer", "vae", "scheduler") if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(f"{what} has no {missing[0]}")
    if not adapters and (known := getattr(pipe.transformer, "peft_config", None)):
        raise ValueError(
            f"{what} has the adapter {next(iter(known))!r} already: remove it by unload_lora_weights(), after "
            "fuse_lora() to keep its change"
        )
    if any(getattr(module, "_hf_hook", None) for module in _modules(pipe)):
        raise ValueError(f"{what} moves its components by hooks (offload): call remove_all_hooks() on it")
    if pipe.transformer.dtype not in PRECISIONS:
        raise ValueError(
            f"{what} has weights of {pipe.transformer.dtype}; load it with torch_dtype=torch.float32 or torch.bfloat16"
        )
    for name, part in pipe.components.items():  # whose embeddings the transformer takes unchanged
        if name.startswith("text_encoder") and part is not None and part.dtype != pipe.transformer.dtype:
            raise ValueError(
                f"{what} has a {name} of {part.dtype} and a transformer of {pipe.transformer.dtype}; load it with "
                f"torch_dtype={pipe.transformer.dtype}"
            )


def as_policy(pipe: Any, guidance: float = 1.0, size: tuple[int, int] | None = None) -> PipelinePolicy:
    """The policy of a pipeline in memory that `check` accepts, which freezes it (`restored`). ValueError for settings
    and numbers that do not fit it."""
    policy = import_allowed(_family(pipe), type(pipe).__name__, ours=True)(pipe, guidance, size)
    try:
        policy.check_numbers()
    except ValueError as error:
        raise ValueError(f"the {type(pipe).__name__}: {error}") from None
    return policy


def _family(pipe: Any) -> str | None:
    names = [kind.__name__ for kind in type(pipe).__mro__]
    return next((policies.POLICIES[name] for name in names if name in policies.POLICIES), None)


def precision(pipe: Any) -> str:
    """The name that a config has for the precision of its transformer."""
    return PRECISIONS[pipe.transformer.dtype]


@contextmanager
def restored(pipe: Any) -> Iterator[None]:
    """At the end of the block the pipeline is as before it, but for the policy's adapter and its device: which
    parameters need gradients, modes, schedule, attention and memory settings."""
    modules, adapters = _modules(pipe), {*lora.adapters(pipe.transformer), lora.DEFAULT}
    needs = {p: p.requires_grad for module in modules for p in module.parameters()}
    flags = [
        (each, name, vars(each).get(name, MISSING))
        for module in modules
        for each in module.modules()
        for name in FLAGS
        if hasattr(each, name)
    ]
    processors = [p for each in pipe.transformer.modules() if (p := getattr(each, "processor", None)) is not None]
    flags += [(p, "_attention_backend", vars(p).get("_attention_backend", MISSING)) for p in processors]
    schedule, shown = dict(vars(pipe.scheduler)), dict(getattr(pipe, "_progress_bar_config", {}))
    try:
        yield
    finally:
        for name in lora.adapters(pipe.transformer):
            if name not in adapters:
                lora.remove(pipe.transformer, name)
        for p in lora.parameters(pipe.transformer):
            if p not in needs:
                p.requires_grad_(False)
        for p, flag in needs.items():
            p.requires_grad_(flag)
        for each, name, value in flags:
            if value is not MISSING:
                setattr(each, name, value)
            elif name in vars(each):
                delattr(each, name)
        vars(pipe.scheduler).clear()
        vars(pipe.scheduler).update(schedule)
        pipe.set_progress_bar_config(**shown)


def _modules(pipe: Any) -> list[nn.Module]:
    return [component for component in pipe.components.values() if isinstance(component, nn.Module)]
