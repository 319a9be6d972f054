"""What the exact verifiers of the embedded worlds share: the objects of an image, matching them to a request, the
verdict, and a request that is easier to draw."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from reward_models.regions import Region
from reward_models.types import Card, ImageScores, Prompt
from reward_models.worlds import ATTRIBUTES, OPPOSITE, caption, related

UNKNOWN = "blob"
Item = Mapping[str, Any]  # an entry of a request


def exact_card(name: str, grid: int) -> Card:
    """The card of a verifier or critic of an embedded world, with a map of `grid` cells a side."""
    return Card(
        name, licence="Apache-2.0", low=0, high=1, comparable_across_prompts=True, has_map=True, settings={"grid": grid}
    )


@dataclass(frozen=True)
class Blob:
    """An object detected in an image. `box` is (left, top, right, bottom) in px, `name` a noun, a letter or "blob";
    `style` is "" in a world without styles."""

    name: str
    colour: str
    box: tuple[int, int, int, int]
    style: str = ""

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def extent(self) -> int:
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)


Checks = Callable[[Item, Blob], list[bool]]


@dataclass(frozen=True)
class Verdict:
    """`strict` and `partial` as in the docstring of `reward_models.scorers.shapes`; `regions` are the objects in the
    image, with their credit. `matched`: for each requested object the checks of the blob matched to it (see
    `judge_objects`), None without a match. `holds`: whether the requested relation holds, None if none was
    requested."""

    strict: float
    partial: float
    critique: str
    regions: tuple[Region, ...]
    matched: tuple[list[bool] | None, ...] = ()
    holds: bool | None = None


def label(index: int, name: str) -> str:
    """The label of a region with the requested object of this index, "" without a name."""
    return f"{index + 1} {name}" if name else ""


def judge_objects(
    wants: Mapping[str, Any], blobs: Sequence[Blob], checks_of: Checks, offset: float, described: Callable[[Blob], str]
) -> Verdict:
    """The verdict on the objects of an image, matched to the requested ones for the most credit. `checks_of` gives
    [right noun, each requested attribute right], where attributes count only on the right noun; a relation needs
    `offset` px between the centres; `described` words an object with a wrong attribute."""
    entities = [item for item in wants["include"] for _ in range(item["count"])]
    checks = [[checks_of(item, blob) for blob in blobs] for item in entities]
    credit = np.array([[sum(c) / len(c) for c in row] for row in checks]).reshape(len(entities), len(blobs))
    rows, columns = linear_sum_assignment(credit, maximize=True)
    match = {int(r): int(c) for r, c in zip(rows, columns, strict=True) if credit[r, c] > 0}
    earned = [float(credit[r, match[r]]) if r in match else 0.0 for r in range(len(entities))]
    region_credit = {r: 2 * earned[r] - 1 for r in match}
    matched, holds = tuple(checks[r][match[r]] if r in match else None for r in range(len(entities))), None
    wrong = [f"no {item['class']}" for r, item in enumerate(entities) if r not in match]
    wrong += [f"the {entities[r]['class']} is {described(blobs[c])}" for r, c in match.items() if earned[r] < 1]
    if wants["tag"] == "position":
        relation = wants["include"][0]["position"][0]
        holds = 0 in match and 1 in match and related(blobs[match[0]].centre, blobs[match[1]].centre, relation, offset)
        for r, c in match.items():
            with_relation = [*checks[r][c], holds]
            region_credit[r] = 2 * sum(with_relation) / len(with_relation) - 1
        earned.append(float(holds))
        wrong += [] if holds else [f"not {relation}"]
    surplus = [blob for c, blob in enumerate(blobs) if c not in match.values()]
    wrong += [f"{len(surplus)} surplus"] if surplus else []
    partial = float(np.mean(earned)) * min(1.0, len(entities) / max(len(blobs), 1))
    regions = [
        Region(blobs[c].box, region_credit[r], label(r, entities[r]["class"]), f"{blobs[c].colour} {blobs[c].name}")
        for r, c in match.items()
    ]
    regions += [Region(blob.box, -1.0, "", f"{blob.colour} {blob.name}") for blob in surplus]
    return Verdict(float(not wrong), partial, "; ".join(wrong) or "right", tuple(regions), matched, holds)


def criticised(
    prompt: Prompt, blobs: Sequence[Blob], verdict: Verdict, colours: Collection[str], side: int
) -> ImageScores:
    """The row of a critic: `overall` is `partial`, then `aspects`; critique, regions, and where something is wrong the
    `revised` request."""
    values = {"overall": verdict.partial, **aspects(prompt.wants, blobs, verdict)}
    request = "" if verdict.strict else revised(prompt, verdict.regions, colours, side)
    return ImageScores(values, verdict.critique, request, regions=verdict.regions)


def aspects(wants: Mapping[str, Any], blobs: Sequence[Blob], verdict: Verdict) -> dict[str, float]:
    """The components other than `overall`; those that do not apply are left out."""
    if wants["tag"] == "text":
        return {"text": verdict.partial}
    wanted = [item for item in wants["include"] for _ in range(item["count"])]
    matched = [checks for checks in verdict.matched if checks is not None]
    values = {"objects": len(matched) / len(wanted) * min(1.0, len(wanted) / max(1, len(blobs)))}
    if attributes := sum(len(item.keys() & set(ATTRIBUTES)) for item in wanted):
        values["attributes"] = sum(sum(checks[1:]) for checks in matched) / attributes
    if verdict.holds is not None:
        values["relation"] = float(verdict.holds)
    return values


def revised(prompt: Prompt, regions: Sequence[Region], colours: Collection[str], side: int) -> str:
    """The request for a square image of this side with its open choices made explicit, "" if it has none. The reason of
    a region begins with the colour there; without `colours`, a colour that was not requested stays open."""
    wants = prompt.wants
    if wants["tag"] == "text":
        return ""
    right = {region.label.split(" ", 1)[1]: region for region in regions if region.label and region.credit == 1}
    used = {item.get("color") for item in wants["include"]} | {region.reason.split()[0] for region in right.values()}
    free = iter([colour for colour in colours if colour not in used])
    items = []
    for item in wants["include"]:
        region = right.get(item["class"])
        if colours and "color" not in item:
            item = item | {"color": region.reason.split()[0] if region else next(free)}
        items.append(item)
    tag = wants["tag"]
    if len(items) == 2 and tag != "position":
        tag, items[0] = "position", items[0] | {"position": [_relation(items, right, side), 1]}
    text = caption({"tag": tag, "include": items})
    return "" if text == prompt.text else text


def _relation(items: Sequence[Item], right: Mapping[str, Region], side: int) -> str:
    """The relation of the first object to the second under which the one that is right may stay where it is."""
    for index, item in enumerate(items):
        if item["class"] in right:
            left, top, far, bottom = right[item["class"]].box
            x, y = (left + far - side) / 2, (top + bottom - side) / 2
            relation = ("left of" if x < 0 else "right of") if abs(x) > abs(y) else ("above" if y < 0 else "below")
            return OPPOSITE[relation] if index else relation
    return "left of"
