"""`shapes_critic`: the verifier of the embedded world as a critic. It says what is missing, surplus, wrongly coloured
or placed, and where, and writes a request that is easier to draw, in the words the embedded model knows.

Components in [0, 1], comparable across prompts; all that apply are 1 just where `shapes.strict` is:

- `overall`: `shapes.partial`.
- `objects`: the share of the wanted objects that are there, times wanted / seen where there are too many.
- `attributes`: of the colours and sizes that were asked for, the share that is right. NaN if none was.
- `relation`: whether it holds, NaN if none was asked for. `text`: the share of letters that is right, NaN likewise.

A prompt without ground truth is understood if it is a caption of the world. The revised request says what the first
left open, and nothing else: a colour for what has none (that of the object that is right already, else one that is not
in use), and for two objects where they stand to each other (as the one that is right stands, if one is). It means a
picture that fits the first request too. Licence: this project's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from reward_models.regions import Region, paint
from reward_models.scorers.shapes import Blob, Verdict, judge, look
from reward_models.scoring import each
from reward_models.shapes_world import COLOURS, OPPOSITE, SIDE, caption, understood
from reward_models.types import Card, Images, Prompt, Scores

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
        return each(images, prompts, self.names, self._look)

    def _look(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        values = torch.full((len(images), len(self.names)), torch.nan)
        maps = torch.full((len(images), self.grid, self.grid), torch.nan)
        said, requests, boxes, failures = [""] * len(images), [""] * len(images), [()] * len(images), {}
        for i, (prompt, seen) in enumerate(zip(prompts, look(images.cpu().numpy()), strict=True)):
            prompt = prompt if "tag" in prompt.wants else replace(prompt, wants=understood(prompt.text))
            try:
                verdict = judge(prompt, seen)
            except KeyError as error:
                failures[i] = str(error.args[0])
                continue
            values[i] = torch.tensor([verdict.partial, *aspects(prompt.wants, seen, verdict)])
            said[i], boxes[i] = verdict.critique, verdict.marks
            maps[i] = paint(verdict.marks, tuple(images.shape[2:]), (self.grid, self.grid))
            if not verdict.strict:
                requests[i] = revised(prompt, verdict.marks)
        return Scores(self.names, values, tuple(said), maps, failures, tuple(boxes), tuple(requests))


def aspects(wants: Item, seen: Sequence[Blob], verdict: Verdict) -> tuple[float, float, float, float]:
    """objects, attributes, relation, text, as in the module's head."""
    nan = float("nan")
    if wants["tag"] == "text":
        return nan, nan, nan, verdict.partial
    wanted = [item for item in wants["include"] for _ in range(item["count"])]
    found = [verdict.matched[r] for r in range(len(wanted)) if verdict.matched[r] is not None]
    objects = len(found) / len(wanted) * min(1.0, len(wanted) / max(1, len(seen)))
    asked = sum(len(item.keys() & {"color", "size"}) for item in wanted)
    right = sum(sum(checks[1:]) for checks in found)
    return objects, right / asked if asked else nan, nan if verdict.holds is None else float(verdict.holds), nan


def revised(prompt: Prompt, marks: Sequence[Region]) -> str:
    """The request with what it left open said, "" if it left nothing open."""
    wants = prompt.wants
    if wants["tag"] == "text":
        return ""
    right = {mark.label.split(" ", 1)[1]: mark for mark in marks if mark.label and mark.credit == 1}
    used = {item.get("color") for item in wants["include"]} | {mark.reason.split()[0] for mark in right.values()}
    free = iter([colour for colour in COLOURS if colour not in used])
    items = []
    for item in wants["include"]:
        seen = right.get(item["class"])
        colour = item.get("color") or (seen.reason.split()[0] if seen else next(free))
        items.append(item | {"color": colour})
    tag = wants["tag"]
    if len(items) == 2 and tag != "position":
        tag, items[0] = "position", items[0] | {"position": [_relation(items, right), 1]}
    text = caption({"tag": tag, "include": items})
    return "" if text == prompt.text else text


def _relation(items: Sequence[Item], right: Mapping[str, Region]) -> str:
    """Where the first thing stands to the second, so that the one that is right may stay where it is."""
    for place, item in enumerate(items):
        if item["class"] in right:
            left, top, far, bottom = right[item["class"]].box
            x, y = (left + far - SIDE) / 2, (top + bottom - SIDE) / 2
            relation = ("left of" if x < 0 else "right of") if abs(x) > abs(y) else ("above" if y < 0 else "below")
            return OPPOSITE[relation] if place else relation
    return "left of"
