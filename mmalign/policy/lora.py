"""LoRA on a diffusers transformer, through peft. The reference policy is the same network with the adapter off."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn


def attach(module: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freeze `module` and add a float32 adapter to every linear layer whose name ends with one of `targets`.

    The new matrices depend on `seed` alone and leave the output unchanged (B = 0). Raises ValueError for targets that
    match nothing.
    """
    module.requires_grad_(False)
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise ValueError(
                f"lora_targets: {target!r} matches no linear layer; names end like {', '.join(sorted(names)[:6])}"
            )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
        module.add_adapter(config)
    for p in parameters(module):
        p.data = p.data.float()


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in a fixed order."""
    return [p for p in module.parameters() if p.requires_grad]


def names(module: nn.Module) -> list[str]:
    """Their names, in the order of `parameters`."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def unused(module: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """The adapted layers whose output `loss` does not depend on, whatever their weights: for one, the text's query in
    the last block of SD3, which no later layer reads."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    nudges = {name: torch.zeros((), device=p.device, requires_grad=True)
              for name, layer in layers.items() for p in [next(layer.parameters())]}  # fmt: skip
    hooks = [
        layer.register_forward_hook(lambda _, __, out, nudge=nudges[name]: out + nudge)
        for name, layer in layers.items()
    ]
    try:
        found = torch.autograd.grad(loss(), list(nudges.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, g in zip(nudges, found, strict=True) if g is None or not bool(g)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in sorted(get_peft_model_state_dict(module).items())}


def load_state(module: nn.Module, values: dict[str, Tensor]) -> None:
    expected, given = (
        {(name, *value.shape) for name, value in own.items()} for own in (get_peft_model_state_dict(module), values)
    )
    if expected != given:
        odd = sorted({name for name, *_ in expected ^ given})
        raise ValueError(f"the adapter does not fit this model and rank: {len(odd)} matrices differ, e.g. {odd[0]}")
    set_peft_model_state_dict(module, values)


def base(module: nn.Module) -> dict[str, Tensor]:
    """The untouched weights, by the names they have without an adapter."""
    own = module.state_dict().items()
    return {name.replace(".base_layer.", "."): value for name, value in own if ".lora_" not in name}


def with_alphas(module: nn.Module) -> dict[str, Tensor]:
    """Of each adapted layer `lora_A.weight [rank, in]`, `lora_B.weight [out, rank]` and the scalar `alpha`."""
    tensors, alpha = state(module), float(module.peft_config["default"].lora_alpha)
    return tensors | {f"{layer}.alpha": torch.tensor(alpha) for layer in layers(tensors)}


def layers(tensors: dict[str, Tensor]) -> list[str]:
    return sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})


def changes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change of each layer's weight, `alpha / rank B A [out, in]` in float32, from matrices named as `with_alphas`
    names them. ValueError for one that is missing, foreign, not finite, or of a shape that does not fit."""
    found, left = {}, dict(tensors)
    for layer in layers(tensors):
        for part in ("lora_A.weight", "lora_B.weight", "alpha"):
            if f"{layer}.{part}" not in left:
                raise ValueError(f"{layer} has no {part}")
        a, b, alpha = (left.pop(f"{layer}.{part}").float() for part in ("lora_A.weight", "lora_B.weight", "alpha"))
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or alpha.numel() != 1:
            raise ValueError(
                f"{layer}: shapes {[*a.shape]}, {[*b.shape]}, {[*alpha.shape]} are no LoRA's A, B and alpha"
            )
        found[layer] = alpha.to(b.device) / len(a) * (b @ a)
        if not bool(found[layer].isfinite().all()):
            raise ValueError(f"{layer}: its matrices are not finite")
    if left:
        raise ValueError(f"{min(left)!r} is no matrix of a LoRA")
    return found


def changed(module: nn.Module, changes: dict[str, Tensor]) -> nn.Module:
    """A stock network with the untouched weights of `module`, and some layers' changed (added in float32, then rounded
    to the weight's type). The others are shared. ValueError for a layer that is not there or of another shape."""
    weights = base(module)
    for layer, change in changes.items():
        weight = weights.get(f"{layer}.weight")
        if weight is None or weight.shape != change.shape:
            had = "none" if weight is None else [*weight.shape]
            raise ValueError(f"{layer}: a change of shape {[*change.shape]}, and the model's weight is {had}")
        weights[f"{layer}.weight"] = (weight.float() + change.to(weight.device)).to(weight.dtype)
    with init_empty_weights():
        network = type(module).from_config(module.config)
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """The untouched network, to the bit."""
    module.disable_adapters()
    try:
        yield
    finally:
        module.enable_adapters()
