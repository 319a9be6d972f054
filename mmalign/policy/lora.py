"""LoRA on a diffusers transformer, by peft. The reference policy is the same network with the adapter disabled.

One network may have several adapters, by name. One of them acts at a time, and only its matrices take gradients:
`DEFAULT`, the policy's, except within `acting`.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

Matrices = Mapping[str, tuple[Tensor, Tensor]]  # by layer, A [rank, in] and B [out, rank]; B A is added to its weight
DEFAULT = "default"  # the name of the policy's adapter
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attach(module: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int, name: str = DEFAULT) -> None:
    """Freeze `module` and add a float32 adapter to every linear layer whose name ends with one of `targets`.

    The new matrices depend on `seed` alone and leave the output unchanged (B = 0). Another adapter that acts keeps
    acting. Raises ValueError for targets that match nothing.
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
    _add(module, name, seed, r=rank, lora_alpha=alpha, target_modules=adapted)


def insert(module: nn.Module, matrices: Matrices, name: str = DEFAULT) -> None:
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
    targets = [*matrices]
    _add(module, name, 0, r=rank, lora_alpha=rank, target_modules=targets, rank_pattern=others, alpha_pattern=others)
    load_state(module, named(matrices), name)


def linear(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a network by the names they have without an adapter."""
    layers = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    return {name.removesuffix(".base_layer"): child for name, child in layers.items() if ".lora_" not in name}


def _ends(layer: str, target: str) -> bool:
    return layer == target or layer.endswith("." + target)


def _add(module: nn.Module, name: str, seed: int, **settings: Any) -> None:
    before = module.active_adapters() if adapters(module) else name
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # a second adapter is meant
        torch.manual_seed(seed)
        module.add_adapter(LoraConfig(init_lora_weights="gaussian", **settings), name)
    for p in parameters(module, name):
        p.data = p.data.float()
    module.set_adapter(before)


def adapters(module: nn.Module) -> list[str]:
    """The names of the adapters, in the order they came in."""
    return [*getattr(module, "peft_config", {})]


def parameters(module: nn.Module, name: str = DEFAULT) -> list[nn.Parameter]:
    """The matrices of one adapter, in a fixed order."""
    return [p for _, p in _matrices(module, name)]


def names(module: nn.Module, name: str = DEFAULT) -> list[str]:
    """Their names, in the order of `parameters`."""
    return [each for each, _ in _matrices(module, name)]


def _matrices(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    end = re.compile(rf"\.lora_[AB]\.{re.escape(name)}\.weight")
    return ((each, p) for each, p in module.named_parameters() if end.search(each))


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


def state(module: nn.Module, name: str = DEFAULT) -> dict[str, Tensor]:
    """A copy of one adapter's matrices, by names without the adapter's."""
    end = f".{name}.weight"
    tensors = {f"{each.removesuffix(end)}.weight": value for each, value in _matrices(module, name)}
    return {each: value.detach().clone() for each, value in sorted(tensors.items())}


def load_state(module: nn.Module, values: dict[str, Tensor], name: str = DEFAULT) -> None:
    """Set one adapter's matrices. ValueError unless they are those of `state`, by name and shape."""
    expected, given = (
        {(each, *value.shape) for each, value in matrices.items()}
        for matrices in (get_peft_model_state_dict(module, adapter_name=name), values)
    )
    if expected != given:
        odd = sorted({each for each, *_ in expected ^ given})
        raise ValueError(f"the adapter does not fit this model and rank: {len(odd)} matrices differ, e.g. {odd[0]}")
    set_peft_model_state_dict(module, values, adapter_name=name)


def base(module: nn.Module) -> dict[str, Tensor]:
    """The base weights, by the names they have without an adapter."""
    weights = module.state_dict().items()
    return {name.replace(".base_layer.", "."): value for name, value in weights if ".lora_" not in name}


def folded(module: nn.Module, name: str = DEFAULT) -> dict[str, tuple[Tensor, Tensor]]:
    """One adapter's matrices with its strength, alpha over rank, in B."""
    adapted = {each: layer for each, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    tensors = state(module, name)
    return {
        layer: (
            tensors[f"{layer}.lora_A.weight"],
            adapted[layer].scaling[name] * tensors[f"{layer}.lora_B.weight"],
        )
        for layer in layers(tensors)
    }


def summed(parts: Iterable[tuple[Matrices, float]]) -> Matrices:
    """One adapter whose change of each weight is the weighted sum of the others': in each layer their ranks add up.
    Those of weight 0 are left out, and a weight of 1 changes no bit."""
    each: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for parted, weight in parts:
        for layer, (a, b) in parted.items() if weight else ():
            each.setdefault(layer, []).append((a, weight * b))
    return {layer: (torch.cat([a for a, _ in of]), torch.cat([b for _, b in of], 1)) for layer, of in each.items()}


def config(module: nn.Module) -> dict[str, Any]:
    """peft's settings of the policy's adapter with the matrices of `folded`: each layer by its name, alpha equal to the
    rank."""
    used, adapted = module.peft_config[DEFAULT], layers(state(module))
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
def acting(module: nn.Module, name: str | None) -> Iterator[None]:
    """Within this block one adapter acts and takes gradients, or with None the base weights alone, to the bit."""
    if name is not None and name not in adapters(module):
        raise ValueError(f"no adapter {name!r}; there are {', '.join(adapters(module)) or 'none'}")
    layers = adapted(module)
    before = None if not layers or layers[0].disable_adapters else layers[0].active_adapters
    again = _split(layers)
    _act(layers, None if name is None else [name])
    try:
        yield
    finally:
        _act(layers, before)
        if again:
            _fuse(layers)


def _act(layers: Sequence[BaseTunerLayer], names: Sequence[str] | None) -> None:
    for layer in layers:
        layer.enable_adapters(names is not None)
        if names is not None:
            layer.set_adapter([*names])


@contextmanager
def fused(module: nn.Module) -> Iterator[None]:
    """Within this block the acting adapter is part of the weights, `W + s B A`, which saves its share of each forward;
    it takes no gradients, and must not be changed. Another may act within `acting`. Afterwards the weights are the
    tensors of before. Where a weight is not a plain float32 tensor, or no adapter acts, nothing changes."""
    layers = adapted(module)
    if any(layer.merged for layer in layers):
        yield
        return
    try:
        _fuse(layers)
        yield
    finally:
        _split(layers)


def adapted(module: nn.Module) -> list[BaseTunerLayer]:
    """The layers that have an adapter beside them."""
    return [each for each in module.modules() if isinstance(each, BaseTunerLayer)]


@torch.no_grad()
def _fuse(layers: Sequence[BaseTunerLayer]) -> None:
    plain = (type(w.data) is Tensor and w.dtype == torch.float32 for w in (layer.base_layer.weight for layer in layers))
    if any(layer.disable_adapters or len(layer.active_adapters) != 1 for layer in layers) or not all(plain):
        return
    for layer in layers:
        [name] = layer.active_adapters
        if name in layer.lora_A:
            weight, a, b = layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
            layer.before = weight.data  # kept, because subtracting B A again would not give its bits
            weight.data = torch.addmm(weight.data, b, a, alpha=layer.scaling[name])
            layer.merged_adapters.append(name)


def _split(layers: Sequence[BaseTunerLayer]) -> bool:
    """Take an adapter out of the weights again; whether one was in them."""
    merged = [layer for layer in layers if layer.merged]
    for layer in merged:
        layer.base_layer.weight.data = layer.__dict__.pop("before")
        layer.merged_adapters.clear()
    return bool(merged)


def remove(module: nn.Module, name: str) -> None:
    """Take an adapter off the network."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter .* was active", UserWarning)
        module.delete_adapters(name)
