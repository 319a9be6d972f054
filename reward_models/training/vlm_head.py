"""`vlm_head`: heads (`reward_models.training.heads`) on the features of a frozen image-text model of transformers
(`vlm_base.Base.features`), which are computed once and stay in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from reward_models.images import rounded
from reward_models.lengths import Reader
from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.training import data, folder as folders, heads, vlm_base
from reward_models.training.data import Progress, Split
from reward_models.training.folder import Model, Workplace
from reward_models.training.heads import Heads
from reward_models.training.vlm_base import Base, Reading
from reward_models.types import Images
from reward_models.weights import fingerprint, read


@dataclass(frozen=True)
class VlmHead(Reading, Heads):
    """`base`: folder or hub id of an image-text model. `instruction`, `pool`, `pixels`, `dtype`: how it reads
    (`vlm_base.Reading`)."""

    batch: Annotated[int, Ge(1)] = 8

    type = "vlm_head"

    def __call__(self, parts: Split, work: Workplace, device: str, seed: int, progress: Progress) -> Model:
        """The heads trained on `parts.train` and stopped by `parts.stop`."""
        base = Base(self.base, vlm_base.reading_of(self), device)
        a, b = encode(base, [*parts.train, *parts.stop], self.batch, progress)
        weights, config, points = heads.trained(self, a, b, parts, seed, progress)
        return Model(weights, vlm_base.described(self.base, base) | config, points)

    @staticmethod
    def opened(
        folder: Path, config: Mapping[str, Any], outputs: int, base: str | None, device: str, batch: int
    ) -> "OnVlm":
        """The model of a folder for scoring."""
        model, weights = vlm_base.reopened(config, base, device), read(folder / folders.WEIGHTS)
        return OnVlm(model, heads.read(weights, config, model.width, outputs).to(device), fingerprint(weights))


class OnVlm:
    """Heads on an image-text model: a `folder.Opened`."""

    def __init__(self, base: Base, heads: nn.ModuleList, trained: str):
        self.base, self.heads, self.trained = base, heads, trained
        self.members, self.size, self.settings = len(heads), base.size, base.settings
        self.checkpoint = folders.joined([base.checkpoint, trained])

    def readers(self) -> list[Reader]:
        return []

    def outputs(self, images: Images, texts: Sequence[str], exact: bool = False) -> Float[Tensor, "E N O"]:
        features = self.base.features([*images], texts, exact)
        return torch.stack([head(features) for head in self.heads])


@torch.no_grad()
def encode(
    base: Base, pairs: Sequence[Pair], batch: int, progress: Progress
) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N F"]]:
    """The features of the images a and b of each pair. A picture is read once with each of its texts."""
    numbers: dict[tuple[Stored, str], int] = {}

    def row_of(picture: Stored, pair: Pair) -> int:
        return numbers.setdefault((picture, pair.prompt.text), len(numbers))

    rows = torch.tensor([[row_of(pair.a, pair), row_of(pair.b, pair)] for pair in pairs], device=base.device)
    distinct, parts = [*numbers], []
    starts = range(0, len(distinct), batch)
    for start in progress(starts, 0, len(starts), "encoding", "batches"):
        some = distinct[start : start + batch]
        pictures = [rounded(data.read(picture))[0] for picture, _ in some]
        parts.append(base.features(pictures, [text for _, text in some]))
    features = torch.cat(parts)
    return features[rows[:, 0]], features[rows[:, 1]]
