"""`clip`: both towers of a CLIP model, fine-tuned as PickScore does (arXiv 2305.01569): the score is the logit scale
times the cosine of image and text. With aspects, the score of each is the logit scale times a weighted cosine, the sum
over the dimensions of weight, image and text. A weight is 1 + `RATE` times what is trained, which begins at 0.

The folder is also one of open_clip's `local-dir` layout; of several members, each has a folder of its number.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor, nn

from reward_models import files, limits
from reward_models.images import rounded
from reward_models.lengths import Reader
from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.scorers.clip import TINY, Clip, clip
from reward_models.training import base as bases, data, folder as folders, heads
from reward_models.training.data import Progress, Split
from reward_models.training.finetuning import Training, Tuning
from reward_models.training.folder import Model, Workplace
from reward_models.training.statistics import temperature
from reward_models.types import Images
from reward_models.weights import fingerprint, read

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
HIGHEST = math.log(100)  # of the logarithm of the logit scale, as in CLIP
ASPECTS = "aspects"  # the name of what is trained of the weights of cosines
RATE = 30.0  # how much faster such a weight moves than those of the towers


@dataclass(frozen=True)
class ClipTowers(Tuning):
    """`base`, `pretrained`: as for `clip_head`. `towers`: those that are trained, beside the logit scale; the text
    tower can learn its few prompts by heart. `rescale`: begin with the logit scale that fits the pairs most closely,
    because that of a contrastive model is too sure of small differences."""

    loss: Literal["bradley_terry", "rao_kupper", "davidson"] = "bradley_terry"
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    pretrained: str = ""
    towers: Literal["both", "image"] = "both"
    rescale: bool = True

    type = "clip"

    def __call__(self, parts: Split, work: Workplace, device: str, seed: int, progress: Progress) -> Model:
        """The models trained on `parts.train` and stopped by `parts.stop`. Their files are written to `work.folder`."""
        base = bases.opened(self.base, self.pretrained, device, self.batch)
        config = _config(self.base, base)
        described = bases.described(self.base, self.pretrained, base)
        names = data.components(parts.train, self.typed)
        training = Training(self, Towers(self, base, len(names) - 1), names, work)
        hashes: list[str] = []

        def finished(member: int, weights: Mapping[str, Tensor]) -> None:
            _write(folders.of_member(work.folder, member, self.members), config, self.base, weights)

        points = training.run(parts, seed, progress, finished)
        for member in range(self.members):
            place = folders.of_member(work.folder, member, self.members)
            aspects = read(place / folders.WEIGHTS) if len(names) > 1 else {}
            hashes.append(fingerprint(read(place / WEIGHTS), aspects))
        return Model(
            {},
            described
            | {
                "components": names,
                "members": self.members,
                "hidden": 0,
                "weights": folders.joined(hashes),
                "loss": self.loss,
            },
            points,
        )

    @staticmethod
    def opened(
        folder: Path, config: Mapping[str, Any], outputs: int, base: str | None, device: str, batch: int
    ) -> "Cosines":
        """The models of a folder for scoring."""
        members, count = max(1, config["members"]), len(config["components"]) - 1
        models = [clip(str(folders.of_member(folder, m, members)), None, device, batch) for m in range(members)]
        if not count:
            return Cosines(models, [None] * members)
        aspects = [read(folders.of_member(folder, m, members) / folders.WEIGHTS) for m in range(members)]
        for model, weights in zip(models, aspects, strict=True):
            heads.check(weights, {ASPECTS: (count, bases.encode_texts(model, ["a"]).shape[1])})
        return Cosines(models, [weights[ASPECTS].to(device) for weights in aspects])


def cosines(
    image: Float[Tensor, "N D"], text: Float[Tensor, "N D"], aspects: Float[Tensor, "A D"] | None
) -> Float[Tensor, "N K"]:
    """The cosine of image and text, and the weighted cosine of each aspect."""
    product = image * text
    cosine = product.sum(-1, keepdim=True)
    return cosine if aspects is None else torch.cat([cosine, product @ (1 + RATE * aspects).T], 1)


class Cosines:
    """Fine-tuned CLIP models: a `folder.Opened`."""

    def __init__(self, models: Sequence[Clip], aspects: Sequence[Tensor | None]):
        self.models, self.aspects = models, aspects
        self.members, self.size, self.settings = len(models), models[0].card.size, {}
        hashes = [
            model.card.checkpoint if weights is None else fingerprint(model.model, {ASPECTS: weights})
            for model, weights in zip(models, aspects, strict=True)
        ]
        self.trained = self.checkpoint = folders.joined(hashes)

    def readers(self) -> list[Reader]:
        return self.models[0].readers()

    def outputs(self, images: Images, texts: Sequence[str], exact: bool = False) -> Float[Tensor, "E N O"]:
        members = []
        for member, aspects in zip(self.models, self.aspects, strict=True):
            image = member.model.encode_image(member.prepared(images), normalize=True)
            scale = member.model.logit_scale.exp()
            members.append(scale * cosines(image, bases.encode_distinct(member, texts), aspects))
        return torch.stack(members)


class Towers:
    """A CLIP model in training: a `finetuning.Network`."""

    def __init__(self, method: ClipTowers, base: Clip, aspects: int):
        self.method, self.base, self.device = method, base, base.device
        size = bases.encode_texts(base, ["a"]).shape[1]
        self.aspects = nn.Parameter(torch.zeros(aspects, size, device=base.device)) if aspects else None
        trained = [*base.model.visual.parameters()] if method.towers == "image" else [*base.model.parameters()]
        trained += [base.model.logit_scale] + ([] if self.aspects is None else [self.aspects])
        self.parameters = [*{id(p): p.requires_grad_() for p in trained}.values()]
        self.start = {name: value.detach().clone() for name, value in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        return self.base.model.state_dict() | ({} if self.aspects is None else {ASPECTS: self.aspects.data})

    @torch.no_grad()
    def begin(self, pairs: Sequence[Pair], seed: int) -> None:
        """The base model; if the logit scale is to fit, divided by the temperature with the least loss on the pairs."""
        for name, value in self.tensors().items():
            value.copy_(self.start[name])
        if not self.method.rescale:
            return
        preference = data.preferences(pairs)
        parts = [pairs[start : start + self.method.batch] for start in range(0, len(pairs), self.method.batch)]
        scores = torch.cat([self.outputs(*_sides(some)) for some in parts])[:, 0, 0].unflatten(0, (-1, 2)).cpu()
        decided = preference != 0.5
        if decided.any():
            truth = (preference[decided] > 0.5).double().numpy()
            factor = temperature((scores[:, 0] - scores[:, 1])[decided].double().numpy(), truth)
            self.base.model.logit_scale -= math.log(factor)
            self.bound()

    def outputs(self, pictures: Sequence[Stored], texts: Sequence[str]) -> Float[Tensor, "M K 1"]:
        text = bases.encode_distinct(self.base, texts)
        pixels = torch.cat([self.base.prepared(rounded(data.read(picture))) for picture in pictures])
        image = self.base.model.encode_image(pixels, normalize=True)
        return (self.base.model.logit_scale.exp() * cosines(image, text, self.aspects))[..., None]

    def bound(self) -> None:
        self.base.model.logit_scale.clamp_(max=HIGHEST)


def _sides(pairs: Sequence[Pair]) -> tuple[list[Stored], list[str]]:
    return [side for pair in pairs for side in (pair.a, pair.b)], [pair.prompt.text for pair in pairs for _ in range(2)]


def _config(source: str, base: Clip) -> dict[str, Any]:
    """open_clip's config of the base model."""
    import open_clip

    folder = Path(source or TINY)
    if folder.is_dir():
        return files.parsed(files.text(folder / CONFIG, limits.CONFIG))
    preprocess = open_clip.get_model_preprocess_cfg(base.model)
    quick = {"quick_gelu": True} if base.card.settings.get("quick_gelu") else {}
    return {
        "model_cfg": open_clip.get_model_config(source.replace("/", "-")) | quick,
        "preprocess_cfg": {key: preprocess[key] for key in ("size", "mean", "std", "interpolation", "resize_mode")},
    }


def _write(folder: Path, config: Mapping[str, Any], source: str, weights: Mapping[str, Tensor]) -> None:
    """open_clip's files, and the weights of aspects; the tokenizer's are copied from a base that has its tokenizer in
    its folder."""
    from safetensors.torch import save

    files.make_folder(folder)
    towers = {name: value.contiguous() for name, value in weights.items() if name != ASPECTS}
    if ASPECTS in weights:
        files.replace(folder / folders.WEIGHTS, save({ASPECTS: weights[ASPECTS].contiguous()}))
    files.replace(folder / WEIGHTS, save(towers))
    files.replace(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
    place = Path(source or TINY)
    for name in TOKENIZER:
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)
