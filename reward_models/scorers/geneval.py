"""`geneval`: whether the requested objects are present, in the right number, colour and position. GenEval (arXiv
2310.11513), with a detector of transformers and zero-shot colours by a CLIP model.

The request is `Prompt.wants`, in the layout of GenEval's metadata: `include` lists what must be present (`class`,
`count`, optional `color`, optional `position`: a relation and the index of the entry it relates to), `exclude` what
must stay below a `count`. Two scores per image, in [0, 1], higher is better, comparable across prompts:

- `strict`: 1 if at least `count` objects of every entry are detected, the most confident `count` of them have the
  colour and each stands in the relation to each object of the other entry, and no exclusion is reached; else 0.
- `soft`: the mean over all terms of all entries: the count, 1 - (missing + surplus) / requested, at least 0; the share
  of the requested objects that have the colour; whether the position is right. An exclusion of another class is one
  more term. The number of terms does not depend on their values: two objects in the wrong relation get 2 of 3, never 3
  of 4.

Not measured: aesthetic quality, objects that nobody requested, words of the prompt that are not in `wants`. Objects one
behind another have no relation. Mistakes of the detector and of the colour model affect the score.

Differences to the released benchmark: masks come from the transformers port of Mask2Former, and the sentences for
colours are our own. Not checked against released scores. Default weights: facebook/mask2former-swin-small-coco-instance
and OpenAI's CLIP ViT-L/14; licences: the models' own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, hypot
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.detect import Detection, Detector, by_confidence, detector, known_as
from reward_models.model_folders import loading
from reward_models.regions import Region
from reward_models.scorers.clip import Clip, clip
from reward_models.scoring import each
from reward_models.types import Card, Images, ImageScores, Prompt, Scores
from reward_models.weights import fingerprint, named

PALETTE = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SENTENCES = ("a photo of a {colour} {label}", "a {colour} {label}", "something {colour}")
RELATIONS = ("left of", "right of", "above", "below")
MARGIN = 0.1  # share of two boxes' summed sizes; smaller offsets count as none
COSINE = 0.5  # of the angle between an axis and the offset; above it the axis' relation holds
MOST = 16  # objects of a class that are considered
GREY = 0x99 / 255

Box = tuple[int | float, int | float, int | float, int | float]


# ------------------------------------------------------------------------------------------------------ judging


@dataclass(frozen=True)
class Verdict:
    """`strict` and `soft` as in the module's docstring, a sentence with the mistakes, and the credit of each object."""

    strict: float
    soft: float
    critique: str
    regions: tuple[Region, ...]


def related(first: Box, second: Box) -> set[str]:
    """The relations in which the first box stands to the second; none, one, or two of them along a diagonal.

    The offset of the centres, less `MARGIN` of the summed sizes along each axis, is divided by the length of the full
    offset, as in GenEval's code; a relation holds where that exceeds `COSINE`.
    """
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (first[low] + first[high] - second[low] - second[high]) / 2
        margin = MARGIN * (first[high] - first[low] + second[high] - second[low])
        offset.append(distance)
        beyond.append(max(abs(distance) - margin, 0) * (1 if distance > 0 else -1))
    x, y = (component / (hypot(*offset) or 1) for component in beyond)
    holds = {"left of": x < -COSINE, "right of": x > COSINE, "above": y < -COSINE, "below": y > COSINE}
    return {relation for relation, true in holds.items() if true}


def count_score(wanted: int, present: int, surplus: int | float = 1) -> float:
    """The count term, in [0, 1]; a surplus object weighs `surplus` times as much as a missing one."""
    error = wanted - present if present < wanted else surplus * (present - wanted)
    return max(0.0, 1 - error / wanted)


def judge(
    wants: Mapping[str, Any],
    detections: Sequence[Detection],
    colours: Sequence[str | None],
    surplus: int | float = 1,
) -> Verdict:
    """The verdict on the detections, the most confident first; `colours` has the colour of each, None where it was not
    determined.

    Credit: 1 for an object that is right, less for each wrong attribute (0 with one of two wrong, the class being the
    other), -1 for a surplus one.
    """
    include, exclude = wants["include"], wants.get("exclude") or ()
    groups = [_of_class(detections, item["class"]) for item in include]
    chosen = [group[: item.get("count", 1)] for group, item in zip(groups, include, strict=True)]
    strict, terms, wrong, credit, labels = True, [], [], {}, {}
    for number, (item, group, picks) in enumerate(zip(include, groups, chosen, strict=True)):
        wanted, name = item.get("count", 1), item["class"]
        terms.append(count_score(wanted, len(group), surplus))
        strict &= len(picks) == wanted
        if terms[-1] < 1:
            wrong.append(f"{len(group)} {name} instead of {wanted}")
        checks = [[True] * len(picks)]  # class, colour, position: whether each chosen object has it right
        if "color" in item:
            checks.append([colours[k] == item["color"] for k in picks])
            terms.append(sum(checks[-1]) / wanted)
            wrong += [f"{name} is {colours[k]}, not {item['color']}" for k in picks if colours[k] != item["color"]]
        if "position" in item:
            relation, other = item["position"]
            others = [detections[k].box for k in chosen[other]]
            checks.append(
                [bool(others) and all(relation in related(detections[k].box, box) for box in others) for k in picks]
            )
            terms.append(float(bool(picks) and all(checks[-1])))
            wrong += [] if terms[-1] else [f"{name} is not {relation} {include[other]['class']}"]
        strict &= all(all(check) for check in checks)
        credit |= {k: 2 * sum(right) / len(right) - 1 for k, *right in zip(picks, *checks, strict=True)}
        labels |= {k: f"{number + 1}.{index + 1} {name}" for index, k in enumerate(picks)}
        credit |= dict.fromkeys(group[wanted:] if surplus else (), -1)
    included = {known_as(item["class"]) for item in include}
    for item in exclude:
        group, limit = _of_class(detections, item["class"]), item.get("count", 1)
        strict &= len(group) < limit
        if known_as(item["class"]) not in included:  # otherwise the count term covers it
            terms.append(float(len(group) < limit))
        if len(group) >= limit:
            wrong.append(f"{len(group)} {item['class']} where fewer than {limit} are wanted")
            credit |= dict.fromkeys(group[limit - 1 :], -1)
    regions = tuple(
        Region(detections[k].box, value, labels.get(k, ""), detections[k].label) for k, value in credit.items()
    )
    return Verdict(float(strict), sum(terms) / len(terms), "; ".join(wrong) or "right", regions)


def _of_class(detections: Sequence[Detection], name: str) -> list[int]:
    return [k for k, detection in enumerate(detections) if known_as(detection.label) == known_as(name)]


def strongest(detections: Sequence[Detection], confidence: int | float) -> list[Detection]:
    """The detections above `confidence`, the most confident first, at most `MOST` of a class."""
    strong: list[Detection] = []
    for detection in by_confidence(detections):
        if detection.score > confidence and len(_of_class(strong, detection.label)) < MOST:
            strong.append(detection)
    return strong


def checked(wants: Mapping[str, Any], classes: Collection[str] | None, palette: Collection[str]) -> list[str]:
    """The classes that `wants` mentions. ValueError if it requests nothing, or something that cannot be judged: a class
    not in `classes` (None: any class is allowed), a colour not in `palette`, a class twice, a relation to nothing."""
    include, exclude = wants.get("include") or (), wants.get("exclude") or ()
    if not include:
        raise ValueError("wants has no `include`: there is nothing to check")
    for item in (*include, *exclude):
        count = item.get("count", 1)
        if not (isinstance(item.get("class"), str) and isinstance(count, int) and count >= 1):
            raise ValueError(f"{dict(item)} needs a class and a count of at least 1")
        if classes is not None and known_as(item["class"]) not in classes:
            raise ValueError(f"the detector does not know the class {item['class']!r}")
        if "color" in item and item["color"] not in palette:
            raise ValueError(f"the colour {item['color']!r} is not recognised; known: {', '.join(palette) or 'none'}")
    for number, item in enumerate(include):
        if known_as(item["class"]) in {known_as(other["class"]) for other in include[:number]}:
            raise ValueError(f"{item['class']!r} is requested twice; its detections cannot be assigned to two entries")
        if "position" in item and not _relates(item["position"], number, len(include)):
            raise ValueError(f"position {item['position']!r} is not a relation to another entry of `include`")
    return list(dict.fromkeys(item["class"] for item in (*include, *exclude)))


def _relates(position: Any, number: int, entries: int) -> bool:
    match position:
        case [relation, int(other)]:
            return relation in RELATIONS and 0 <= other < entries and other != number
    return False


# -------------------------------------------------------------------------------------------------- the scorer


@runtime_checkable
class ColourNamer(Protocol):
    """Names colours: `name` gives the colour, one of `palette`, of each object in an image."""

    palette: Collection[str]

    def name(self, image: Float[Tensor, "3 H W"], detections: Sequence[Detection]) -> list[str]: ...


class ClipColours:
    """A CLIP model compares each object, cut out on grey, with sentences for every colour."""

    palette = PALETTE

    def __init__(self, clip: Clip):
        self.clip = clip
        self._sentences: dict[str, Float[Tensor, "P D"]] = {}

    @torch.no_grad()
    def name(self, image: Float[Tensor, "3 H W"], detections: Sequence[Detection]) -> list[str]:
        pixels = torch.cat([self.clip.prepared(cut_out(image, detection)[None]) for detection in detections])
        features = self.clip.model.encode_image(pixels, normalize=True)
        texts = torch.stack([self._words(detection.label.lower()) for detection in detections])
        best = torch.einsum("md,mpd->mp", features, texts).argmax(1)
        return [self.palette[k] for k in best.tolist()]

    def _words(self, label: str) -> Float[Tensor, "P D"]:
        if label not in self._sentences:
            sentences = [text.format(colour=colour, label=label) for colour in self.palette for text in SENTENCES]
            encoded = self.clip.model.encode_text(self.clip.tokenizer(sentences).to(self.clip.device), normalize=True)
            mean = encoded.unflatten(0, (len(self.palette), len(SENTENCES))).mean(1)
            self._sentences[label] = mean / mean.norm(dim=1, keepdim=True)
        return self._sentences[label]


def cut_out(image: Float[Tensor, "3 H W"], detection: Detection) -> Float[Tensor, "3 h w"]:
    """The pixels that the object's box touches, grey outside its mask."""
    if detection.mask is not None:
        image = torch.where(detection.mask.to(image.device), image, GREY)
    left, top, right, bottom = detection.box
    return image[:, floor(top) : ceil(bottom), floor(left) : ceil(right)]


class GenEval:
    """The scorer, from a detector and a colour model; without a colour model, prompts that request a colour cannot be
    scored. The other settings are those of `geneval`."""

    names = ("strict", "soft")

    def __init__(
        self,
        detector: Detector,
        colours: ColourNamer | None,
        card: Card,
        confidence: int | float = 0.3,
        counting: int | float = 0.9,
        surplus: int | float = 1,
        grid: int = 8,
        batch: int = 8,
    ):
        self.detector, self.colours, self.card = detector, colours, card
        self.confidence, self.counting, self.surplus = confidence, counting, surplus
        self.grid, self.batch = grid, batch

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        labels, rows = {}, {}
        for i, prompt in enumerate(prompts):
            try:
                labels[i] = checked(prompt.wants, self.detector.classes, self.colours.palette if self.colours else ())
            except ValueError as error:
                rows[i] = ImageScores(failure=str(error))
        detections = self.detector.detect(images[list(labels)], list(labels.values())) if labels else []
        for i, of_image in zip(labels, detections, strict=True):
            verdict = self._judge(images[i], prompts[i].wants, of_image)
            values = {"strict": verdict.strict, "soft": verdict.soft}
            rows[i] = ImageScores(values, verdict.critique, regions=verdict.regions)
        return Scores.collect(self.names, [rows[i] for i in range(len(images))], tuple(images.shape[2:]), self.grid)

    def _judge(
        self, image: Float[Tensor, "3 H W"], wants: Mapping[str, Any], detections: Sequence[Detection]
    ) -> Verdict:
        detections = strongest(detections, self.counting if wants.get("tag") == "counting" else self.confidence)
        coloured = [k for item in wants["include"] if "color" in item for k in _of_class(detections, item["class"])]
        colours: list[str | None] = [None] * len(detections)
        if coloured:
            names = self.colours.name(image, [detections[k] for k in coloured])
            for k, colour in zip(coloured, names, strict=True):
                colours[k] = colour
        return judge(wants, detections, colours, self.surplus)


def geneval(
    model: str = "facebook/mask2former-swin-small-coco-instance",
    colour_model: str | None = "ViT-L-14",
    colour_pretrained: str | None = "openai",
    confidence: int | float = 0.3,
    counting: int | float = 0.9,
    surplus: int | float = 1,
    grid: int = 8,
    device: str = "cpu",
    batch: int = 8,
) -> GenEval:
    """The scorer `geneval`.

    `model`: folder or hub id of a detector of transformers (`reward_models.detect`). `colour_model`,
    `colour_pretrained`: as for `clip`; without a colour model, prompts that request a colour are not scored.
    `confidence`: the threshold of a detection, in [0, 1]; `counting`: the same for prompts tagged "counting".
    `surplus`: the weight of a surplus object in the soft count, relative to a missing one; 0 does not penalise it.
    `grid`: side of the region map. ValueError for settings outside these ranges and for unavailable models.
    """
    if not (0 <= confidence <= 1 and 0 <= counting <= 1):
        raise ValueError(f"geneval: confidence and counting are 0 to 1, not {confidence!r} and {counting!r}")
    if surplus < 0:
        raise ValueError(f"geneval: surplus is 0 or more, not {surplus!r}")
    with loading("geneval", model):
        finder = detector(model, min(confidence, counting), device)
    models, colours, colour_name, size = [finder.model], None, "none", "resized by the detector's processor"
    if colour_model:
        with loading("geneval", f"the colour model {colour_model}"):
            colour = clip(colour_model, colour_pretrained, device)
        models, colours, colour_name = [*models, colour.model], ClipColours(colour), colour.card.model
        size = f"{size}; crops for the colour model: {colour.card.size}"
    card = Card(
        "geneval",
        model=named(model),
        licence="the models' own",
        low=0,
        high=1,
        comparable_across_prompts=True,
        has_map=True,
        size=size,
        checkpoint=fingerprint(*models),
        settings=dict(colour_model=colour_name, confidence=confidence, counting=counting, surplus=surplus, grid=grid),
    )
    return GenEval(finder, colours, card, confidence, counting, surplus, grid, batch)
