"""`geneval`: are the objects that were asked for there, as many, of that colour, in that place? GenEval (arXiv
2310.11513), with a detector of transformers and colours named zero-shot by a CLIP model.

What is asked stands in `Prompt.wants`, in the layout of GenEval's metadata: `include` lists what must be there
(`class`, `count`, perhaps `color`, perhaps `position`: a relation and the number of the entry it relates to), `exclude`
what must stay below a `count`. Two scores per image, in [0, 1], higher is better, comparable across prompts:

- `strict`: 1 if of every entry at least `count` objects are found, the surest `count` of them have the colour and each
  stands in the relation to each of the other entry's, and no exclusion is reached; else 0.
- `soft`: the mean of all terms of all entries: the count, 1 - (missing + surplus) / asked, at least 0; the share of the
  asked objects that have the colour; whether the position is right. An exclusion of something else is one more term.
  A term is there whatever became of the others: two objects in the wrong relation get 2 of 3, never 3 of 4.

Not seen: how anything looks, objects that nobody asked for, words of the prompt that are not in `wants`. Objects one
behind another have no relation. The detector's and the colour model's mistakes become the score's.

Differences to the released benchmark: masks come from the transformers port of Mask2Former, and the sentences by which
colours are named are our own. Not checked against released scores. Default weights:
facebook/mask2former-swin-small-coco-instance and OpenAI's CLIP ViT-L/14; licences: the models' own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, hypot
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.detect import Detector, Found, detector, known_as, surest
from reward_models.model_folders import loading
from reward_models.regions import Region, paint
from reward_models.scorers.clip import Clip, clip
from reward_models.scoring import each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import fingerprint, named

PALETTE = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SENTENCES = ("a photo of a {colour} {label}", "a {colour} {label}", "something {colour}")
RELATIONS = ("left of", "right of", "above", "below")
MARGIN = 0.1  # of two boxes' summed sizes: offsets below it are no offset
COSINE = 0.5  # between an axis and the direction of the offset, above which the axis' relation holds
MOST = 16  # objects of a class that are looked at
GREY = 0x99 / 255

Box = tuple[int | float, int | float, int | float, int | float]


# ------------------------------------------------------------------------------------------------------ judging


@dataclass(frozen=True)
class Verdict:
    """`strict` and `soft` as in the module's head, what is wrong in a sentence, and the credit of each object found."""

    strict: float
    soft: float
    critique: str
    regions: tuple[Region, ...]


def related(first: Box, second: Box) -> set[str]:
    """The relations in which the first box stands to the second; none, one, or two of them along a diagonal.

    The offset of the centres, less `MARGIN` of the summed sizes along each axis, is divided by the length of the whole
    offset, as GenEval's code does it; a relation holds where that exceeds `COSINE`.
    """
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        apart = (first[low] + first[high] - second[low] - second[high]) / 2
        margin = MARGIN * (first[high] - first[low] + second[high] - second[low])
        offset.append(apart)
        beyond.append(max(abs(apart) - margin, 0) * (1 if apart > 0 else -1))
    x, y = (part / (hypot(*offset) or 1) for part in beyond)
    holds = {"left of": x < -COSINE, "right of": x > COSINE, "above": y < -COSINE, "below": y > COSINE}
    return {relation for relation, true in holds.items() if true}


def counted(asked: int, seen: int, surplus: int | float = 1) -> float:
    """The count term, in [0, 1]; an object too many weighs `surplus` times as much as one that is missing."""
    off = asked - seen if seen < asked else surplus * (seen - asked)
    return max(0.0, 1 - off / asked)


def judge(
    wants: Mapping[str, Any], found: Sequence[Found], colours: Sequence[str | None], surplus: int | float = 1
) -> Verdict:
    """The verdict on the objects found, the surest first; `colours` names theirs, None where it was not looked at.

    Credit: 1 for an object that is right, less for each attribute it has wrong (0 with one of two, the class being the
    other), -1 for one that is too many.
    """
    include, exclude = wants["include"], wants.get("exclude") or ()
    groups = [_of_class(found, item["class"]) for item in include]
    chosen = [group[: item.get("count", 1)] for group, item in zip(groups, include, strict=True)]
    strict, terms, wrong, credit, labels = True, [], [], {}, {}
    for number, (item, group, mine) in enumerate(zip(include, groups, chosen, strict=True)):
        asked, name = item.get("count", 1), item["class"]
        terms.append(counted(asked, len(group), surplus))
        strict &= len(mine) == asked
        if terms[-1] < 1:
            wrong.append(f"{len(group)} {name} instead of {asked}")
        checks = [[True] * len(mine)]  # of the class, the colour, the position: does each object chosen have it right?
        if "color" in item:
            checks.append([colours[k] == item["color"] for k in mine])
            terms.append(sum(checks[-1]) / asked)
            wrong += [f"{name} is {colours[k]}, not {item['color']}" for k in mine if colours[k] != item["color"]]
        if "position" in item:
            relation, other = item["position"]
            others = [found[k].box for k in chosen[other]]
            checks.append([bool(others) and all(relation in related(found[k].box, o) for o in others) for k in mine])
            terms.append(float(bool(mine) and all(checks[-1])))
            wrong += [] if terms[-1] else [f"{name} is not {relation} {include[other]['class']}"]
        strict &= all(all(check) for check in checks)
        credit |= {k: 2 * sum(right) / len(right) - 1 for k, *right in zip(mine, *checks, strict=True)}
        labels |= {k: f"{number + 1}.{place + 1} {name}" for place, k in enumerate(mine)}
        credit |= dict.fromkeys(group[asked:] if surplus else (), -1)
    included = {known_as(item["class"]) for item in include}
    for item in exclude:
        group, limit = _of_class(found, item["class"]), item.get("count", 1)
        strict &= len(group) < limit
        if known_as(item["class"]) not in included:  # else the count term has said it
            terms.append(float(len(group) < limit))
        if len(group) >= limit:
            wrong.append(f"{len(group)} {item['class']} where fewer than {limit} are wanted")
            credit |= dict.fromkeys(group[limit - 1 :], -1)
    regions = tuple(Region(found[k].box, worth, labels.get(k, ""), found[k].label) for k, worth in credit.items())
    return Verdict(float(strict), sum(terms) / len(terms), "; ".join(wrong) or "right", regions)


def _of_class(found: Sequence[Found], name: str) -> list[int]:
    return [k for k, thing in enumerate(found) if known_as(thing.label) == known_as(name)]


def strongest(found: Sequence[Found], confidence: int | float) -> list[Found]:
    """The objects above `confidence`, the surest first, at most `MOST` of a class."""
    kept: list[Found] = []
    for thing in surest(found):
        if thing.score > confidence and len(_of_class(kept, thing.label)) < MOST:
            kept.append(thing)
    return kept


def checked(wants: Mapping[str, Any], classes: Collection[str] | None, palette: Collection[str]) -> list[str]:
    """The classes `wants` speaks of. ValueError if it asks nothing, or what cannot be judged: a class not in `classes`
    (None: any will do), a colour not in `palette`, a class twice, a relation to nothing."""
    include, exclude = wants.get("include") or (), wants.get("exclude") or ()
    if not include:
        raise ValueError("wants has no `include`: it asks for nothing that could be checked")
    for item in (*include, *exclude):
        count = item.get("count", 1)
        if not (isinstance(item.get("class"), str) and isinstance(count, int) and count >= 1):
            raise ValueError(f"{dict(item)} needs a class and a count of at least 1")
        if classes is not None and known_as(item["class"]) not in classes:
            raise ValueError(f"the detector does not know the class {item['class']!r}")
        if "color" in item and item["color"] not in palette:
            raise ValueError(f"no way to tell the colour {item['color']!r}; known: {', '.join(palette) or 'none'}")
    for number, item in enumerate(include):
        if known_as(item["class"]) in {known_as(other["class"]) for other in include[:number]}:
            raise ValueError(f"{item['class']!r} is asked for twice; which is which cannot be told")
        if "position" in item and not _relates(item["position"], number, len(include)):
            raise ValueError(f"position {item['position']!r} is no relation to another entry of `include`")
    return list(dict.fromkeys(item["class"] for item in (*include, *exclude)))


def _relates(position: Any, number: int, entries: int) -> bool:
    match position:
        case [relation, int(other)]:
            return relation in RELATIONS and 0 <= other < entries and other != number
    return False


# -------------------------------------------------------------------------------------------------- the scorer


@runtime_checkable
class Eye(Protocol):
    """Tells colours: `name` says for each object in an image which colour of `palette` it has."""

    palette: Collection[str]

    def name(self, image: Float[Tensor, "3 H W"], found: Sequence[Found]) -> list[str]: ...


class ClipEye:
    """A CLIP model that compares each object, cut out on grey, with sentences for every colour."""

    palette = PALETTE

    def __init__(self, clip: Clip):
        self.clip = clip
        self._sentences: dict[str, Float[Tensor, "P D"]] = {}

    @torch.no_grad()
    def name(self, image: Float[Tensor, "3 H W"], found: Sequence[Found]) -> list[str]:
        pixels = torch.cat([self.clip.prepared(cut_out(image, thing)[None]) for thing in found])
        likeness = self.clip.model.encode_image(pixels, normalize=True)
        words = torch.stack([self._words(thing.label.lower()) for thing in found])
        best = torch.einsum("md,mpd->mp", likeness, words).argmax(1)
        return [self.palette[k] for k in best.tolist()]

    def _words(self, label: str) -> Float[Tensor, "P D"]:
        if label not in self._sentences:
            texts = [text.format(colour=colour, label=label) for colour in self.palette for text in SENTENCES]
            encoded = self.clip.model.encode_text(self.clip.tokenizer(texts).to(self.clip.device), normalize=True)
            mean = encoded.unflatten(0, (len(self.palette), len(SENTENCES))).mean(1)
            self._sentences[label] = mean / mean.norm(dim=1, keepdim=True)
        return self._sentences[label]


def cut_out(image: Float[Tensor, "3 H W"], thing: Found) -> Float[Tensor, "3 h w"]:
    """The pixels the object's box touches, in grey where its mask says that it is not there."""
    if thing.mask is not None:
        image = torch.where(thing.mask.to(image.device), image, GREY)
    left, top, right, bottom = thing.box
    return image[:, floor(top) : ceil(bottom), floor(left) : ceil(right)]


class GenEval:
    """The scorer, of a detector and an eye for colours; without one, prompts that ask for a colour cannot be scored.
    The other settings are those of `geneval`."""

    names = ("strict", "soft")

    def __init__(
        self,
        detector: Detector,
        eye: Eye | None,
        card: Card,
        confidence: int | float = 0.3,
        counting: int | float = 0.9,
        surplus: int | float = 1,
        grid: int = 8,
        batch: int = 8,
    ):
        self.detector, self.eye, self.card = detector, eye, card
        self.confidence, self.counting, self.surplus = confidence, counting, surplus
        self.grid, self.batch = grid, batch

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._look, self.batch)

    def _look(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        values = torch.full((len(images), 2), torch.nan)
        regions = torch.full((len(images), self.grid, self.grid), torch.nan)
        critiques, boxes, failures, asked = [""] * len(images), [()] * len(images), {}, {}
        for i, prompt in enumerate(prompts):
            try:
                asked[i] = checked(prompt.wants, self.detector.classes, self.eye.palette if self.eye else ())
            except ValueError as error:
                failures[i] = str(error)
        found = self.detector.detect(images[list(asked)], list(asked.values())) if asked else []
        for i, things in zip(asked, found, strict=True):
            verdict = self._judged(images[i], prompts[i].wants, things)
            values[i] = torch.tensor([verdict.strict, verdict.soft])
            critiques[i] = verdict.critique
            boxes[i] = verdict.regions
            regions[i] = paint(verdict.regions, tuple(images.shape[2:]), (self.grid, self.grid))
        return Scores(self.names, values, tuple(critiques), regions, failures, tuple(boxes))

    def _judged(self, image: Float[Tensor, "3 H W"], wants: Mapping[str, Any], found: Sequence[Found]) -> Verdict:
        found = strongest(found, self.counting if wants.get("tag") == "counting" else self.confidence)
        coloured = [k for item in wants["include"] if "color" in item for k in _of_class(found, item["class"])]
        colours: list[str | None] = [None] * len(found)
        if coloured:
            for k, colour in zip(coloured, self.eye.name(image, [found[k] for k in coloured]), strict=True):
                colours[k] = colour
        return judge(wants, found, colours, self.surplus)


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
    `colour_pretrained`: as `clip` takes them; without a colour model, prompts that ask for a colour are not scored.
    `confidence`: what an object must exceed to count, in [0, 1]; `counting`: the same for prompts tagged "counting".
    `surplus`: how much an object too many weighs in the soft count, a missing one being 1; 0: the more the merrier.
    `grid`: side of the region map. ValueError for settings outside these ranges and for models that cannot be had.
    """
    if not (0 <= confidence <= 1 and 0 <= counting <= 1):
        raise ValueError(f"geneval: confidence and counting are 0 to 1, not {confidence!r} and {counting!r}")
    if surplus < 0:
        raise ValueError(f"geneval: surplus is 0 or more, not {surplus!r}")
    with loading("geneval", model):
        finds = detector(model, min(confidence, counting), device)
    models, eye, shown, size = [finds.model], None, "none", "as the detector's processor has it"
    if colour_model:
        with loading("geneval", f"the colour model {colour_model}"):
            colour = clip(colour_model, colour_pretrained, device)
        models, eye, shown = [*models, colour.model], ClipEye(colour), colour.card.model
        size = f"{size}; objects for their colour {colour.card.size}"
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
        settings=dict(colour_model=shown, confidence=confidence, counting=counting, surplus=surplus, grid=grid),
    )
    return GenEval(finds, eye, card, confidence, counting, surplus, grid, batch)
