"""Locate, load and fingerprint the weights of scorers."""

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


def named(source: str) -> str:
    """The name of weights on a card: a hub id unchanged, a folder or file without its path."""
    return Path(source).name if Path(source).exists() else source


def located(source: str, file: str) -> Path:
    """A file of weights: `source` itself if it is one, else `file` in the folder or hub repository `source`."""
    from huggingface_hub import hf_hub_download

    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        model_folders.check(path, named(source))
        if not (path / file).is_file():
            raise ValueError(f"no {file} in {source}")
        return path / file
    return Path(hf_hub_download(source, file))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file, by name. A PyTorch file is read without executing anything in it;
    a state dict under the key `state_dict` or `model` is unwrapped, and other values beside tensors (an epoch) are
    dropped. ValueError if it contains other objects, or no named tensors."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path.name} contains objects other than tensors; it is not read") from error
    for key in ("state_dict", "model"):
        values = values[key] if isinstance(values, Mapping) and isinstance(values.get(key), Mapping) else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{path.name} contains no named tensors")
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def pretrained(kind: type, source: str, **settings) -> nn.Module:
    """A transformers model of `kind` from a folder or hub id, in eval mode and frozen. RuntimeError if the checkpoint
    lacks weights, which transformers would initialise at random with only a warning."""
    from transformers import AutoConfig

    revision = model_folders.pinned(source, named(source))
    if not revision:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        with torch.device("meta"):
            model_folders.check_size(model_folders.counted(build(config)), source, named(source))
    with quiet():
        model, info = kind.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False, **revision, **settings
        )
    model_folders.complete(model, info)
    return model.eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and progress bars of transformers; real problems raise, for example in `complete`."""
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


def check_on_grey_image(score_batch: Callable) -> None:
    """ValueError unless a scorer's `score_batch` gives a finite score for a grey image; errors of libraries pass
    through. The files of a folder can be complete and still not fit each other."""
    if not score_batch(torch.full((1, 3, 64, 64), 0.5), [Prompt("a")]).isfinite().all():
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
    """A chain of linear layers, as in the heads of many reward models, with the sizes of the weights
    (`{prefix}{number}.weight`), frozen. `between` is the activation, if any; dropout is omitted. RuntimeError for no
    layers, or sizes that do not match."""
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
    return chain.eval().requires_grad_(False)
