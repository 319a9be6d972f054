"""What the classifiers of the embedded worlds share: a small convolutional network that learns what a world's verifier
sees, the log-odds of what a caption asks for, and the scorer.

The network gives the log-odds of each thing that a caption may ask for: how many objects there are of each kind (and
that there are no others), the attributes of those of a kind, the relation of two, the order of two letters. Two
components, comparable across prompts:

- `right`: the probability that everything asked for is there and nothing else, in [0, 1], as if its parts were
  independent of each other. What the verifier's `strict` decides.
- `logit`: its log-odds, which do not saturate: the logit still has a slope where `right` is close to 0 or 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reward_models import shipped
from reward_models.images import resized
from reward_models.model_folders import loading
from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import fingerprint, named, read
from reward_models.worlds import RELATIONS, Words

WEIGHTS = "model.safetensors"
CELL = 4  # px


@dataclass(frozen=True)
class Classes:
    """What a classifier tells apart in pictures of a world, and the size of its network.

    `words`: what a request may name. `kinds`: names of objects. `attributes`: the values of each attribute that is a
    class of its own. `most`: a count of so many or more. `side`: of a picture, px. `offset`: px between centres along
    the axis of a relation. `understood`: the request of a caption, empty for other texts. `small`, `large`: the longest
    side of a small object and the shortest of a large one, px. `length`: of an object as the network starts from it,
    px. `width`, `blocks`, `pooled`: of the network.
    """

    name: str
    words: Words
    kinds: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]
    most: int
    side: int
    offset: float
    understood: Callable[[str], Mapping[str, Any]]
    small: float = 0.0
    large: float = 0.0
    length: float = 12.0
    width: int = 64
    blocks: int = 2
    pooled: int = 96

    @property
    def surplus(self) -> int:
        """The row of the counts of objects that are of no kind."""
        return len(self.kinds)

    def mixed(self, attribute: str) -> int:
        """The class of several objects with different values."""
        return len(self.attributes[attribute])

    @property
    def trained(self) -> Path:
        """The folder of the embedded weights."""
        return shipped.folder("reward_models") / "assets" / self.name


@dataclass(frozen=True)
class Parts:
    """What the network says of `N` images, for each of K kinds. `counts`: logits of 0 ... `most` objects, and in the
    last row (`surplus`) of other objects. `attributes`: for each, logits of its values, and of mixed ones. `centres`,
    `extents`: (x, y) and longer side in px."""

    counts: Float[Tensor, "N R C"]
    attributes: Mapping[str, Float[Tensor, "N K _"]]
    centres: Float[Tensor, "N K 2"]
    extents: Float[Tensor, "N K"]


class Network(nn.Module):
    """Convolutions down to cells of 4 px. The cells' sum gives the counts; an attention map for each kind of object
    finds its attributes, place and size."""

    def __init__(self, classes: Classes):
        super().__init__()
        self.classes, kinds, width, pooled = classes, len(classes.kinds), classes.width, classes.pooled
        self.values = [len(values) + 1 for values in classes.attributes.values()]
        self.first = nn.Conv2d(3, 32, 5, 2, 2)
        self.second = nn.Conv2d(32, 40, 3, 1, 1)
        self.third = nn.Conv2d(40, width, 3, 2, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(classes.blocks))
        self.amounts = nn.Conv2d(width, pooled, 1)
        rows = (kinds + 1) * (classes.most + 1)
        self.counts = nn.Sequential(
            nn.Linear(classes.pooled, classes.pooled), nn.SiLU(), nn.Linear(classes.pooled, rows)
        )
        self.cells = nn.Conv2d(width, kinds + sum(self.values) + 3, 1)
        self.sharpness = nn.Parameter(torch.zeros(4))  # logarithms, for size, its two bounds, relation and order

    def forward(self, images: Float[Tensor, "N 3 S S"]) -> Parts:
        classes = self.classes
        x = F.silu(self.first((images - 0.5) / 0.25))
        x = F.silu(self.third(F.silu(self.second(x))))
        for block in self.blocks:
            x = x + F.silu(block(x))
        amounts = F.silu(self.amounts(x)).sum((2, 3)) / 8
        counts = self.counts(amounts).unflatten(1, (len(classes.kinds) + 1, classes.most + 1))
        heat, rest = self.cells(x).flatten(2).split([len(classes.kinds), sum(self.values) + 3], 1)
        side = classes.side // CELL
        y, x = torch.meshgrid(*[torch.arange(side, device=x.device) * CELL + CELL / 2] * 2, indexing="ij")
        places = torch.stack([x, y]).flatten(1) + CELL * rest[:, -3:-1]
        rows = torch.cat([rest[:, :-3], places, classes.length + 4 * rest[:, -1:]], 1)
        objects = heat.softmax(2) @ rows.transpose(1, 2)
        attributes = dict(zip(classes.attributes, objects[..., :-3].split(self.values, -1), strict=True))
        return Parts(counts, attributes, objects[..., -3:-1], objects[..., -1])

    def small(self, extents: Tensor) -> Tensor:
        """The log-odds that an object of this size is small."""
        return self.sharpness[0].exp() * (self.classes.small - extents)

    def large(self, extents: Tensor) -> Tensor:
        return self.sharpness[1].exp() * (extents - self.classes.large)

    def related(self, relation: str, first: Float[Tensor, "... 2"], second: Float[Tensor, "... 2"]) -> Tensor:
        """The log-odds that a relation holds of two centres, by the verifier's rule."""
        sign_x, sign_y = RELATIONS[relation]
        x, y = (first - second).unbind(-1)
        along, across = x * sign_x + y * sign_y, (x * sign_y + y * sign_x).abs()
        return together(self.sharpness[2].exp() * torch.stack([along - self.classes.offset, along - across], -1))

    def ordered(self, first: Float[Tensor, "... 2"], second: Float[Tensor, "... 2"]) -> Tensor:
        """The log-odds that the first is left of the second."""
        return self.sharpness[3].exp() * (second - first)[..., 0]


def odds_of(logits: Float[Tensor, "... C"], right: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The log-odds of one class against all others."""
    chosen = F.one_hot(right, logits.shape[-1]).bool()
    others = logits.masked_fill(chosen, -torch.inf).logsumexp(-1)
    return logits.masked_fill(~chosen, 0).sum(-1) - others


def parts_of(network: Network, parts: Parts, row: int, wants: Mapping[str, Any]) -> Float[Tensor, "P"]:
    """The log-odds of each thing that is asked for of image `row`."""
    classes, device = network.classes, parts.counts.device
    counts = torch.zeros(len(classes.kinds) + 1, dtype=torch.long, device=device)
    odds: list[Tensor] = []
    centre = lambda name: parts.centres[row, classes.kinds.index(name)]  # noqa: E731
    if wants["tag"] == "text":
        for letter in wants["text"]:
            counts[classes.kinds.index(letter)] += 1
        odds += [
            network.ordered(centre(one), centre(two))
            for one, two in zip(wants["text"], wants["text"][1:], strict=False)
        ]
    else:
        for item in wants["include"]:
            kind = classes.kinds.index(item["class"])
            counts[kind] += item["count"]
            for name, values in classes.attributes.items():
                if name in item:
                    value = torch.tensor(values.index(item[name]), device=device)
                    odds.append(odds_of(parts.attributes[name][row, kind], value))
            if "size" in item:
                odds.append({"small": network.small, "large": network.large}[item["size"]](parts.extents[row, kind]))
        if wants["tag"] == "position":
            one, two = (centre(item["class"]) for item in wants["include"])
            odds.append(network.related(wants["include"][0]["position"][0], one, two))
    present = odds_of(parts.counts[row], counts.clamp(max=classes.most))
    return torch.cat([present, torch.stack(odds)]) if odds else present


def together(odds: Float[Tensor, "... P"]) -> Float[Tensor, "..."]:
    """The log-odds that all of independent events happen."""
    surprise = F.softplus(-odds.clamp(max=80)).sum(-1)  # -log p, above 0
    return -(surprise + torch.log(-torch.expm1(-surprise)))


class Classifier:
    """The scorer of a world. `folder`: other weights than the embedded ones. ValueError if they cannot be loaded."""

    names = ("right", "logit")

    def __init__(self, classes: Classes, folder: str = "", device: str = "cpu", batch: int = 64):
        place = Path(folder) if folder else classes.trained
        with loading(classes.name, str(place)):
            weights = read(place / WEIGHTS)
            self.network = Network(classes)
            self.network.load_state_dict({name: value.float() for name, value in weights.items()})
            # double: an unbounded logit must not depend on which images are scored together
            self.network.to(device, torch.float64).eval().requires_grad_(False)
        self.classes, self.device, self.batch = classes, device, batch
        self.card = Card(
            classes.name,
            model=named(str(place)),
            licence="Apache-2.0",
            comparable_across_prompts=True,
            size=f"{classes.side} px, squash, bicubic",
            checkpoint=fingerprint(self.network),
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self.in_graph(images, prompts)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        classes = self.classes
        wants = [prompt.wants if "tag" in prompt.wants else classes.understood(prompt.text) for prompt in prompts]
        if not all(wants):
            raise ValueError(f"prompt has no ground truth: `{classes.name}` needs captions of the embedded world")
        for request in wants:
            classes.words.check(request, classes.name)
            nouns = [item["class"] for item in request.get("include", ())]
            if len({*nouns}) < len(nouns):
                raise ValueError(f"{nouns} has a kind twice, which `{classes.name}` cannot tell apart")
        images = images.to(self.device, torch.float64)
        parts = self.network(resized(images, (classes.side, classes.side), "squash", "bicubic"))
        logits = [together(parts_of(self.network, parts, row, request)) for row, request in enumerate(wants)]
        logit = torch.stack(logits) if logits else parts.extents.new_zeros(0)
        return torch.stack([logit.sigmoid(), logit], 1).float()
