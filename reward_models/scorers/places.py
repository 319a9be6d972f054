"""`places`: a vision-language model scores the layout of an image and what is right or wrong in its regions (after
SRUM's global and local judge, arXiv 2510.12784).

Each image gets two questions. Global: a score in [-1, 1] for the layout only, with a reason. Local: a list of regions,
each with box, score in [-1, 1] and reason; with `proposals`, the boxes come from a detector, and the model scores them
by number. Two scores, higher is better, roughly comparable across prompts:

- `overall`: the global score.
- `local`: the mean of the regions' scores weighted by their area, NaN if the model names none.

A reply that cannot be parsed makes both NaN, and the reason quotes its beginning. The instructions are our own, in
`reward_models/vlm/instructions/`; models differ in how well they follow them, and in the unit of their boxes. Licence:
the model's own. Not checked against SRUM's scores, which come from another model and another instruction.
"""

from collections.abc import Sequence
from typing import Any

import torch

from reward_models.detect import detector
from reward_models.model_folders import loading
from reward_models.regions import Region, paint
from reward_models.scoring import each
from reward_models.types import Images, ImageScores, Prompt, Scores
from reward_models.vlm import ask, replies, templates, types
from reward_models.weights import fingerprint, named

MOST = 10  # proposed regions, as in SRUM
Box = tuple[int | float, int | float, int | float, int | float]


class Places:
    """The scorer. `model` is a folder or hub id of an image-text model, or with `url` its name on the server;
    `proposals` a detector with fixed classes. `coordinates`: the unit of the model's boxes, "pixels", "thousand"
    (thousandths) or "unit". `whole`, `local`: files that replace the global and the local instruction. `tokens`: the
    longest reply. `overlap`: how overlapping regions combine, "mean", "max", "min" or "last". `asking`: see
    `ask.judge`. ValueError if a model is unavailable or a setting is invalid."""

    names = ("overall", "local")

    def __init__(
        self,
        model: str,
        url: str | None = None,
        proposals: str | None = None,
        coordinates: str = "pixels",
        whole: str | None = None,
        local: str | None = None,
        confidence: int | float = 0.3,
        tokens: int = 1024,
        overlap: str = "mean",
        grid: int = 8,
        device: str = "cpu",
        **asking: Any,
    ):
        if coordinates not in replies.UNITS:
            raise ValueError(f"places: coordinates is one of {', '.join(replies.UNITS)}, not {coordinates!r}")
        paint([], (1, 1), (1, 1), overlap)  # raises for an unknown rule
        self.whole = templates.Template.of("places", "places_global", ("image", "prompt"), whole)
        needed = ("image", "prompt", "regions") if proposals else ("image", "prompt")
        self.local = templates.Template.of("places", "places_proposed" if proposals else "places_local", needed, local)
        self.judge = ask.judge("places", model, url, asking if url else asking | {"device": device})
        self.finder = None
        if proposals:
            with loading("places", proposals):
                self.finder = detector(proposals, confidence, device)
            if self.finder.classes is None:
                raise ValueError(f"places: {proposals} has an open vocabulary; a detector with fixed classes is needed")
        self.coordinates, self.tokens, self.overlap, self.grid = coordinates, tokens, overlap, grid
        settings = dict(
            coordinates=coordinates, whole=self.whole.source, local=self.local.source, confidence=confidence,
            tokens=tokens, overlap=overlap, grid=grid,
            proposals=[named(proposals), fingerprint(self.finder.model)] if proposals else None,
        )  # fmt: skip
        self.card = ask.card("places", self.judge, -1, 1, settings, has_map=True)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        size, count = tuple(images.shape[2:]), len(images)
        proposed = self._proposed(images)
        units = replies.UNITS["pixels" if self.finder else self.coordinates]
        given = [
            {"image": image, "prompt": templates.quoted(prompt.text)}
            for image, prompt in zip(images, prompts, strict=True)
        ]
        questions = [self.whole.fill(**fields) for fields in given]
        questions += [
            self.local.fill(**fields, coordinates=units, regions=listed(boxes))
            for fields, boxes in zip(given, proposed, strict=True)
        ]
        answers = self.judge.ask(questions, self.tokens)

        def parse_global(i: int, reply: types.Reply) -> ImageScores:
            score, reason = replies.overall(reply.text, reply.cut)
            return ImageScores({"overall": score}, reason)

        def parse_local(i: int, reply: types.Reply) -> ImageScores:
            regions = tuple(replies.read_regions(reply.text, size, self.coordinates, proposed[i], reply.cut))
            return ImageScores({"local": mean(regions)}, regions=regions)

        overall = ask.parse_replies(self.names, answers[:count], parse_global)
        local = ask.parse_replies(self.names, answers[count:], parse_local, size)
        failures = local.failures | overall.failures
        values = torch.stack([overall.values[:, 0], local.values[:, 1]], 1)
        values[[*failures]] = torch.nan
        boxes = tuple(() if i in failures else regions for i, regions in enumerate(local.boxes))
        maps = [paint(regions, size, (self.grid, self.grid), self.overlap) for regions in boxes]
        raw = tuple("\n\n".join(pair) for pair in zip(overall.replies, local.replies, strict=True))
        return Scores(self.names, values, overall.critiques, torch.stack(maps), failures, boxes, replies=raw)

    def _proposed(self, images: Images) -> list[list[Box]]:
        if self.finder is None:
            return [[] for _ in images]
        detections = self.finder.detect(images, [sorted(self.finder.classes)] * len(images))
        boxes = [[detection.box for detection in of_image] for of_image in detections]
        return [sorted(of_image, key=area, reverse=True)[:MOST] for of_image in boxes]


def listed(boxes: Sequence[Box]) -> str:
    return "\n".join(f"{k}: {[round(edge) for edge in box]}" for k, box in enumerate(boxes, 1))


def area(box: Box) -> int | float:
    return (box[2] - box[0]) * (box[3] - box[1])


def mean(regions: Sequence[Region]) -> float:
    """The mean credit weighted by area; NaN without a region."""
    if not regions:
        return float("nan")
    return float(sum(area(r.box) * r.credit for r in regions) / sum(area(r.box) for r in regions))
