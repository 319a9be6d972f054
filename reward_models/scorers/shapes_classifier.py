"""`shapes_classifier`: how likely an image of the embedded world fits its caption, by a small convolutional network
that has learnt from the verifier `shapes`. Unlike it, this scorer has gradients at the pixels (`in_graph`).

The network gives the log-odds of each thing that a caption may ask for: how many objects there are of each shape and
letter (and that there are no others), the colour and size of those of a shape, the relation of two shapes, the order of
two letters. Two components, comparable across prompts:

- `right`: the probability that everything asked for is there and nothing else, in [0, 1], as if its parts were
  independent of each other. What `shapes.strict` decides.
- `logit`: its log-odds, which do not saturate: the logit still has a slope where `right` is close to 0 or 1.

A prompt is read from its ground truth, without it from its text if that is a caption of the world. Images of another
size are resized to 32 x 32 pixels. The embedded weights, 0.3 MB, come from scripts/build_shapes_classifier.py; their
card has the figures. A policy that is trained against it finds its blind spots: watch `shapes`. Licence: Apache-2.0.
"""

from collections.abc import Mapping, Sequence
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
from reward_models.shapes_world import (
    COLOURS,
    GLYPHS,
    LARGE_MIN,
    MIN_OFFSET,
    RELATIONS,
    SHAPES,
    SIDE,
    SMALL_MAX,
    understood,
)
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import fingerprint, named, read

TRAINED = shipped.folder("reward_models") / "assets" / "shapes_classifier"
WEIGHTS = "model.safetensors"
KINDS = (*SHAPES, *GLYPHS)
SURPLUS = len(KINDS)  # the row of the counts that is neither shape nor letter
MOST = 5  # a count of as many or more
MIXED = len(COLOURS)  # the colour of several objects of different colours
CELL = 4  # px


@dataclass(frozen=True)
class Parts:
    """What the network says of `N` images, for each of `KINDS`. `counts`: logits of 0 ... `MOST` objects, and in the
    last row (`SURPLUS`) of other objects. `colours`: logits of each colour, and of `MIXED`. `centres`, `extents`: (x,
    y) and longer side in px."""

    counts: Float[Tensor, "N R C"]
    colours: Float[Tensor, "N K M"]
    centres: Float[Tensor, "N K 2"]
    extents: Float[Tensor, "N K"]


class Network(nn.Module):
    """Convolutions down to 8 x 8 cells. The cells' sum gives the counts; an attention map for each kind of object finds
    its colour, place and size."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 5, 2, 2)
        self.second = nn.Conv2d(32, 40, 3, 1, 1)
        self.third = nn.Conv2d(40, width, 3, 2, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))
        self.amounts = nn.Conv2d(width, 96, 1)
        self.counts = nn.Sequential(nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, (len(KINDS) + 1) * (MOST + 1)))
        self.cells = nn.Conv2d(width, len(KINDS) + len(COLOURS) + 1 + 3, 1)
        self.sharpness = nn.Parameter(torch.zeros(4))  # logarithms, for size, its two bounds, relation and order

    def forward(self, images: Float[Tensor, "N 3 32 32"]) -> Parts:
        x = F.silu(self.first((images - 0.5) / 0.25))
        x = F.silu(self.third(F.silu(self.second(x))))
        for block in self.blocks:
            x = x + F.silu(block(x))
        amounts = F.silu(self.amounts(x)).sum((2, 3)) / 8
        counts = self.counts(amounts).unflatten(1, (len(KINDS) + 1, MOST + 1))
        heat, rest = self.cells(x).flatten(2).split([len(KINDS), len(COLOURS) + 4], 1)
        side = SIDE // CELL
        y, x = torch.meshgrid(*[torch.arange(side, device=x.device) * CELL + CELL / 2] * 2, indexing="ij")
        places = torch.stack([x, y]).flatten(1) + CELL * rest[:, -3:-1]
        rows = torch.cat([rest[:, :-3], places, 12 + 4 * rest[:, -1:]], 1)
        objects = heat.softmax(2) @ rows.transpose(1, 2)
        return Parts(counts, objects[..., :-3], objects[..., -3:-1], objects[..., -1])

    def small(self, extents: Tensor) -> Tensor:
        """The log-odds that an object of this size is small."""
        return self.sharpness[0].exp() * (SMALL_MAX - extents)

    def large(self, extents: Tensor) -> Tensor:
        return self.sharpness[1].exp() * (extents - LARGE_MIN)

    def related(self, relation: str, first: Float[Tensor, "... 2"], second: Float[Tensor, "... 2"]) -> Tensor:
        """The log-odds that a relation holds of two centres, by the verifier's rule."""
        sign_x, sign_y = RELATIONS[relation]
        x, y = (first - second).unbind(-1)
        along, across = x * sign_x + y * sign_y, (x * sign_y + y * sign_x).abs()
        return together(self.sharpness[2].exp() * torch.stack([along - MIN_OFFSET, along - across], -1))

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
    counts = torch.zeros(len(KINDS) + 1, dtype=torch.long, device=parts.counts.device)
    odds: list[Tensor] = []
    centre = lambda name: parts.centres[row, KINDS.index(name)]  # noqa: E731
    if wants["tag"] == "text":
        for letter in wants["text"]:
            counts[KINDS.index(letter)] += 1
        odds += [
            network.ordered(centre(one), centre(two))
            for one, two in zip(wants["text"], wants["text"][1:], strict=False)
        ]
    else:
        for item in wants["include"]:
            kind = KINDS.index(item["class"])
            counts[kind] += item["count"]
            if "color" in item:
                colour = torch.tensor([*COLOURS].index(item["color"]), device=counts.device)
                odds.append(odds_of(parts.colours[row, kind], colour))
            if "size" in item:
                odds.append({"small": network.small, "large": network.large}[item["size"]](parts.extents[row, kind]))
        if wants["tag"] == "position":
            one, two = (centre(item["class"]) for item in wants["include"])
            odds.append(network.related(wants["include"][0]["position"][0], one, two))
    present = odds_of(parts.counts[row], counts.clamp(max=MOST))
    return torch.cat([present, torch.stack(odds)]) if odds else present


def together(odds: Float[Tensor, "... P"]) -> Float[Tensor, "..."]:
    """The log-odds that all of independent events happen."""
    surprise = F.softplus(-odds.clamp(max=80)).sum(-1)  # -log p, above 0
    return -(surprise + torch.log(-torch.expm1(-surprise)))


class ShapesClassifier:
    """The scorer. `folder`: other weights than the embedded ones. ValueError if they cannot be loaded."""

    names = ("right", "logit")

    def __init__(self, folder: str = "", device: str = "cpu", batch: int = 64):
        place = Path(folder) if folder else TRAINED
        with loading("shapes_classifier", str(place)):
            weights = read(place / WEIGHTS)
            self.network = Network()
            self.network.load_state_dict({name: value.float() for name, value in weights.items()})
            # double: an unbounded logit must not depend on which images are scored together
            self.network.to(device, torch.float64).eval().requires_grad_(False)
        self.device, self.batch = device, batch
        self.card = Card(
            "shapes_classifier",
            model=named(str(place)),
            licence="Apache-2.0",
            comparable_across_prompts=True,
            size=f"{SIDE} px, squash, bicubic",
            checkpoint=fingerprint(self.network),
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self.in_graph(images, prompts)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        wants = [prompt.wants if "tag" in prompt.wants else understood(prompt.text) for prompt in prompts]
        if not all(wants):
            raise ValueError("prompt has no ground truth: `shapes_classifier` needs captions of the embedded world")
        images = images.to(self.device, torch.float64)
        parts = self.network(resized(images, (SIDE, SIDE), "squash", "bicubic"))
        logits = [together(parts_of(self.network, parts, row, request)) for row, request in enumerate(wants)]
        logit = torch.stack(logits) if logits else parts.extents.new_zeros(0)
        return torch.stack([logit.sigmoid(), logit], 1).float()
