"""A mixture of scores whose weights depend on the prompt, after MJ-VIDEO (arXiv 2502.01719): the model, and its file.

    score_n = s sum_a g_a(p) sum_{j in a} w_aj(p) z_nj

z are the components in standard deviations from their mean over the pairs that were fitted to; components belong to
aspects. The gates g, softmax over aspects, and the weights w, softmax within an aspect, are linear in the CLIP
embedding of the prompt p. Weights of 0 are the plain mean of the aspects' means. s makes differences of scores
log-odds. MJ-VIDEO reads p and z from one video model, by networks with hidden layers; its temperatures are left out,
because linear weights of another size do the same.

Letters: `N` images, `P` prompts, `K` components, `A` aspects, `D` numbers of an embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from reward_models import files, limits
from reward_models.errors import first_problem
from reward_models.weights import fingerprint

Values = Float[Tensor, "N K"]
Names = Annotated[list[str], Len(1, limits.NAMES)]


class Source(BaseModel):
    """Where the CLIP model is, and the hash of its weights."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model: str
    pretrained: str
    checkpoint: str


class About(BaseModel):
    """What the weights belong to: the components, "scorer.component", with the aspect of each; the versions of their
    scorers; the CLIP model (`reward_models.training.base`); and how they were made."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["experts"] = "experts"
    format: Literal[1] = 1
    components: Names
    aspects: Names
    scorers: dict[str, str]
    base: Source
    made: dict[str, Any]


@dataclass(frozen=True)
class Mixture:
    """The parameters. `aspect [K]` is the number of each component's aspect. An embedding e is read as (e - `centre`) /
    `size`, whose mean square length over the prompts that were fitted to is 1."""

    aspect: Int[Tensor, "K"]
    gates: Float[Tensor, "A D"]
    gate_bias: Float[Tensor, "A"]
    within: Float[Tensor, "K D"]
    within_bias: Float[Tensor, "K"]
    centre: Float[Tensor, "D"]
    size: Float[Tensor, ""]
    mean: Float[Tensor, "K"]
    std: Float[Tensor, "K"]
    log_scale: Float[Tensor, ""]

    def gate(self, embedding: Float[Tensor, "P D"]) -> Float[Tensor, "P A"]:
        """The gates of the prompts, which sum to 1."""
        return (self.read(embedding) @ self.gates.T + self.gate_bias).softmax(1)

    def read(self, embedding: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
        return (embedding - self.centre) / self.size

    def weights(self, embedding: Float[Tensor, "N D"], present: Bool[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """The weight of each component, which sum to 1 over those that are `present`: others have weight 0, and so has
        an aspect without any. NaN where none is present."""
        x = self.read(embedding)
        gates, within = x @ self.gates.T + self.gate_bias, x @ self.within.T + self.within_bias
        member = self.aspect == torch.arange(len(self.gates), device=self.aspect.device)[:, None]
        some = (present[:, None] & member).any(2)
        gates = gates.masked_fill(~some, -torch.inf).softmax(1)
        weights = torch.zeros_like(within)
        for a, members in enumerate(member):
            of_aspect = within[:, members].masked_fill(~present[:, members], -torch.inf).softmax(1)
            of_aspect = torch.where(some[:, a : a + 1], of_aspect, torch.zeros_like(of_aspect))
            weights = weights.index_add(1, members.nonzero()[:, 0], of_aspect * gates[:, a : a + 1])
        return weights

    def score(
        self, values: Values, embedding: Float[Tensor, "N D"], present: Bool[Tensor, "N K"]
    ) -> Float[Tensor, "N"]:
        """The scores of images from their raw components; NaN where a component that is `present` is missing."""
        weights = self.weights(embedding, present)
        z = torch.where(present, (values - self.mean) / self.std, torch.zeros_like(values))
        return self.log_scale.exp() * (weights * z).sum(1)


def flat(aspect: Int[Tensor, "K"], centre: Float[Tensor, "D"], size: float, mean: Tensor, std: Tensor) -> Mixture:
    """The mixture with weights of 0."""
    count, wide = int(aspect.max()) + 1, len(centre)
    zeros = [torch.zeros(shape) for shape in ((count, wide), (count,), (len(aspect), wide), (len(aspect),))]
    return Mixture(aspect, *zeros, centre, torch.tensor(size), mean, std, torch.zeros(()))


# ------------------------------------------------------------------------------------------------------------ its file


def save(path: Path, mixture: Mixture, about: About) -> None:
    """Write the mixture as safetensors, with `about` in the header."""
    from safetensors.torch import save as saved

    tensors = {name: value.contiguous() for name, value in vars(mixture).items()}
    files.replace(path, saved(tensors, {"experts": about.model_dump_json()}))


def read(path: Path) -> tuple[Mixture, About]:
    """The mixture in a file, and what it belongs to. ValueError, in one line, for a file that `save` did not write."""
    try:
        data = files.content(path, limits.STATE)
        about = About.model_validate(files.parsed(_header(data)))
        return _mixture(data, about), about
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise ValueError(f"{path} is not a file of experts: {first_problem(error.errors())}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a file of experts: {error}") from None


def ours(path: Path) -> None:
    """ValueError where another file, which would be lost, is at `path`."""
    if path.exists() and path.stat().st_size:
        try:
            read(path)
        except ValueError as error:
            raise ValueError(f"{error}; it is not overwritten, choose another name or remove it") from None


def _header(data: bytes) -> str:
    """What the header of a safetensors file has under `experts`."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("not safetensors")
    header = files.parsed(data[8 : 8 + length])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("experts"), str):
        raise ValueError("it has no entry `experts`")
    return metadata["experts"]


def _mixture(data: bytes, about: About) -> Mixture:
    """The parameters, if their types, shapes and values fit each other."""
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"not safetensors: {error}") from None
    if tensors.keys() != {field.name for field in fields(Mixture)}:
        raise ValueError(f"its tensors are {', '.join(sorted(tensors))[:200]}")
    if len(about.aspects) != len(about.components) or len({*about.components}) < len(about.components):
        raise ValueError("each component needs one aspect, and to be there once")
    count, high = len(about.components), len({*about.aspects})
    wide = tensors["centre"].numel()
    shapes = {
        "aspect": (count,), "gates": (high, wide), "gate_bias": (high,), "within": (count, wide),
        "within_bias": (count,), "centre": (wide,), "size": (), "mean": (count,), "std": (count,), "log_scale": (),
    }  # fmt: skip
    for name, shape in shapes.items():
        value, kind = tensors[name], torch.int64 if name == "aspect" else torch.float32
        if tuple(value.shape) != shape or value.dtype != kind or not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be {list(shape)} {kind}, finite; it is {list(value.shape)} {value.dtype}")
    if tensors["aspect"].tolist() != numbered(about.aspects):
        raise ValueError("the numbers of the aspects are not those of their names")
    if not bool((tensors["std"] > 0).all()) or not bool(tensors["size"] > 0):
        raise ValueError("std and size must be above 0")
    return Mixture(**tensors)


def numbered(aspects: Sequence[str]) -> list[int]:
    """The number of each component's aspect, in the order of first appearance."""
    number = {name: k for k, name in enumerate(dict.fromkeys(aspects))}
    return [number[name] for name in aspects]


def hash_of(mixture: Mixture, about: About) -> str:
    """A hash of the parameters and of what they belong to."""
    return fingerprint(dict(vars(mixture)), {"about": torch.tensor([*about.model_dump_json().encode()])}, digits=16)


def check_scorers(path: Any, about: About, versions: Mapping[str, str]) -> None:
    """ValueError unless the scorers have the versions that the mixture was fitted with."""
    for name, version in about.scorers.items():
        if versions.get(name) != version:
            raise ValueError(
                f"{path} was fitted with {name} {version}, this run has {versions.get(name, 'no such scorer')}; fit it "
                "again"
            )
