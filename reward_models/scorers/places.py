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

import torch

from reward_models import replies, vlm
from reward_models.detect import detector
from reward_models.regions import Region, paint
from reward_models.scoring import each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import fingerprint, loading, named

MOST = 10  # regions proposed; SRUM's number
Box = tuple[int | float, int | float, int | float, int | float]


class Places:
    """The scorer. `model` is a folder or hub id of an image-text model, `proposals` of a detector with classes of its
    own. `coordinates`: what the model counts boxes in, "pixels", "thousand" (thousandths) or "unit". `whole`, `local`:
    files of instructions in place of ours. `tokens`: longest reply. `overlap`: which region counts where several lie,
    "mean", "max", "min" or "last". ValueError if a model cannot be had or a setting is none of these."""

    names = ("overall", "local")

    def __init__(
        self,
        model: str,
        proposals: str | None = None,
        coordinates: str = "pixels",
        whole: str | None = None,
        local: str | None = None,
        confidence: int | float = 0.3,
        tokens: int = 1024,
        overlap: str = "mean",
        grid: int = 8,
        device: str = "cpu",
        dtype: str = "float32",
        batch: int = 4,
    ):
        if coordinates not in replies.UNITS:
            raise ValueError(f"places: coordinates is one of {', '.join(replies.UNITS)}, not {coordinates!r}")
        paint([], (1, 1), (1, 1), overlap)  # refuses an unknown rule
        kind = "places_proposed" if proposals else "places_local"
        self.whole, self.local = (
            vlm.instruction("places", name, file) for name, file in (("places_global", whole), (kind, local))
        )
        self.model, self.processor = vlm.load("places", model, device, dtype)
        models = [self.model]
        self.finder = None
        if proposals:
            with loading("places", proposals):
                self.finder = detector(proposals, confidence, device)
            if self.finder.classes is None:
                raise ValueError(
                    f"places: {proposals} finds only what it is asked for; a detector with classes is needed"
                )
            models.append(self.finder.model)
        self.coordinates, self.tokens, self.overlap, self.grid = coordinates, tokens, overlap, grid
        self.device, self.batch = device, batch
        self.card = Card(
            "places",
            model=named(model),
            licence="the model's own",
            low=-1,
            high=1,
            places=True,
            size="as the model's processor has it",
            checkpoint=fingerprint(*models),
            settings=dict(
                coordinates=coordinates, whole=self.whole, local=self.local, confidence=confidence, tokens=tokens,
                overlap=overlap, grid=grid, dtype=dtype, proposals=named(proposals) if proposals else None,
            ),
        )  # fmt: skip

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._look, self.batch)

    def _look(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        size, texts = tuple(images.shape[2:]), [prompt.text for prompt in prompts]
        proposed = self._proposed(images)
        whole = self._ask(images, [self.whole.replace("{prompt}", text) for text in texts])
        local = self._ask(images, [self._local(text, boxes) for text, boxes in zip(texts, proposed, strict=True)])
        values = torch.full((len(images), 2), torch.nan)
        maps = torch.full((len(images), self.grid, self.grid), torch.nan)
        said, boxes, failures = [""] * len(images), [()] * len(images), {}
        for i in range(len(images)):
            try:
                reply = whole[i]
                score, said[i] = replies.overall(reply)
                reply = local[i]
                regions = tuple(replies.places(reply, size, self.coordinates, proposed[i]))
            except ValueError as error:
                failures[i] = f"{error}; the reply begins {replies.shown(reply)}"
                continue
            values[i] = torch.tensor([score, mean(regions)])
            boxes[i], maps[i] = regions, paint(regions, size, (self.grid, self.grid), self.overlap)
        return Scores(self.names, values, tuple(said), maps, failures, tuple(boxes))

    def _ask(self, images: Images, texts: Sequence[str]) -> list[str]:
        return vlm.written(self.model, self.processor, images, texts, self.device, self.tokens)

    def _local(self, prompt: str, proposed: Sequence[Box]) -> str:
        listed = "\n".join(f"{k}: {[round(edge) for edge in box]}" for k, box in enumerate(proposed, 1))
        text = self.local.replace("{coordinates}", replies.UNITS["pixels" if self.finder else self.coordinates])
        return text.replace("{regions}", listed).replace("{prompt}", prompt)  # last: a prompt may hold the others

    def _proposed(self, images: Images) -> list[list[Box]]:
        if self.finder is None:
            return [[] for _ in images]
        found = self.finder.detect(images, [sorted(self.finder.classes)] * len(images))
        return [sorted((own.box for own in things), key=area, reverse=True)[:MOST] for things in found]


def area(box: Box) -> int | float:
    return (box[2] - box[0]) * (box[3] - box[1])


def mean(regions: Sequence[Region]) -> float:
    """The mean credit weighted by area; NaN without a region."""
    whole = sum(area(own.box) for own in regions)
    return float(sum(area(own.box) * own.credit for own in regions) / whole) if regions else float("nan")
