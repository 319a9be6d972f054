"""`grounded`: whether an open-vocabulary detector (OWLv2, Grounding DINO) finds the requested objects.

The objects are `Prompt.wants["phrases"]`, or those of `Prompt.wants["include"]` (GenEval's layout), each counted and
with its colour in the phrase. Objects and detections are matched one to one by assignment on the detector's confidence.
One score per image in [0, 1], higher is better, roughly comparable across prompts:

- `found`: the mean confidence over the requested objects, 0 for a missing one, times objects / detections if there are
  too many.

The box of a detection is credited with its confidence, that of a surplus detection with minus its confidence. Not
measured: relations, and whether a colour is right where the detector is unsure. Licence: the model's own. Not checked
against released weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import nms

from reward_models.detect import Detection, Detector, detector
from reward_models.model_folders import loading
from reward_models.regions import Region
from reward_models.scoring import each
from reward_models.types import Card, Images, ImageScores, Prompt, Scores
from reward_models.weights import fingerprint, named

MOST = 100  # objects of a request


def phrases(wants: Mapping[str, Any]) -> list[str]:
    """The phrases to detect, repeated by their count. ValueError if there are none."""
    given = wants.get("phrases")
    if given is None:
        include = wants.get("include", ())
        if (total := sum(max(item.get("count", 1), 0) for item in include)) > MOST:
            raise ValueError(f"{total} objects are requested, more than {MOST}")
        given = [
            " ".join(filter(None, (item.get("color"), item.get("class"))))
            for item in include
            for _ in range(item.get("count", 1))
        ]
    if (
        not isinstance(given, list)
        or not given
        or not all(isinstance(phrase, str) and phrase.strip() for phrase in given)
    ):
        raise ValueError(f"nothing to detect: `phrases` or `include` in wants is needed, got {sorted(wants)}")
    if len(given) > MOST:
        raise ValueError(f"{len(given)} phrases are requested, more than {MOST}")
    return given


def without_duplicates(detections: Sequence[Detection], overlap: int | float) -> list[Detection]:
    """Non-maximum suppression per label: drop detections whose intersection over union with a more confident one of the
    same label exceeds `overlap`."""
    remaining = []
    for label in dict.fromkeys(detection.label for detection in detections):
        same = [detection for detection in detections if detection.label == label]
        boxes = torch.tensor([[*map(float, detection.box)] for detection in same])
        scores = torch.tensor([float(detection.score) for detection in same])
        remaining += [same[k] for k in nms(boxes, scores, float(overlap)).tolist()]
    return remaining


def judge(wanted: Sequence[str], detections: Sequence[Detection]) -> ImageScores:
    fits = np.array([[d.score if d.label == phrase else 0.0 for d in detections] for phrase in wanted])
    rows, columns = linear_sum_assignment(fits.reshape(len(wanted), len(detections)), maximize=True)
    match = {int(r): int(c) for r, c in zip(rows, columns, strict=True) if fits[r, c] > 0}
    confidence = sum(detections[c].score for c in match.values()) / len(wanted)
    score = confidence * min(1, len(wanted) / max(1, len(detections)))
    surplus = [detection for c, detection in enumerate(detections) if c not in match.values()]
    regions = [Region(detections[c].box, detections[c].score, f"{r + 1} {wanted[r]}") for r, c in match.items()]
    regions += [Region(extra.box, -extra.score, "", f"a {extra.label} too many") for extra in surplus]
    wrong = [f"no {phrase}" for r, phrase in enumerate(wanted) if r not in match]
    wrong += [f"a {extra.label} too many" for extra in surplus]
    return ImageScores({"found": float(score)}, "; ".join(wrong) or "all found", regions=tuple(regions))


class Grounded:
    """The scorer over any open-vocabulary detector; `grounded` builds it from a checkpoint."""

    names = ("found",)

    def __init__(self, finder: Detector, card: Card, overlap: int | float = 0.5, grid: int = 8, batch: int = 8):
        self.finder, self.card, self.overlap, self.grid, self.batch = finder, card, overlap, grid, batch

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        wanted, rows = {}, {}
        for i, prompt in enumerate(prompts):
            try:
                wanted[i] = phrases(prompt.wants)
            except ValueError as error:
                rows[i] = ImageScores(failure=str(error))
        labels = [list(dict.fromkeys(repeated)) for repeated in wanted.values()]
        detections = self.finder.detect(images[list(wanted)], labels) if wanted else []
        for i, of_image in zip(wanted, detections, strict=True):
            rows[i] = judge(wanted[i], without_duplicates(of_image, self.overlap))
        return Scores.collect(self.names, [rows[i] for i in range(len(images))], tuple(images.shape[2:]), self.grid)


def grounded(
    model: str = "google/owlv2-base-patch16-ensemble",
    confidence: int | float = 0.3,
    overlap: int | float = 0.5,
    grid: int = 8,
    device: str = "cpu",
    batch: int = 8,
) -> Grounded:
    """The scorer `grounded`. `model`: folder or hub id of a zero-shot detector of transformers. `confidence`: the least
    confidence of a detection, in [0, 1]. `overlap`: the intersection over union above which two detections are
    duplicates. ValueError for settings outside these ranges, and for a model that is unavailable or has fixed
    classes."""
    if not (0 <= confidence <= 1 and 0 <= overlap <= 1):
        raise ValueError(f"grounded: confidence and overlap are 0 to 1, not {confidence!r} and {overlap!r}")
    with loading("grounded", model):
        finder = detector(model, confidence, device)
    if finder.classes is not None:
        raise ValueError(f"grounded: {model} has fixed classes; a zero-shot detector is needed")
    card = Card(
        "grounded",
        model=named(model),
        licence="the model's own",
        low=0,
        high=1,
        comparable_across_prompts=True,
        has_map=True,
        size="resized by the detector's processor",
        checkpoint=fingerprint(finder.model),
        settings=dict(confidence=confidence, overlap=overlap, grid=grid),
    )
    return Grounded(finder, card, overlap, grid, batch)
