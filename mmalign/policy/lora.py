"""LoRA on a diffusers transformer, by peft. The reference policy is the same network with the adapter disabled."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

Matrices = Mapping[str, tuple[Tensor, Tensor]]  # by layer, A [rank, in] and B [out, rank]; B A is added to its weight
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attach(module: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freeze `module` and add a float32 adapter to every linear layer whose name ends with one of `targets`.

    The new matrices depend on `seed` alone and leave the output unchanged (B = 0). Raises ValueError for targets that
    match nothing.
    """
    module.requires_grad_(False)
    layers = linear(module)
    for target in targets:
        if not any(_ends(layer, target) for layer in layers):
            raise ValueError(
                f"lora_targets: {target!r} matches no linear layer; names end in {', '.join(sorted(layers)[:6])}"
            )
    # full names: a target may also be the end of the name of another kind of module, which peft would refuse
    adapted = [layer for layer in layers if any(_ends(layer, target) for target in targets)]
    _add(module, seed, r=rank, lora_alpha=alpha, target_modules=adapted)


def insert(module: nn.Module, matrices: Matrices) -> None:
    """Freeze `module` and add an adapter of these matrices; layers may differ in rank. Raises ValueError for a layer
    that does not exist or has another shape."""
    module.requires_grad_(False)
    layers = linear(module)
    for layer, (a, b) in matrices.items():
        if layer not in layers:
            raise ValueError(f"the model has no linear layer {layer!r}")
        wide, high = layers[layer].in_features, layers[layer].out_features
        if (a.shape[1], len(b)) != (wide, high):
            raise ValueError(
                f"{layer}: a change of shape {[len(b), a.shape[1]]}, and the model's weight is {[high, wide]}"
            )
    ranks = {layer: len(a) for layer, (a, _) in matrices.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(layer)}": other for layer, other in ranks.items() if other != rank}
    _add(module, 0, r=rank, lora_alpha=rank, target_modules=[*matrices], rank_pattern=others, alpha_pattern=others)
    load_state(module, named(matrices))


def linear(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a network by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _ends(layer: str, target: str) -> bool:
    return layer == target or layer.endswith("." + target)


def _add(module: nn.Module, seed: int, **settings: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module.add_adapter(LoraConfig(init_lora_weights="gaussian", **settings))
    for p in parameters(module):
        p.data = p.data.float()


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in a fixed order."""
    return [p for p in module.parameters() if p.requires_grad]


def names(module: nn.Module) -> list[str]:
    """Their names, in the order of `parameters`."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def unused(module: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """The adapted layers that `loss` does not depend on, whatever their weights: for example the text's query in the
    last block of SD3, whose output no later layer uses."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    nudges = {name: torch.zeros((), device=p.device, requires_grad=True)
              for name, layer in layers.items() for p in [next(layer.parameters())]}  # fmt: skip
    hooks = [
        layer.register_forward_hook(lambda _, __, out, nudge=nudges[name]: out + nudge)
        for name, layer in layers.items()
    ]
    try:
        gradients = torch.autograd.grad(loss(), list(nudges.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, g in zip(nudges, gradients, strict=True) if g is None or not bool(g)]


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's matrices, by name."""
    return {name: value.detach().clone() for name, value in sorted(get_peft_model_state_dict(module).items())}


def load_state(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Set the adapter's matrices. ValueError unless they are those of `state`, by name and shape."""
    expected, given = (
        {(name, *value.shape) for name, value in matrices.items()}
        for matrices in (get_peft_model_state_dict(module), values)
    )
    if expected != given:
        odd = sorted({name for name, *_ in expected ^ given})
        raise ValueError(f"the adapter does not fit this model and rank: {len(odd)} matrices differ, e.g. {odd[0]}")
    set_peft_model_state_dict(module, values)


def base(module: nn.Module) -> dict[str, Tensor]:
    """The base weights, by the names they have without an adapter."""
    weights = module.state_dict().items()
    return {name.replace(".base_layer.", "."): value for name, value in weights if ".lora_" not in name}


def folded(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter's matrices with its strength, alpha over rank, in B."""
    adapted = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    tensors = state(module)
    return {
        layer: (
            tensors[f"{layer}.lora_A.weight"],
            adapted[layer].scaling["default"] * tensors[f"{layer}.lora_B.weight"],
        )
        for layer in layers(tensors)
    }


def config(module: nn.Module) -> dict[str, Any]:
    """peft's settings of the adapter with the matrices of `folded`: each layer by its name, alpha equal to the rank."""
    used = module.peft_config["default"]
    adapted = sorted(name for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer))
    settings = used.to_dict() | {"target_modules": adapted, "lora_alpha": used.r, "alpha_pattern": used.rank_pattern}
    return settings | {"peft_type": used.peft_type.value}


def named(matrices: Matrices, prefix: str = "", alphas: bool = False) -> dict[str, Tensor]:
    """`lora_A.weight` and `lora_B.weight` of each layer, and with `alphas` an `alpha` equal to the rank."""
    tensors = {}
    for layer, (a, b) in matrices.items():
        tensors |= {f"{prefix}{layer}.lora_A.weight": a.contiguous(), f"{prefix}{layer}.lora_B.weight": b.contiguous()}
        if alphas:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(float(len(a)))
    return tensors


def layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers that the tensors of a LoRA belong to."""
    return sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})


def matrices(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The inverse of `named`, in float32; an `alpha` other than the rank is folded into B. ValueError for a matrix that
    is missing, foreign, not finite, or of a shape or type that does not fit."""
    pairs, left = {}, dict(tensors)
    for layer in layers(tensors):
        for name in ("lora_A.weight", "lora_B.weight"):
            if f"{layer}.{name}" not in left:
                raise ValueError(f"{layer} has no {name}")
        a, b = (left.pop(f"{layer}.lora_{side}.weight") for side in "AB")
        alpha = left.pop(f"{layer}.alpha", torch.tensor(float(a.shape[0] if a.ndim else 0)))
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a) or alpha.numel() != 1:
            raise ValueError(
                f"{layer}: shapes {[*a.shape]}, {[*b.shape]}, {[*alpha.shape]} are not a LoRA's A, B and alpha"
            )
        odd = [str(value.dtype) for value in (a, b, alpha) if value.dtype not in TYPES]
        if odd:
            raise ValueError(f"{layer}: its matrices are of {odd[0]}; float16, bfloat16, float32 or float64 are needed")
        a, b = a.float(), b.float() * (float(alpha) / len(a))
        size = float(a.double().norm() * b.double().norm())  # an upper bound on the values of B A
        if not size <= torch.finfo(torch.float32).max:
            raise ValueError(f"{layer}: its matrices are not finite")
        pairs[layer] = (a, b)
    if left:
        raise ValueError(f"{min(left)!r} is not a matrix of a LoRA")
    return pairs


def changes(matrices: Matrices) -> dict[str, Tensor]:
    """The change of each layer's weight [out, in]."""
    return {layer: b @ a for layer, (a, b) in matrices.items()}


def changed(module: nn.Module, changes: dict[str, Tensor]) -> nn.Module:
    """A stock network with the base weights of `module`, some of them changed (added in float32, then rounded to the
    weight's type) and the others shared. ValueError for a layer that does not exist or has another shape."""
    weights = base(module)
    for layer, change in changes.items():
        weight = weights.get(f"{layer}.weight")
        if weight is None or weight.shape != change.shape:
            shape = "none" if weight is None else [*weight.shape]
            raise ValueError(f"{layer}: a change of shape {[*change.shape]}, and the model's weight is {shape}")
        weights[f"{layer}.weight"] = (weight.float() + change.to(weight.device)).to(weight.dtype)
    with init_empty_weights():
        network = type(module).from_config(module.config)
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Within this block the network has its base weights, to the bit; a block within a block changes nothing."""
    already = any(m.disable_adapters for m in module.modules() if isinstance(m, BaseTunerLayer))
    module.disable_adapters()
    try:
        yield
    finally:
        if not already:
            module.enable_adapters()
