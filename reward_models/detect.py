"""Object detection with models of transformers. The class of the configuration decides the kind:

- Mask2Former and MaskFormer: masks and the boxes around them, of the classes the model was trained on;
- DETR, RT-DETR and similar: boxes, of the classes the model was trained on;
- OWLv2, Grounding DINO and similar: boxes of any label, one label at a time (open vocabulary).

Not supported: other segmentation models (each needs its own input), merging boxes that overlap.
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

SAME = {  # names used in prompts or in other lists of COCO's classes -> COCO's own
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
MASKS = ("mask2former", "maskformer")  # model types with one mask per query


@dataclass(frozen=True)
class Detection:
    """An object detected in an image: the requested label, the confidence in [0, 1], the box (left, top, right, bottom)
    in pixels of the image, and its mask, if the detector gives one."""

    label: str
    score: int | float
    box: tuple[int | float, int | float, int | float, int | float]
    mask: Bool[Tensor, "H W"] | None = None


@runtime_checkable
class Detector(Protocol):
    """Detects objects. `classes` are all it knows, as `known_as` spells them, or None for an open vocabulary."""

    classes: Collection[str] | None

    def detect(self, images: Images, labels: Sequence[Collection[str]]) -> list[list[Detection]]:
        """For each image the objects with one of its `labels`, the most confident first."""
        ...


def known_as(label: str) -> str:
    """The normal form in which labels are compared: lower case, words separated by spaces, COCO's name."""
    label = " ".join(label.lower().replace("-", " ").replace("_", " ").split())
    return SAME.get(label, label)


def by_confidence(detections: Sequence[Detection]) -> list[Detection]:
    return sorted(detections, key=lambda detection: detection.score, reverse=True)


class ClosedSet:
    """A model with a fixed set of classes. `process` converts images to its input; `objects` converts input, output and
    the images' (height, width) to a list for each image: (class number, score, box, mask or None)."""

    def __init__(self, model: nn.Module, process: Callable, objects: Callable, device: str):
        self.model, self.process, self.objects, self.device = model.to(device), process, objects, device
        self.names = {number: known_as(name) for number, name in model.config.id2label.items()}
        self.classes = frozenset(self.names.values())

    @torch.no_grad()
    def detect(self, images: Images, labels: Sequence[Collection[str]]) -> list[list[Detection]]:
        inputs = self.process(images=list(to_uint8(images).cpu()), return_tensors="pt").to(self.device)
        objects = self.objects(inputs, self.model(**inputs), tuple(images.shape[2:]))
        detections = []
        for requested, of_image in zip(labels, objects, strict=True):
            label_of = {known_as(label): label for label in requested}
            named_objects = [(self.names[number], *rest) for number, *rest in of_image]
            detections.append(
                by_confidence([Detection(label_of[name], *rest) for name, *rest in named_objects if name in label_of])
            )
        return detections


class OpenSet:
    """An open-vocabulary model. It gets one label at a time, so that no label or image depends on the others in its
    batch, and every box belongs to the requested label."""

    classes = None

    def __init__(self, model: nn.Module, processor: Any, confidence: int | float, device: str):
        self.model, self.processor = model.to(device), processor
        self.confidence, self.device = confidence, device

    @torch.no_grad()
    def detect(self, images: Images, labels: Sequence[Collection[str]]) -> list[list[Detection]]:
        pixels, size = list(to_uint8(images).cpu()), tuple(images.shape[2:])
        out: list[list[Detection]] = [[] for _ in pixels]
        for label in dict.fromkeys(label for requested in labels for label in requested):
            rows = [i for i, requested in enumerate(labels) if label in requested]
            texts = [[label.lower()]] * len(rows)
            inputs = self.processor(images=[pixels[i] for i in rows], text=texts, return_tensors="pt").to(self.device)
            results = self.processor.post_process_grounded_object_detection(
                self.model(**inputs), threshold=self.confidence, target_sizes=[size] * len(rows), text_labels=texts
            )
            for i, result in zip(rows, results, strict=True):
                boxes = zip(result["scores"].tolist(), _inside(result["boxes"], size), strict=True)
                out[i] += [Detection(label, score, box) for score, box in boxes if box]
        return [by_confidence(detections) for detections in out]


def _inside(boxes: Float[Tensor, "M 4"], size: tuple[int, int]) -> list[tuple[float, ...] | None]:
    """The boxes, clipped to the image; None for one that lies outside."""
    bounds = torch.tensor([size[1], size[0]] * 2)
    clipped = boxes.cpu().float().clamp(min=0).minimum(bounds).tolist()
    return [tuple(box) if box[0] < box[2] and box[1] < box[3] else None for box in clipped]


def boxed(processor: Any, confidence: int | float) -> Callable:
    """`objects` of a `ClosedSet` that gives boxes, by the post-processing of transformers."""

    def objects(inputs: Mapping, outputs: Any, size: tuple[int, int]) -> list[list[tuple]]:
        sizes = [size] * len(inputs["pixel_values"])
        results = processor.post_process_object_detection(outputs, threshold=confidence, target_sizes=sizes)
        return [
            [
                (number, score, box, None)
                for number, score, box in zip(
                    result["labels"].tolist(), result["scores"].tolist(), _inside(result["boxes"], size), strict=True
                )
                if box
            ]
            for result in results
        ]

    return objects


def masked(confidence: int | float) -> Callable:
    """`objects` of a `ClosedSet` that gives masks: each query and class whose probability times the mean probability of
    the mask's pixels exceeds `confidence`. In contrast to the post-processing of transformers, padding is removed."""

    def objects(inputs: Mapping, outputs: Any, size: tuple[int, int]) -> list[list[tuple]]:
        unpadded, padded = inputs["pixel_mask"][0], inputs["pixel_values"].shape[2:]
        high, wide = int(unpadded.any(1).sum()), int(unpadded.any(0).sum())
        objects_of_images = []
        for kinds, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
            kinds = kinds.softmax(-1)[:, :-1]  # the last is "nothing"
            likely = kinds.amax(1) > confidence
            masks = F.interpolate(masks[likely, None], padded, mode="bilinear")[..., :high, :wide]
            masks = F.interpolate(masks, size, mode="bilinear")[:, 0]
            objects_of_images.append(_instances(kinds[likely].cpu(), masks.cpu(), confidence))
        return objects_of_images

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
    """The detector in a folder or hub repository, with a confidence threshold. ValueError if its kind is not supported;
    the exceptions of transformers if it is unavailable."""
    finder = _load(model, confidence, device)
    finder.detect(torch.full((1, 3, 64, 64), 0.5), [["cat"]])  # the processor of a folder may not fit its model
    return finder


def _load(model: str, confidence: int | float, device: str) -> ClosedSet | OpenSet:
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

    pinned_revision = pinned(model, named(model))
    config = AutoConfig.from_pretrained(model, trust_remote_code=False, **pinned_revision)
    if type(config) in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING:
        loaded = pretrained(AutoModelForZeroShotObjectDetection, model, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False, **pinned_revision)
        return OpenSet(loaded, processor, confidence, device)
    if type(config) in MODEL_FOR_OBJECT_DETECTION_MAPPING:
        loaded = pretrained(AutoModelForObjectDetection, model, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False, **pinned_revision)
        return ClosedSet(loaded, processor, boxed(processor, confidence), device)
    if config.model_type in MASKS:
        loaded = pretrained(AutoModelForUniversalSegmentation, model, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False, **pinned_revision)
        return ClosedSet(loaded, processor, masked(confidence), device)
    raise ValueError(f"{type(config).__name__} is not a supported detector")
