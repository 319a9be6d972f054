"""`clip_head`: heads (`reward_models.training.heads`) on the features of a frozen CLIP model (`base.features`), which
are computed once and stay in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_models.lengths import Reader
from reward_models.scorers.clip import Clip
from reward_models.training import base as bases, folder as folders, heads
from reward_models.training.data import Progress, Split
from reward_models.training.folder import Model, Workplace
from reward_models.training.heads import Heads
from reward_models.types import Images
from reward_models.weights import fingerprint, read


@dataclass(frozen=True)
class ClipHead(Heads):
    """`base`: "" for the embedded CLIP, a folder in open_clip's layout, or a model of open_clip, then with the tag
    `pretrained`."""

    pretrained: str = ""

    type = "clip_head"

    def __call__(self, parts: Split, work: Workplace, device: str, seed: int, progress: Progress) -> Model:
        """The heads trained on `parts.train` and stopped by `parts.stop`."""
        base = bases.opened(self.base, self.pretrained, device, self.batch)
        encoded = bases.encode(base, [*parts.train, *parts.stop], progress)
        a, b = encoded.side(encoded.a), encoded.side(encoded.b)
        weights, config, points = heads.trained(self, a, b, parts, seed, progress)
        return Model(weights, bases.described(self.base, self.pretrained, base) | config, points)

    @staticmethod
    def opened(
        folder: Path, config: Mapping[str, Any], outputs: int, base: str | None, device: str, batch: int
    ) -> "OnClip":
        """The model of a folder for scoring."""
        clip = bases.reopened(config["base"], base, device, batch)
        weights = read(folder / folders.WEIGHTS)
        features = 3 * bases.encode_texts(clip, ["a"]).shape[1] + 1
        return OnClip(clip, heads.read(weights, config, features, outputs).to(device), fingerprint(weights), weights)


class OnClip:
    """Heads on a CLIP model: a `folder.Opened`."""

    def __init__(self, clip: Clip, heads: nn.ModuleList, trained: str, weights: Mapping[str, Tensor]):
        self.clip, self.heads, self.trained = clip, heads, trained
        self.members, self.size, self.settings = len(heads), clip.card.size, {}
        self.checkpoint = fingerprint(clip.model, weights)

    def readers(self) -> list[Reader]:
        return self.clip.readers()

    def outputs(self, images: Images, texts: Sequence[str], exact: bool = False) -> Float[Tensor, "E N O"]:
        rows = bases.encode_distinct(self.clip, texts)
        features = bases.features(self.clip.model.encode_image(self.clip.prepared(images), normalize=True), rows)
        return torch.stack([head(features) for head in self.heads])
