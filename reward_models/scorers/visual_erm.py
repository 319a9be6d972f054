"""`visual_erm`: the discrepancies between a picture and a reference picture, weighted by severity (after Visual-ERM).

The reference is the file `Prompt.wants["reference"]`. The model lists discrepancies with category, severity from 1
(hardly matters) to 3 (breaks or misleads), location, description and, if possible, a box. One score, higher is better,
comparable across prompts:

- `closeness`: 1 - (sum of severities) / `worst`, in [0, 1].

Boxes become regions of credit -severity / 3. A reply that cannot be read is a failure, not an average severity.
Licence: the model's own. Not checked against the released model.
"""

from collections.abc import Sequence
from typing import Any

from reward_models.regions import Region, inside
from reward_models.scoring import each
from reward_models.types import Images, ImageScores, Prompt, Scores
from reward_models.vlm import ask, replies, templates, types
from reward_models.vlm.scales import Scale

SEVERITY = Scale(1, 3)
LISTS = ("errors", "discrepancies", "differences")


def read(text: str, size: tuple[int, int], worst: int | float, coordinates: str = "pixels") -> ImageScores:
    """The discrepancies in a reply about a picture of `size` (height, width). An empty list means a perfect picture.
    ValueError without a list, or naming the first invalid entry."""
    lists = map(_rows, replies.values(replies.answer(text)))
    listed = replies.unanimous(rows for rows in lists if rows is not None)
    if listed is None:
        raise ValueError("the reply lists no errors")
    total, errors, regions = 0, [], []
    for number, row in enumerate(map(replies.plain, listed), 1):
        severity = SEVERITY.read(row.get("severity"), f"error {number}: severity")
        if severity not in (1, 2, 3):
            raise ValueError(f"error {number}: severity is {severity:g}; 1, 2 or 3 is needed")
        total += int(severity)
        details = " ".join(str(row.get(key) or "") for key in ("location", "description")).strip()
        errors.append(f"{row.get('category') or 'error'} ({severity:g}): {details}".strip(": "))
        box = replies.one_of(row, replies.BOX)
        if box is not None:
            try:
                regions.append(Region(tuple(replies.scaled(box, size, coordinates)), -severity / 3, reason=errors[-1]))
                inside(regions[-1:], size)
            except ValueError as error:
                raise ValueError(f"error {number}: {error}") from None
    return ImageScores({"closeness": max(0.0, 1 - total / worst)}, "; ".join(errors), regions=tuple(regions))


def _rows(value: Any) -> list[dict[str, Any]] | None:
    listed = replies.one_of(replies.plain(value), LISTS) if isinstance(value, dict) else value
    return listed if isinstance(listed, list) and all(isinstance(row, dict) for row in listed) else None


class VisualErm:
    """The scorer. `model` is a folder or hub id, or with `url` its name on the server. `kind`: the word for the picture
    in the question. `worst`: the sum of severities that scores 0. `coordinates`: the unit of boxes, "pixels",
    "thousand" or "unit". `instruction`: a file that replaces ours. `asking`: see `ask.judge`. ValueError if the model
    is unavailable or a setting is invalid."""

    names = ("closeness",)

    def __init__(
        self,
        model: str,
        url: str | None = None,
        kind: str = "picture",
        worst: int | float = 50,
        coordinates: str = "pixels",
        instruction: str | None = None,
        tokens: int = 4096,
        grid: int = 8,
        **asking: Any,
    ):
        if not worst > 0 or coordinates not in replies.UNITS:
            raise ValueError(
                f"visual_erm: worst is above 0, coordinates one of {', '.join(replies.UNITS)}; "
                f"got {worst!r}, {coordinates!r}"
            )
        self.template = templates.Template.of("visual_erm", "visual_erm", ("image", "reference"), instruction)
        self.kind, self.worst, self.coordinates, self.tokens, self.grid = kind, worst, coordinates, tokens, grid
        self.judge = ask.judge("visual_erm", model, url, asking)
        settings = {"kind": kind, "worst": worst, "coordinates": coordinates, "tokens": tokens, "grid": grid}
        settings["instruction"] = self.template.source
        self.card = ask.card("visual_erm", self.judge, 0, 1, settings, comparable_across_prompts=True, has_map=True)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, batch=max(1, len(images)))

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        size = tuple(images.shape[2:])
        units = replies.UNITS[self.coordinates]

        def question(pair: tuple[Any, Prompt]) -> types.Question:
            reference = ask.picture_of(pair[1], "reference")
            return self.template.fill(image=pair[0], reference=reference, kind=self.kind, coordinates=units)

        def parse(i: int, reply: types.Reply) -> ImageScores:
            return read(reply.text, size, self.worst, self.coordinates)

        answers = ask.ask_all(self.judge, [*zip(images, prompts, strict=True)], question, self.tokens)
        return ask.parse_replies(self.names, answers, parse, size, self.grid)
