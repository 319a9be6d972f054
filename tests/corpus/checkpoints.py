"""Checkpoints and adapters that are not what they say they are, though every hash is right: each builder's note says
what it is. Whoever reads one must refuse it with exit code 2, in one line that names the file."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NAN, INF = float("nan"), float("inf")
OTHERS = (None, True, -1, 0.5, "x", [], {})  # one of each type of JSON


# -------------------------------------------------------------------------------------------------------- checkpoints


def sealed(checkpoint: Path) -> None:
    """Let the manifest vouch for the files as they are."""
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    digests = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in sorted(names)}
    (checkpoint / "manifest.json").write_text(json.dumps(digests))


def restated(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change the state."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    sealed(checkpoint)


def retensored(checkpoint: Path, name: str, change: Callable[[dict], object]) -> None:
    """Change the tensors of a file."""
    file = checkpoint / f"{name}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    sealed(checkpoint)


def rehashed(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Change the adapter, and the hash of it in the state."""
    from reward_models.weights import fingerprint

    retensored(checkpoint, "adapter", change)
    adapter = load_file(checkpoint / "adapter.safetensors")
    restated(checkpoint, lambda state: state.update(adapter_hash=fingerprint(adapter, digits=16)))


def keys(value, path: tuple = ()) -> Iterator[tuple]:
    """The way to each key of nested objects."""
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from keys(value[key], (*path, key))


def _parent(state: dict, way: tuple) -> dict:
    for key in way[:-1]:
        state = state[key]
    return state


def of_state(state: dict) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Each key of a state removed, and with a value of each other type."""
    for way in keys(state):
        name, now = ".".join(way), _parent(state, way)[way[-1]]
        yield f"{name} removed", lambda p, way=way: restated(p, lambda s: _parent(s, way).pop(way[-1]))
        for other in OTHERS:
            if type(other) is not type(now):
                yield (
                    f"{name} is {other!r}",
                    lambda p, way=way, other=other: restated(p, lambda s: _parent(s, way).update({way[-1]: other})),
                )


def of_tensors(name: str, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Each tensor of a file removed, of another shape and type, and with a NaN."""

    def forge(checkpoint: Path, change: Callable[[dict], object]) -> None:
        rehashed(checkpoint, change) if name == "adapter" else retensored(checkpoint, name, change)

    for key, value in tensors.items():
        whole = not value.is_floating_point()
        changed = {
            "of another shape": torch.zeros(*value.shape, 2, dtype=value.dtype),
            "empty": value.new_zeros(0),
            "of another type": value.float() if whole else value.to(torch.float16),
        } | ({} if whole else {"NaN": torch.full_like(value, NAN), "infinite": torch.full_like(value, INF)})
        if value.ndim:
            changed["broadcast"] = value.flatten()[:1].reshape([1] * value.ndim).clone()
        yield f"{name} without {key}", lambda p, key=key: forge(p, lambda t: t.pop(key))
        for what, other in changed.items():
            if what != "broadcast" or other.shape != value.shape:
                yield (
                    f"{key} of {name} {what}",
                    lambda p, key=key, other=other: forge(p, lambda t: t.update({key: other})),
                )
    yield f"{name} with one more", lambda p: forge(p, lambda t: t.update({"7.more": torch.ones(1)}))
    yield f"{name} without any", lambda p: forge(p, lambda t: t.clear())


def replaced(file: Path, by: str) -> None:
    """A file's place taken by something that is no file: a FIFO, a link in a circle, a folder, a device."""
    file.unlink()
    if by == "FIFO":
        os.mkfifo(file)
    elif by == "circle":
        file.symlink_to(file.name)
    elif by == "folder":
        file.mkdir()


def headed(file: Path, size: int) -> None:
    """A safetensors file whose header claims so many bytes."""
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", size) + data[8:])
    sealed(file.parent)


# ----------------------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Forged:
    """What is done to the tensors of a sound LoRA file, by name without what all begin with, and what is said of it."""

    note: str
    change: Callable[[dict[str, torch.Tensor]], object]
    says: str


def _first(tensors: dict, part: str) -> str:
    return next(key for key in sorted(tensors) if key.endswith(part))


ADAPTERS = {
    "no B": Forged("a matrix is missing", lambda t: t.pop(_first(t, "lora_B.weight")), "has no lora_B.weight"),
    "no A": Forged("a matrix is missing", lambda t: t.pop(_first(t, "lora_A.weight")), "has no lora_A.weight"),
    "NaN": Forged("no number", lambda t: t[_first(t, "lora_A.weight")].fill_(NAN), "its matrices are not finite"),
    "infinite": Forged("no number", lambda t: t[_first(t, "lora_B.weight")].fill_(INF), "are not finite"),
    "too large": Forged(
        "finite matrices whose product is not", lambda t: [t[_first(t, f"lora_{s}.weight")].fill_(1e25) for s in "AB"],
        "are not finite",
    ),
    "alpha NaN": Forged(
        "a strength that is no number",
        lambda t: t.update({_first(t, "lora_A.weight")[:-13] + "alpha": torch.tensor(NAN)}), "are not finite",
    ),
    "alpha of two": Forged(
        "a strength that is a row", lambda t: t.update({_first(t, "lora_A.weight")[:-13] + "alpha": torch.ones(2)}),
        "are not a LoRA's A, B and alpha",
    ),
    "rank 0": Forged(
        "matrices without numbers",
        lambda t: t.update(
            {_first(t, "lora_A.weight"): torch.ones(0, 32), _first(t, "lora_B.weight"): torch.ones(32, 0)}
        ),
        "are not a LoRA's A, B and alpha",
    ),
    "other rank in B": Forged(
        "matrices that cannot be multiplied", lambda t: t.update({_first(t, "lora_B.weight"): torch.ones(32, 3)}),
        "are not a LoRA's A, B and alpha",
    ),
    "too wide": Forged(
        "a layer of another model", lambda t: t.update({_first(t, "lora_A.weight"): torch.ones(2, 33)}),
        "and the model's weight is",
    ),
    "whole numbers": Forged(
        "matrices of bytes", lambda t: t.update({_first(t, "lora_A.weight"): torch.ones(2, 32, dtype=torch.uint8)}),
        "are of torch.uint8; float16",
    ),
    "another layer": Forged(
        "a layer that the model does not have",
        lambda t: t.update({f"elsewhere.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}),
        "the model has no linear layer 'elsewhere'",
    ),
    "no linear layer": Forged(
        "a layer whose weight is a vector",
        lambda t: t.update({f"transformer_blocks.0.attn.norm_q.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}),
        "the model has no linear layer 'transformer_blocks.0.attn.norm_q'",
    ),
    "unknown key": Forged(
        "not a LoRA", lambda t: t.update({"x.dora_scale": torch.ones(1)}), "is not a matrix of a LoRA"
    ),
    "alpha alone": Forged("not a LoRA", lambda t: t.update({"x.alpha": torch.ones(())}), "is not a matrix of a LoRA"),
    "nothing": Forged("no tensor at all", lambda t: t.clear(), "begins with none of transformer., diffusion_model."),
}  # fmt: skip
