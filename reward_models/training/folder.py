"""The folder of a fitted reward model: safetensors and JSON, written in an order that shows whether it is complete.

`weights.safetensors` (or, for fine-tuned CLIP, open_clip's own files), `config.json` (what it is, and the base model by
the hash of its weights), `curves.json`, `prompts.json` (the prompts that were trained on, as hashes of their meaning),
and last `card.json` (data, split, accuracies).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from reward_models import files, limits
from reward_models.lengths import Reader
from reward_models.meaning import meaning
from reward_models.training.curves import Point
from reward_models.types import Images

WEIGHTS, CONFIG, CURVES, CARD = "weights.safetensors", "config.json", "curves.json", "card.json"
PROMPTS = "prompts.json"
CHECKPOINT = "checkpoint.safetensors"
KIND = "reward model"
FORMAT = 1


@dataclass(frozen=True)
class Model:
    """What a method has trained.

    `weights`: for `weights.safetensors`, none if the method has written its files. `config`: what is needed to score
    with it: `base` (model, tag, hash of its weights), `licence`, `components`, `loss`, `members` (heads; 0: the model
    itself gives the score), `hidden`, and `weights`, the hash of what was trained. `points`: the course of the
    training.
    """

    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Workplace:
    """The folder that a method may write its own files to, and the `key` of what is being trained (data, split and
    settings), under which a checkpoint is continued."""

    folder: Path
    key: str


@runtime_checkable
class Opened(Protocol):
    """A trained model that scores. `members`: models whose mean is the score. `trained`: the hash of what was trained;
    `checkpoint`: of that and its base. `size`: how images are resized. `settings`: what else changes a score.
    `outputs`: the O numbers of the loss for each member, image and component, those of a component together, in a graph
    that reaches the pixels if the images are `exact`, that is, not to be rounded to 8 bits."""

    members: int
    trained: str
    checkpoint: str
    size: str
    settings: Mapping[str, Any]

    def readers(self) -> list[Reader]: ...

    def outputs(self, images: Images, texts: Sequence[str], exact: bool = False) -> Float[Tensor, "E N O"]: ...


def of_member(folder: Path, member: int, members: int) -> Path:
    """Where the files of a member are: the folder itself if there is one alone."""
    return folder / str(member) if members > 1 else folder


def joined(hashes: Sequence[str]) -> str:
    """One hash for the hashes of members."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def check_new(folder: Path) -> None:
    """Make the folder. ValueError where a finished model, or anything but an unfinished one, is there already."""
    if (folder / CARD).exists():
        raise ValueError(f"{folder}: a fitted model is there already; choose another folder or remove it")
    if folder.is_dir() and (others := sorted(path.name for path in folder.iterdir() if not ours(path))):
        raise ValueError(f"{folder}: {others[0]} is there, which is not a fitted model's; choose an empty folder")
    files.make_folder(folder)


OURS = {
    WEIGHTS, CONFIG, CURVES, PROMPTS, CHECKPOINT, "open_clip_config.json", "open_clip_model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
}  # fmt: skip
REMAINS = {f".{name}.partial" for name in (*OURS, CARD)}  # of a write that was cut off


def ours(path: Path) -> bool:
    """Whether an unfinished model has such a file, or beside its checkpoint a folder of a member."""
    return path.name in OURS | REMAINS or (path.name.isdecimal() and (path.parent / CHECKPOINT).exists())


def write(folder: Path, method: str, model: Model) -> None:
    """Write weights, curves and config."""
    from safetensors.torch import save

    if model.weights:
        files.replace(folder / WEIGHTS, save(dict(model.weights)))
    put(folder / CURVES, [point.record() for point in model.points])
    put(folder / CONFIG, {"kind": KIND, "format": FORMAT, "fit": method, **model.config})


def put(path: Path, value: Any) -> None:
    files.replace(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read(folder: Path) -> dict[str, Any]:
    """The config of a fitted model. ValueError, in one line, if it is none or of another format."""
    config = files.parsed(files.text(folder / CONFIG, limits.CONFIG))
    if not isinstance(config, dict) or config.get("kind") != KIND:
        raise ValueError(f"{CONFIG} does not describe a fitted reward model")
    if config.get("format") != FORMAT:
        raise ValueError(f"{CONFIG}: format {str(config.get('format'))[:20]}; {FORMAT} is read")
    return config


def points(folder: Path) -> list[dict[str, Any]]:
    """The course of the training, a record of `curves.Point` for each epoch."""
    return files.parsed(files.text(folder / CURVES, limits.CONFIG))


def digest_of(text: str) -> str:
    """12 hexadecimal digits of the SHA-256 of a prompt's meaning."""
    return hashlib.sha256(meaning(text).encode()).hexdigest()[:12]


def put_prompts(folder: Path, texts: Iterable[str]) -> None:
    """Record the prompts that a model was trained on, or stopped by."""
    files.replace(folder / PROMPTS, (json.dumps(sorted({digest_of(text) for text in texts})) + "\n").encode())


def trained_prompts(folder: Path) -> set[str]:
    """The `digest_of` the prompts that the model was trained on. ValueError, in one line, without a record of them."""
    if not (folder / PROMPTS).exists():
        raise ValueError(f"{folder}: no {PROMPTS}, which names the prompts that it was trained on; fit the model again")
    digests = files.parsed(files.text(folder / PROMPTS, limits.JSON))
    if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
        raise ValueError(f"{folder / PROMPTS}: not a list of prompts as hashes")
    return {*digests}
