"""`shapes_critic`: the verifier of the embedded world as a critic. It reports which objects are missing, surplus,
wrongly coloured or wrongly placed, and where, and writes a request that is easier to draw, in the vocabulary of the
embedded model.

Components in [0, 1], comparable across prompts; all that apply are 1 exactly where `shapes.strict` is:

- `overall`: `shapes.partial`.
- `objects`: the share of the requested objects that are present, times requested / present if there are too many.
- `attributes`: the share of the requested colours and sizes that are right. NaN if none was requested.
- `relation`: whether it holds, NaN if none was requested. `text`: the share of letters that are right, NaN likewise.

A prompt without ground truth is understood if it is a caption of the world. The revised request makes explicit what the
first left open, and changes nothing else: a colour for an object without one (the colour of the object if it is already
right, else an unused one), and for two objects their relation (the present one if an object is already right). A
picture that fits the revised request fits the first one too. Licence: this project's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from reward_models.regions import Region
from reward_models.scorers.shapes import Blob, Verdict, find_blobs, judge
from reward_models.scoring import each
from reward_models.shapes_world import COLOURS, OPPOSITE, SIDE, caption, understood
from reward_models.types import Card, Images, ImageScores, Prompt, Scores

Item = Mapping[str, Any]


class ShapesCritic:
    """The scorer. `grid` is the side of the region map."""

    names = ("overall", "objects", "attributes", "relation", "text")

    def __init__(self, grid: int = 8):
        self.grid = grid
        self.card = Card(
            "shapes_critic",
            licence="Apache-2.0",
            low=0,
            high=1,
            comparable_across_prompts=True,
            has_map=True,
            settings={"grid": grid},
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        rows = [self._score(*pair) for pair in zip(prompts, find_blobs(images.cpu().numpy()), strict=True)]
        return Scores.collect(self.names, rows, tuple(images.shape[2:]), self.grid)

    def _score(self, prompt: Prompt, blobs: list[Blob]) -> ImageScores:
        prompt = prompt if "tag" in prompt.wants else replace(prompt, wants=understood(prompt.text))
        try:
            verdict = judge(prompt, blobs)
        except KeyError as error:
            return ImageScores(failure=str(error.args[0]))
        values = {"overall": verdict.partial, **aspects(prompt.wants, blobs, verdict)}
        request = "" if verdict.strict else revised(prompt, verdict.regions)
        return ImageScores(values, verdict.critique, request, regions=verdict.regions)


def aspects(wants: Item, blobs: Sequence[Blob], verdict: Verdict) -> dict[str, float]:
    """The components other than `overall`; those that do not apply are left out."""
    if wants["tag"] == "text":
        return {"text": verdict.partial}
    wanted = [item for item in wants["include"] for _ in range(item["count"])]
    matched = [checks for checks in verdict.matched if checks is not None]
    values = {"objects": len(matched) / len(wanted) * min(1.0, len(wanted) / max(1, len(blobs)))}
    if attributes := sum(len(item.keys() & {"color", "size"}) for item in wanted):
        values["attributes"] = sum(sum(checks[1:]) for checks in matched) / attributes
    if verdict.holds is not None:
        values["relation"] = float(verdict.holds)
    return values


def revised(prompt: Prompt, regions: Sequence[Region]) -> str:
    """The request with its open choices made explicit, "" if it has none."""
    wants = prompt.wants
    if wants["tag"] == "text":
        return ""
    right = {region.label.split(" ", 1)[1]: region for region in regions if region.label and region.credit == 1}
    used = {item.get("color") for item in wants["include"]} | {region.reason.split()[0] for region in right.values()}
    free = iter([colour for colour in COLOURS if colour not in used])
    items = []
    for item in wants["include"]:
        region = right.get(item["class"])
        colour = item.get("color") or (region.reason.split()[0] if region else next(free))
        items.append(item | {"color": colour})
    tag = wants["tag"]
    if len(items) == 2 and tag != "position":
        tag, items[0] = "position", items[0] | {"position": [_relation(items, right), 1]}
    text = caption({"tag": tag, "include": items})
    return "" if text == prompt.text else text


def _relation(items: Sequence[Item], right: Mapping[str, Region]) -> str:
    """The relation of the first object to the second under which the one that is right may stay where it is."""
    for index, item in enumerate(items):
        if item["class"] in right:
            left, top, far, bottom = right[item["class"]].box
            x, y = (left + far - SIDE) / 2, (top + bottom - SIDE) / 2
            relation = ("left of" if x < 0 else "right of") if abs(x) > abs(y) else ("above" if y < 0 else "below")
            return OPPOSITE[relation] if index else relation
    return "left of"
