"""LoRA on linear layers of a transformers model, by peft: W + alpha / rank B A with A [rank, in] and B [out, rank], in
float32. The base weights are frozen.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

ADAPTER = "default"  # peft's name of it
MOST = 2**10  # its rank


def layers_of(model: nn.Module, targets: Sequence[str], vision: bool) -> list[str]:
    """The linear layers of the language model whose names end in one of `targets`; with `vision`, also all linear
    layers of the vision tower and of what connects the two. ValueError if a target is the end of no name."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    linear = {name: layer for name, layer in model.base_model.named_modules(prefix=model.base_model_prefix)
              if isinstance(layer, nn.Linear)}  # fmt: skip
    language = [name for name, layer in linear.items() if id(layer) in decoder]
    for target in targets:
        if not any(name.rpartition(".")[2] == target for name in language):
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in language}))
            raise ValueError(f"targets: {target!r} is not a linear layer of the language model; there are {ends}")
    adapted = [name for name in language if name.rpartition(".")[2] in targets]
    return adapted + ([name for name in linear if name not in {*language}] if vision else [])


def attach(model: nn.Module, layers: Sequence[str], rank: int, alpha: float) -> dict[str, nn.Parameter]:
    """Freeze the model, add an adapter to these layers, and return its matrices as "layer.A" and "layer.B". ValueError
    for a layer that is not a linear layer of the model."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if others := [name for name in layers if name not in linear]:
        raise ValueError(f"the base has no linear layer {others[0][:100]!r}")
    model.requires_grad_(False)
    with torch.random.fork_rng():  # peft's random matrices are replaced by `begin`
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=[*layers]), model, ADAPTER)
    matrices: dict[str, nn.Parameter] = {}
    for name in layers:
        layer = model.get_submodule(name)
        for letter, matrix in (("A", layer.lora_A[ADAPTER]), ("B", layer.lora_B[ADAPTER])):
            matrix.weight.data = matrix.weight.data.float()
            matrices[f"{name}.{letter}"] = matrix.weight
    return matrices


def use(model: nn.Module, matrices: Mapping[str, Tensor]) -> None:
    """Let the adapter have these frozen matrices, named as `attach` does. They replace those before, which a graph may
    still need."""
    for name, value in matrices.items():
        layer, _, letter = name.rpartition(".")
        matrix = getattr(model.get_submodule(layer), f"lora_{letter}")[ADAPTER]
        matrix.weight = nn.Parameter(value, requires_grad=False)


@torch.no_grad()
def begin(matrices: Mapping[str, Tensor], generator: torch.Generator) -> None:
    """Random A and zero B, which change no output."""
    for name, matrix in matrices.items():
        if name.endswith(".A"):
            drawn = torch.empty(matrix.shape)
            nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
            matrix.copy_(drawn)
        else:
            matrix.zero_()
