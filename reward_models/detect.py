"""Objects in images, by a detector of transformers. The class of its configuration tells which kind it is:

- Mask2Former and MaskFormer: masks, and the boxes around them; the classes the model was trained on;
- DETR, RT-DETR and their like: boxes; the classes the model was trained on;
- OWLv2, Grounding DINO and their like: boxes; whatever is asked for, one label at a time.

Left out: other segmentation models (each wants its own input), merging boxes that overlap.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from reward_models.images import to_uint8
from reward_models.model_folders import pinned
from reward_models.types import Images
from reward_models.weights import named, pretrained

SAME = {  # a name used in prompts or in other listings of COCO's classes: COCO's own
    "aeroplane": "airplane",
    "cellphone": "cell phone",
    "computer keyboard": "keyboard",
    "computer mouse": "mouse",
    "diningtable": "dining table",
    "hair dryer": "hair drier",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tv monitor": "tv",
    "tv remote": "remote",
    "tvmonitor": "tv",
}
MASKS = ("mask2former", "maskformer")  # model types with one mask per query, on the whole image


@dataclass(frozen=True)
class Found:
    """An object found in an image: the label it was asked for by, how sure the detector is, in [0, 1], the box (left,
    top, right, bottom) in pixels of the image, and its pixels, if the detector gives them."""

    label: str
    score: int | float
    box: tuple[int | float, int | float, int | float, int | float]
    mask: Bool[Tensor, "H W"] | None = None


@runtime_checkable
class Detector(Protocol):
    """Finds objects. `classes` are all it can be asked for, as `known_as` spells them, or None if that is anything."""

    classes: Collection[str] | None

    def detect(self, images: Images, asked: Sequence[Collection[str]]) -> list[list[Found]]:
        """For each image the objects with one of its `asked` labels, the surest first."""
        ...


def known_as(label: str) -> str:
    """The one spelling under which labels are compared: lower case, words apart, COCO's name for it."""
    label = " ".join(label.lower().replace("-", " ").replace("_", " ").split())
    return SAME.get(label, label)


def surest(found: Sequence[Found]) -> list[Found]:
    return sorted(found, key=lambda thing: thing.score, reverse=True)


class ClosedSet:
    """A model that knows a fixed set of classes. `process` makes its input of images; `objects` makes of input, output
    and the images' (height, width) a list for each image: (class number, score, box, mask or None)."""

    def __init__(self, model: nn.Module, process: Callable, objects: Callable, device: str):
        self.model, self.process, self.objects, self.device = model.to(device), process, objects, device
        self.names = {number: known_as(name) for number, name in model.config.id2label.items()}
        self.classes = frozenset(self.names.values())

    @torch.no_grad()
    def detect(self, images: Images, asked: Sequence[Collection[str]]) -> list[list[Found]]:
        inputs = self.process(images=list(to_uint8(images).cpu()), return_tensors="pt").to(self.device)
        seen = self.objects(inputs, self.model(**inputs), tuple(images.shape[2:]))
        out = []
        for labels, things in zip(asked, seen, strict=True):
            spelt = {known_as(label): label for label in labels}
            things = [(self.names[number], *rest) for number, *rest in things]
            out.append(surest([Found(spelt[name], *rest) for name, *rest in things if name in spelt]))
        return out


class OpenSet:
    """A model that is told what to look for. It is asked for one label at a time, so that no label or image depends on
    those beside it, and every box belongs to the label asked for."""

    classes = None

    def __init__(self, model: nn.Module, processor: Any, confidence: int | float, device: str):
        self.model, self.processor = model.to(device), processor
        self.confidence, self.device = confidence, device

    @torch.no_grad()
    def detect(self, images: Images, asked: Sequence[Collection[str]]) -> list[list[Found]]:
        pixels, size = list(to_uint8(images).cpu()), tuple(images.shape[2:])
        out: list[list[Found]] = [[] for _ in pixels]
        for label in dict.fromkeys(label for labels in asked for label in labels):
            rows = [i for i, labels in enumerate(asked) if label in labels]
            texts = [[label.lower()]] * len(rows)
            inputs = self.processor(images=[pixels[i] for i in rows], text=texts, return_tensors="pt").to(self.device)
            found = self.processor.post_process_grounded_object_detection(
                self.model(**inputs), threshold=self.confidence, target_sizes=[size] * len(rows), text_labels=texts
            )
            for i, things in zip(rows, found, strict=True):
                boxes = zip(things["scores"].tolist(), _inside(things["boxes"], size), strict=True)
                out[i] += [Found(label, score, box) for score, box in boxes if box]
        return [surest(found) for found in out]


def _inside(boxes: Float[Tensor, "M 4"], size: tuple[int, int]) -> list[tuple[float, ...] | None]:
    """The boxes, cut at the image's borders; None for one that lies outside."""
    bounds = torch.tensor([size[1], size[0]] * 2)
    cut = boxes.cpu().float().clamp(min=0).minimum(bounds).tolist()
    return [tuple(box) if box[0] < box[2] and box[1] < box[3] else None for box in cut]


def boxed(processor: Any, confidence: int | float) -> Callable:
    """`objects` of a `ClosedSet` that gives boxes, as transformers processes them."""

    def objects(inputs: Mapping, outputs: Any, size: tuple[int, int]) -> list[list[tuple]]:
        sizes = [size] * len(inputs["pixel_values"])
        found = processor.post_process_object_detection(outputs, threshold=confidence, target_sizes=sizes)
        return [
            [
                (number, score, box, None)
                for number, score, box in zip(
                    things["labels"].tolist(), things["scores"].tolist(), _inside(things["boxes"], size), strict=True
                )
                if box
            ]
            for things in found
        ]

    return objects


def masked(confidence: int | float) -> Callable:
    """`objects` of a `ClosedSet` that gives masks: each query and class whose probability times the mean probability of
    the mask's pixels exceeds `confidence`. Unlike transformers' own it cuts away what the images were padded with."""

    def objects(inputs: Mapping, outputs: Any, size: tuple[int, int]) -> list[list[tuple]]:
        shown, padded = inputs["pixel_mask"][0], inputs["pixel_values"].shape[2:]
        high, wide = int(shown.any(1).sum()), int(shown.any(0).sum())
        found = []
        for kinds, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
            kinds = kinds.softmax(-1)[:, :-1]  # the last is "nothing"
            likely = kinds.amax(1) > confidence
            masks = F.interpolate(masks[likely, None], padded, mode="bilinear")[..., :high, :wide]
            masks = F.interpolate(masks, size, mode="bilinear")[:, 0]
            found.append(_instances(kinds[likely].cpu(), masks.cpu(), confidence))
        return found

    return objects


def _instances(kinds: Float[Tensor, "Q C"], masks: Float[Tensor, "Q H W"], confidence: int | float) -> list[tuple]:
    inside = masks > 0
    quality = (masks.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)  # 0 for an empty mask
    scores = kinds * quality[:, None]
    out = []
    for query, number in (scores > confidence).nonzero().tolist():
        rows, columns = inside[query].any(1).nonzero(), inside[query].any(0).nonzero()
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        out.append((number, float(scores[query, number]), box, inside[query]))
    return out


def detector(model: str, confidence: int | float, device: str = "cpu") -> ClosedSet | OpenSet:
    """The detector in a folder or hub repository; it reports objects it is more than `confidence` sure of. ValueError
    if it is of no kind that is known here; whatever transformers raises if it cannot be had."""
    finder = _opened(model, confidence, device)
    finder.detect(torch.full((1, 3, 64, 64), 0.5), [["cat"]])  # a folder may describe images that its model cannot take
    return finder


def _opened(model: str, confidence: int | float, device: str) -> ClosedSet | OpenSet:
    from transformers import (
        MODEL_FOR_OBJECT_DETECTION_MAPPING,
        MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
        AutoConfig,
        AutoImageProcessor,
        AutoModelForObjectDetection,
        AutoModelForUniversalSegmentation,
        AutoModelForZeroShotObjectDetection,
        AutoProcessor,
    )

    same = pinned(model, named(model))
    config = AutoConfig.from_pretrained(model, trust_remote_code=False, **same)
    if type(config) in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING:
        loaded = pretrained(AutoModelForZeroShotObjectDetection, model, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False, **same)
        return OpenSet(loaded, processor, confidence, device)
    if type(config) in MODEL_FOR_OBJECT_DETECTION_MAPPING:
        loaded = pretrained(AutoModelForObjectDetection, model, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False, **same)
        return ClosedSet(loaded, processor, boxed(processor, confidence), device)
    if config.model_type in MASKS:
        loaded = pretrained(AutoModelForUniversalSegmentation, model, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False, **same)
        return ClosedSet(loaded, processor, masked(confidence), device)
    raise ValueError(f"{type(config).__name__} belongs to no detector known here")
