"""Find, read and name the weights of a scorer."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from reward_models import model_folders
from reward_models.types import Prompt


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
        model_folders.check(path, named(place))
        if not (path / file).is_file():
            raise ValueError(f"no {file} in {place}")
        return path / file
    return Path(hf_hub_download(place, file))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file, by name. A PyTorch file is read without executing anything in it;
    a state dict under the key `state_dict` or `model` is taken out, and what else stands beside tensors (an epoch) left
    out. ValueError if there are objects in it, or no tensors by name."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path.name} holds more than tensors, or none; it is not read") from error
    for key in ("state_dict", "model"):
        values = values[key] if isinstance(values, Mapping) and isinstance(values.get(key), Mapping) else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{path.name} holds no tensors by name")
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def pretrained(kind: type, place: str, **settings) -> nn.Module:
    """A transformers model of `kind` from a folder or hub id, ready to look at things. RuntimeError if the checkpoint
    lacks weights: transformers would fill them with random numbers and only say so in a warning."""
    from transformers import AutoConfig

    same = model_folders.pinned(place, named(place))
    if not same:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        with torch.device("meta"):
            model_folders.check_size(model_folders.counted(build(config)), place, named(place))
    with quiet():
        model, info = kind.from_pretrained(place, output_loading_info=True, trust_remote_code=False, **same, **settings)
    model_folders.complete(model, info)
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers logs, and its progress bars: what is wrong with a model is raised, if by `complete`."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_on_grey_image(look: Callable) -> None:
    """ValueError unless a scorer's `look` has a number for a grey image; whatever the libraries raise otherwise. A
    folder can be whole and yet describe images that its model does not take."""
    if not look(torch.full((1, 3, 64, 64), 0.5), [Prompt("a")]).isfinite().all():
        raise ValueError("its score of a grey image is not finite")


def fingerprint(*parts: nn.Module | Mapping[str, Tensor], digits: int = 64) -> str:
    """The first `digits` of the SHA-256, in hexadecimal, over the names, types, shapes and bits of all tensors: the
    parameters and buffers of a model, or tensors by name, in whatever order and file they are."""
    digest = hashlib.sha256()
    for part in parts:
        tensors = part.state_dict() if isinstance(part, nn.Module) else part
        for name, value in sorted(tensors.items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:digits]


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
