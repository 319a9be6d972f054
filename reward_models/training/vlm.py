"""`vlm`: an image-text model of transformers with LoRA and a head on its pooled hidden state, in the form of HPSv3
(arXiv 2508.03789): with the loss `thurstone` it gives mu and log sigma of an image, and P(a > b) = Phi((mu_a - mu_b) /
sqrt(sigma_a^2 + sigma_b^2)). The vision tower is frozen unless `vision`.

The folder holds the adapter and the head, not the base; of several members, each has a folder of its number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor

from reward_models import files
from reward_models.images import rounded
from reward_models.lengths import Reader
from reward_models.pairs import Pair
from reward_models.pictures import Stored
from reward_models.training import data, folder as folders, heads, lora, vlm_base
from reward_models.training.data import Progress, Split
from reward_models.training.finetuning import Training, Tuning
from reward_models.training.folder import Model, Workplace
from reward_models.training.losses import LOSSES
from reward_models.training.vlm_base import Base, Reading
from reward_models.types import Images
from reward_models.weights import fingerprint, read

ADAPTER, HEAD = "adapter.", "head."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Vlm(Reading, Tuning):
    """`base`: folder or hub id of an image-text model. `instruction`, `pool`, `pixels`, `dtype`: how it reads
    (`vlm_base.Reading`). `hidden`: units of the head's hidden layer, 0 for a linear head. `rank`, `alpha`: of the LoRA.
    `targets`: the ends of the names of the language model's linear layers that it is on. `vision`: also on all linear
    layers of the vision tower and of what connects the two."""

    loss: Literal["bradley_terry", "rao_kupper", "davidson", "thurstone"] = "thurstone"
    batch: Annotated[int, Ge(1)] = 8
    hidden: Annotated[int, Ge(0), Le(2**14)] = 0
    rank: Annotated[int, Ge(1), Le(lora.MOST)] = 16
    alpha: Annotated[float, Gt(0)] = 32.0
    targets: tuple[str, ...] = ATTENTION
    vision: bool = False

    type = "vlm"

    def __call__(self, parts: Split, work: Workplace, device: str, seed: int, progress: Progress) -> Model:
        """The models trained on `parts.train` and stopped by `parts.stop`. Their files are written to `work.folder`."""
        base = Base(self.base, vlm_base.reading_of(self), device)
        described = vlm_base.described(self.base, base)
        names = data.components(parts.train, self.typed)
        network = Adapted(self, base, len(names), LOSSES[self.loss].outputs)

        def finished(member: int, weights: Mapping[str, Tensor]) -> None:
            _write(folders.of_member(work.folder, member, self.members), weights, self.alpha / self.rank)

        points = Training(self, network, names, work).run(parts, seed, progress, finished)
        places = [folders.of_member(work.folder, member, self.members) for member in range(self.members)]
        config = {
            "components": names,
            "members": self.members,
            "hidden": self.hidden,
            "weights": folders.joined([fingerprint(read(place / folders.WEIGHTS)) for place in places]),
            "loss": self.loss,
        }
        return Model({}, described | config, points)

    @staticmethod
    def opened(
        folder: Path, config: Mapping[str, Any], outputs: int, base: str | None, device: str, batch: int
    ) -> "Judges":
        """The models of a folder for scoring."""
        members = max(1, config["members"])
        places = [folders.of_member(folder, member, members) for member in range(members)]
        weights = [read(place / folders.WEIGHTS) for place in places]
        return Judges(vlm_base.reopened(config, base, device), weights, config["hidden"], outputs)


class Adapted:
    """An image-text model with LoRA and head in training: a `finetuning.Network`."""

    def __init__(self, method: Vlm, base: Base, components: int, outputs: int):
        self.base, self.device, self.hidden, self.shape = base, base.device, method.hidden, (components, outputs)
        layers = lora.layers_of(base.model, method.targets, method.vision)
        self.matrices = lora.attach(base.model, layers, method.rank, method.alpha)
        self.head = heads.chain(base.width, method.hidden, components * outputs, torch.Generator()).to(base.device)
        self.parameters = [*self.matrices.values(), *self.head.parameters()]

    def tensors(self) -> dict[str, Tensor]:
        matrices = {ADAPTER + name: matrix.data for name, matrix in self.matrices.items()}
        return matrices | {HEAD + name: value for name, value in heads.named(self.head).items()}

    def begin(self, pairs: Sequence[Pair], seed: int) -> None:
        """An adapter that changes nothing, and a new head."""
        generator = torch.Generator().manual_seed(seed)
        lora.begin(self.matrices, generator)
        components, outputs = self.shape
        new = heads.chain(self.base.width, self.hidden, components * outputs, generator)
        self.head.load_state_dict(new.state_dict())

    def outputs(self, pictures: Sequence[Stored], texts: Sequence[str]) -> Float[Tensor, "M K O"]:
        images = [rounded(data.read(picture))[0] for picture in pictures]
        return self.head(self.base.features(images, texts)).unflatten(1, self.shape)

    def bound(self) -> None:
        """Nothing has bounds."""


class Judges:
    """Adapters and heads on one image-text model: a `folder.Opened`. `weights` of each member: those that `_write` has
    written. ValueError if they do not fit the base."""

    def __init__(self, base: Base, weights: Sequence[Mapping[str, Tensor]], hidden: int, outputs: int):
        layers = sorted({name.removeprefix(ADAPTER)[:-2] for name in weights[0] if name.startswith(ADAPTER)})
        matrix = weights[0].get(f"{ADAPTER}{layers[0]}.A") if layers else None
        if matrix is None or matrix.ndim != 2 or not 0 < len(matrix) <= lora.MOST:
            raise ValueError(f"{folders.WEIGHTS}: no adapter of a rank from 1 to {lora.MOST} in it")
        shapes = heads.shapes_of(HEAD, base.width, hidden, outputs)
        hashes = [fingerprint(of_member) for of_member in weights]
        matrices = lora.attach(base.model, layers, len(matrix), float(len(matrix)))
        shapes |= {ADAPTER + name: tuple(value.shape) for name, value in matrices.items()}
        for of_member in weights:
            heads.check(of_member, shapes)
        self.base, self.weights, self.members, self.names = base, weights, len(weights), [*matrices]
        self.heads = [heads.chain_of(of_member, HEAD).to(base.device) for of_member in weights]
        self.trained, self.size, self.settings = folders.joined(hashes), base.size, base.settings
        self.checkpoint = folders.joined([base.checkpoint, self.trained])
        self._use(0)

    def readers(self) -> list[Reader]:
        return []

    def outputs(self, images: Images, texts: Sequence[str], exact: bool = False) -> Float[Tensor, "E N O"]:
        members = []
        for member, head in enumerate(self.heads):
            if self.members > 1:
                self._use(member)
            members.append(head(self.base.features([*images], texts, exact)))
        return torch.stack(members)

    def _use(self, member: int) -> None:
        weights = self.weights[member]
        lora.use(self.base.model, {name: weights[ADAPTER + name].to(self.base.device) for name in self.names})


def _write(folder: Path, weights: Mapping[str, Tensor], strength: float) -> None:
    """The adapter, with its strength in B, and the head."""
    from safetensors.torch import save

    files.make_folder(folder)
    scaled = {name: strength * value if name.endswith(".B") else value for name, value in weights.items()}
    files.replace(folder / folders.WEIGHTS, save({name: value.contiguous() for name, value in scaled.items()}))
