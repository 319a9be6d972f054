"""`places`: an image-text model says how well the whole is laid out, and what is right or wrong where (after SRUM's
global and local judge, arXiv 2510.12784).

Two questions for each image. The whole: layout alone, a score in [-1, 1] and a reason. The places: a list of regions,
each with box, score in [-1, 1] and reason; with `proposals`, the objects a detector finds are given by number instead.
Two scores, higher is better, roughly comparable across prompts:

- `overall`: the score of the whole.
- `local`: the mean of the regions' scores weighted by their area, NaN (no opinion) where the model names none.

A reply that cannot be read makes both NaN, with the reply's beginning in the reason. The instructions are ours, in
`reward_models/instructions/`; models differ much in how well they follow them, and in what they count boxes in.
Licence: the model's own. Not checked against SRUM's scores, whose judge is another model with other words.
"""

from collections.abc import Sequence
from typing import Any

import torch

from reward_models.detect import detector
from reward_models.model_folders import loading
from reward_models.regions import Region, paint
from reward_models.scoring import each
from reward_models.types import Images, Prompt, Scores
from reward_models.vlm import ask, replies, templates, types
from reward_models.weights import fingerprint, named

MOST = 10  # regions proposed; SRUM's number
Box = tuple[int | float, int | float, int | float, int | float]


class Places:
    """The scorer. `model` is a folder or hub id of an image-text model, or with `url` the name a server gives it;
    `proposals` a detector with classes of its own. `coordinates`: what the model counts boxes in, "pixels", "thousand"
    (thousandths) or "unit". `whole`, `local`: files of instructions in place of ours. `tokens`: longest reply.
    `overlap`: which region counts where several lie, "mean", "max", "min" or "last". `asking`: see `ask.judge`.
    ValueError if a model cannot be had or a setting is none of these."""

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
        paint([], (1, 1), (1, 1), overlap)  # refuses an unknown rule
        self.whole = templates.Template.of("places", "places_global", ("image", "prompt"), whole)
        needed = ("image", "prompt", "regions") if proposals else ("image", "prompt")
        self.local = templates.Template.of("places", "places_proposed" if proposals else "places_local", needed, local)
        self.judge = ask.judge("places", model, url, asking if url else asking | {"device": device})
        self.finder = None
        if proposals:
            with loading("places", proposals):
                self.finder = detector(proposals, confidence, device)
            if self.finder.classes is None:
                raise ValueError(
                    f"places: {proposals} finds only what it is asked for; a detector with classes is needed"
                )
        self.coordinates, self.tokens, self.overlap, self.grid = coordinates, tokens, overlap, grid
        own = dict(
            coordinates=coordinates, whole=self.whole.source, local=self.local.source, confidence=confidence,
            tokens=tokens, overlap=overlap, grid=grid,
            proposals=[named(proposals), fingerprint(self.finder.model)] if proposals else None,
        )  # fmt: skip
        self.card = ask.card("places", self.judge, -1, 1, own, has_map=True)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._look)

    def _look(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        size, count = tuple(images.shape[2:]), len(images)
        proposed = self._proposed(images)
        units = replies.UNITS["pixels" if self.finder else self.coordinates]
        told = [
            {"image": image, "prompt": templates.quoted(own.text)} for image, own in zip(images, prompts, strict=True)
        ]
        questions = [self.whole.fill(**own) for own in told]
        questions += [
            self.local.fill(**own, coordinates=units, regions=listed(boxes))
            for own, boxes in zip(told, proposed, strict=True)
        ]
        asked = self.judge.ask(questions, self.tokens)

        def whole(i: int, reply: types.Reply) -> ask.Parsed:
            score, said = replies.overall(reply.text, reply.cut)
            return ask.Parsed({"overall": score}, said)

        def local(i: int, reply: types.Reply) -> ask.Parsed:
            regions = tuple(replies.places(reply.text, size, self.coordinates, proposed[i], reply.cut))
            return ask.Parsed({"local": mean(regions)}, regions=regions)

        one = ask.findings(self.names, asked[:count], whole)
        two = ask.findings(self.names, asked[count:], local, size)
        failures = two.failures | one.failures
        values = torch.stack([one.values[:, 0], two.values[:, 1]], 1)
        values[[*failures]] = torch.nan
        boxes = tuple(() if i in failures else own for i, own in enumerate(two.boxes))
        maps = [paint(own, size, (self.grid, self.grid), self.overlap) for own in boxes]
        raw = tuple("\n\n".join(both) for both in zip(one.replies, two.replies, strict=True))
        return Scores(self.names, values, one.critiques, torch.stack(maps), failures, boxes, replies=raw)

    def _proposed(self, images: Images) -> list[list[Box]]:
        if self.finder is None:
            return [[] for _ in images]
        found = self.finder.detect(images, [sorted(self.finder.classes)] * len(images))
        return [sorted((own.box for own in things), key=area, reverse=True)[:MOST] for things in found]


def listed(boxes: Sequence[Box]) -> str:
    return "\n".join(f"{k}: {[round(edge) for edge in box]}" for k, box in enumerate(boxes, 1))


def area(box: Box) -> int | float:
    return (box[2] - box[0]) * (box[3] - box[1])


def mean(regions: Sequence[Region]) -> float:
    """The mean credit weighted by area; NaN without a region."""
    whole = sum(area(own.box) for own in regions)
    return float(sum(area(own.box) * own.credit for own in regions) / whole) if regions else float("nan")
