"""The CLIP model that reward models are built on, and its embeddings of pictures and texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_models.images import rounded
from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.scorers.clip import Clip, clip
from reward_models.training.data import Progress, read
from reward_models.weights import named

EMBEDDED = ""  # the name of the embedded model
SOURCE = ("model", "pretrained", "checkpoint")  # what a file says of the model: where it is, and its hash


def opened(model: str, pretrained: str, device: str, batch: int) -> Clip:
    """The embedded CLIP (""), a folder of open_clip, or one of its models with a tag. ValueError."""
    if ":" in model:
        raise ValueError(f"base {model!r}: the name of a folder, or of a model of open_clip, is needed")
    return clip(model or None, pretrained or None, device, batch)


def described(model: str, pretrained: str, base: Clip) -> dict[str, Any]:
    """What a folder's config says of the base model."""
    source = {"model": model, "pretrained": pretrained, "checkpoint": base.card.checkpoint}
    return {"base": source, "licence": base.card.licence}


def reopened(source: Mapping[str, str], given: str | None, device: str, batch: int) -> Clip:
    """The model that a file names as its `SOURCE`, if its weights have the hash there. `given`: the user's name for it,
    without which only the embedded model and those of open_clip's list are opened. ValueError."""
    import open_clip

    model = source["model"] if given is None else given
    if given is None and model and model.replace("/", "-") not in open_clip.list_models():
        raise ValueError(f"the base is {named(model)[:100]!r}, not a model of open_clip; give its folder as `base`")
    result = opened(model, source["pretrained"], device, batch)
    same(source["checkpoint"], result.card.checkpoint, model or "the embedded CLIP")
    return result


def same(trained_on: str, checkpoint: str, name: str) -> None:
    """ValueError unless a base model has the hash of that which was trained on."""
    if checkpoint != trained_on:
        raise ValueError(f"it was trained on a base with the hash {trained_on[:12]}, {name} has {checkpoint[:12]}")


@dataclass(frozen=True)
class Encoded:
    """Normalised embeddings of `M` distinct pictures and `L` distinct texts, and the rows of `N` pairs among them."""

    images: Float[Tensor, "M D"]
    texts: Float[Tensor, "L D"]
    a: Int[Tensor, "N"]
    b: Int[Tensor, "N"]
    text: Int[Tensor, "N"]

    def side(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N F"]:
        """The features of one side of the pairs: `rows` is `a` or `b`."""
        return features(self.images[rows], self.texts[self.text])


def features(image: Float[Tensor, "N D"], text: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
    """Image, text, their product by elements and their cosine, F = 3 D + 1 numbers for each image."""
    product = image * text
    return torch.cat([image, text, product, product.sum(1, keepdim=True)], 1)


@torch.no_grad()
def encode(base: Clip, pairs: Sequence[Pair], progress: Progress) -> Encoded:
    """The embeddings of all pictures and texts of the pairs, each computed once."""
    numbers: dict[Stored, int] = {}
    of_pair = [(numbers.setdefault(p.a, len(numbers)), numbers.setdefault(p.b, len(numbers))) for p in pairs]
    texts = {text: i for i, text in enumerate(dict.fromkeys(pair.prompt.text for pair in pairs))}
    pictures, parts = [*numbers], []
    starts = range(0, len(pictures), base.batch)
    for start in progress(starts, 0, len(starts), "encoding", "batches"):
        some = pictures[start : start + base.batch]
        prepared = [base.prepared(rounded(read(picture))) for picture in some]
        parts.append(base.model.encode_image(torch.cat(prepared), normalize=True))
    rows = torch.tensor(of_pair, device=base.device)
    return Encoded(
        torch.cat(parts),
        encode_texts(base, [*texts]),
        rows[:, 0],
        rows[:, 1],
        torch.tensor([texts[pair.prompt.text] for pair in pairs], device=base.device),
    )


def encode_distinct(base: Clip, texts: Sequence[str]) -> Float[Tensor, "N D"]:
    """The normalised embedding of each text; equal ones are computed once."""
    row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return encode_texts(base, [*row])[[row[text] for text in texts]]


def encode_texts(base: Clip, texts: Sequence[str]) -> Float[Tensor, "L D"]:
    """The normalised embeddings of texts."""
    parts = [texts[start : start + base.batch] for start in range(0, len(texts), base.batch)]
    return torch.cat(
        [base.model.encode_text(base.tokenizer([*some]).to(base.device), normalize=True) for some in parts]
    )
