"""Find, read and name the weights of a scorer."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn


@contextmanager
def loading(scorer: str, what: str) -> Iterator[None]:
    """Whatever goes wrong while `what` is loaded is a ValueError of one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{scorer}: {what} could not be loaded: {' '.join(str(error).split())}") from error


def named(place: str) -> str:
    """How a card calls weights: a hub id as it is, a folder or file by its name, wherever it lies."""
    return Path(place).name if Path(place).exists() else place


def located(place: str, file: str) -> Path:
    """A file of weights: `place` itself if it is one, else `file` in the folder or hub repository `place`."""
    from huggingface_hub import hf_hub_download

    path = Path(place)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            raise ValueError(f"no {file} in {place}")
        return path / file
    return Path(hf_hub_download(place, file))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file, by name. A PyTorch file is read without executing anything in it;
    a state dict under the key `state_dict` or `model` is taken out. ValueError if there is more in it."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path.name} holds more than tensors, or none; it is not read") from error
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found.get(key), Mapping) else found
    return dict(found)


def pretrained(kind: type, place: str, **settings) -> nn.Module:
    """A transformers model of `kind` from a folder or hub id, ready to look at things. RuntimeError if the checkpoint
    lacks weights: transformers would fill them with random numbers and only say so in a warning."""
    model, info = kind.from_pretrained(place, output_loading_info=True, trust_remote_code=False, **settings)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise RuntimeError(f"the checkpoint lacks {len(missing)} weights of {type(model).__name__}, e.g. {missing[0]}")
    return model.eval()


def fingerprint(*models: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all parameters and buffers, whatever file they came from."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def linear_chain(
    weights: Mapping[str, Tensor], prefix: str = "layers.", between: type[nn.Module] = nn.Identity
) -> nn.Sequential:
    """Linear layers one after another, as the heads of many reward models are; sizes as in the weights
    (`{prefix}{number}.weight`). `between` is the activation, if there is any; dropouts do nothing here and are left
    out. RuntimeError if there are no layers or they do not fit each other."""
    numbers = sorted(
        int(name.removeprefix(prefix).removesuffix(".weight"))
        for name in weights
        if name.startswith(prefix) and name.endswith(".weight")
    )
    shapes = [weights[f"{prefix}{number}.weight"].shape for number in numbers]
    if not shapes or any(one[0] != two[1] for one, two in pairwise(shapes)):
        raise RuntimeError(f"no chain of linear layers called {prefix}N in the weights")
    chain = nn.Sequential()
    for number, (high, wide) in zip(numbers, shapes, strict=True):
        if number != numbers[0]:
            chain.append(between())
        layer = nn.Linear(wide, high, bias=f"{prefix}{number}.bias" in weights)
        layer.load_state_dict({name: weights[f"{prefix}{number}.{name}"] for name, _ in layer.named_parameters()})
        chain.append(layer)
    return chain.eval()
