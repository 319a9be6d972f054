"""Read untrusted safetensors files: regular files of bounded size, whose header is checked before the tensors."""

from pathlib import Path

import safetensors.torch
from torch import Tensor

from reward_models import files, limits


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and the metadata of its header. ValueError, in one line that names the file, for a
    file that is not regular, too large, or not safetensors."""
    try:
        with files.opened(path) as file:
            start = file.read(8 + limits.TENSORS_HEADER)
            metadata = _metadata(_header(start))
            data = start + file.read(max(0, limits.TENSORS + 1 - len(start)))
        if len(data) > limits.TENSORS:
            raise ValueError(f"longer than {limits.TENSORS} bytes")
        return parsed(data), metadata
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def parsed(data: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file. ValueError for anything else."""
    _header(data)
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"not safetensors: {error}") from None


def _header(data: bytes) -> bytes:
    """The header of a file that begins with these bytes."""
    size = int.from_bytes(data[:8], "little")
    if size > limits.TENSORS_HEADER:
        raise ValueError(f"a header of {size} bytes; {limits.TENSORS_HEADER} are allowed")
    if len(data) < 8 + size:
        raise ValueError(f"not safetensors: {len(data)} bytes, too few for its header")
    return data[8 : 8 + size]


def _metadata(header: bytes) -> dict[str, str]:
    content = files.parsed(header)
    metadata = content.get("__metadata__", {}) if isinstance(content, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("not safetensors: its header is not a JSON object of texts")
    return metadata
