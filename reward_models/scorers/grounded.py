"""`grounded`: are the things that were asked for found where a detector that can be told what to look for (OWLv2,
Grounding DINO) looks for them?

The things are `Prompt.wants["phrases"]`, or what `Prompt.wants["include"]` (GenEval's layout) asks for: each object
counts, with its colour in the phrase. Things and detections are matched by assignment on the detector's confidence, so
that one detection stands for one thing. One score per image in [0, 1], higher is better, roughly comparable across
prompts:

- `found`: the mean confidence over the things, 0 for one that is missing, times things / detections where there are
  too many.

A found thing is credited by its confidence on its box, a detection too many is blamed by its own. Not seen: relations,
and whether a colour is right where the detector is not sure of it. Licence: the model's own. Not checked against
released weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import nms

from reward_models.detect import Detector, Found, detector
from reward_models.model_folders import loading
from reward_models.regions import Region, paint
from reward_models.scoring import each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import fingerprint, named


def phrases(wants: Mapping[str, Any]) -> list[str]:
    """What should be found, once for each time it is asked for. ValueError if nothing is."""
    given = wants.get("phrases")
    if given is None:
        given = [
            " ".join(filter(None, (item.get("color"), item.get("class"))))
            for item in wants.get("include", ())
            for _ in range(item.get("count", 1))
        ]
    if not isinstance(given, list) or not given or not all(isinstance(own, str) and own.strip() for own in given):
        raise ValueError(f"nothing to look for: `phrases` or `include` in wants is needed, got {sorted(wants)}")
    return given


def alone(found: Sequence[Found], overlap: int | float) -> list[Found]:
    """The detections less those that overlap a surer one of the same label by more than `overlap` of their union."""
    kept = []
    for label in dict.fromkeys(own.label for own in found):
        same = [own for own in found if own.label == label]
        boxes, scores = (
            torch.tensor([[*map(float, own.box)] for own in same]),
            torch.tensor([own.score for own in same]),
        )
        kept += [same[k] for k in nms(boxes, scores.float(), float(overlap)).tolist()]
    return kept


def judge(wanted: Sequence[str], found: Sequence[Found]) -> tuple[float, str, tuple[Region, ...]]:
    """The score, what is wrong in words, and the regions."""
    fits = np.array([[own.score if own.label == phrase else 0.0 for own in found] for phrase in wanted])
    rows, columns = linear_sum_assignment(fits.reshape(len(wanted), len(found)), maximize=True)
    match = {int(r): int(c) for r, c in zip(rows, columns, strict=True) if fits[r, c] > 0}
    score = sum(found[c].score for c in match.values()) / len(wanted) * min(1, len(wanted) / max(1, len(found)))
    surplus = [own for c, own in enumerate(found) if c not in match.values()]
    regions = [Region(found[c].box, found[c].score, f"{r + 1} {wanted[r]}") for r, c in match.items()]
    regions += [Region(own.box, -own.score, "", f"a {own.label} too many") for own in surplus]
    wrong = [f"no {phrase}" for r, phrase in enumerate(wanted) if r not in match]
    wrong += [f"a {own.label} too many" for own in surplus]
    return float(score), "; ".join(wrong) or "all found", tuple(regions)


class Grounded:
    """The scorer over any detector that can be asked for anything; `grounded` makes it from a checkpoint."""

    names = ("found",)

    def __init__(self, finder: Detector, card: Card, overlap: int | float = 0.5, grid: int = 8, batch: int = 8):
        self.finder, self.card, self.overlap, self.grid, self.batch = finder, card, overlap, grid, batch

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._look, self.batch)

    def _look(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        values = torch.full((len(images), 1), torch.nan)
        maps = torch.full((len(images), self.grid, self.grid), torch.nan)
        said, boxes, failures, wanted = [""] * len(images), [()] * len(images), {}, {}
        for i, prompt in enumerate(prompts):
            try:
                wanted[i] = phrases(prompt.wants)
            except ValueError as error:
                failures[i] = str(error)
        asked = [list(dict.fromkeys(own)) for own in wanted.values()]
        seen = self.finder.detect(images[list(wanted)], asked) if wanted else []
        for i, found in zip(wanted, seen, strict=True):
            values[i, 0], said[i], boxes[i] = judge(wanted[i], alone(found, self.overlap))
            maps[i] = paint(boxes[i], tuple(images.shape[2:]), (self.grid, self.grid))
        return Scores(self.names, values, tuple(said), maps, failures, tuple(boxes))


def grounded(
    model: str = "google/owlv2-base-patch16-ensemble",
    confidence: int | float = 0.3,
    overlap: int | float = 0.5,
    grid: int = 8,
    device: str = "cpu",
    batch: int = 8,
) -> Grounded:
    """The scorer `grounded`. `model`: folder or hub id of a zero-shot detector of transformers. `confidence`: what a
    detection must exceed, in [0, 1]. `overlap`: the share of their union at which two detections are of one thing.
    ValueError for settings outside these ranges, for a model that cannot be had, or that only knows classes of its
    own."""
    if not (0 <= confidence <= 1 and 0 <= overlap <= 1):
        raise ValueError(f"grounded: confidence and overlap are 0 to 1, not {confidence!r} and {overlap!r}")
    with loading("grounded", model):
        finder = detector(model, confidence, device)
    if finder.classes is not None:
        raise ValueError(f"grounded: {model} knows classes of its own only; a zero-shot detector is needed")
    card = Card(
        "grounded",
        model=named(model),
        licence="the model's own",
        low=0,
        high=1,
        comparable_across_prompts=True,
        has_map=True,
        size="as the detector's processor has it",
        checkpoint=fingerprint(finder.model),
        settings=dict(confidence=confidence, overlap=overlap, grid=grid),
    )
    return Grounded(finder, card, overlap, grid, batch)
