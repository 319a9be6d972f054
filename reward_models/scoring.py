"""What every scorer does at its border: check, round, batch, isolate. Here once, so that no scorer can forget it; and
how several scorers look at pictures of any sizes."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models import overlay as heat
from reward_models.images import rounded
from reward_models.types import Images, Infinite, Prompt, RewardModel, Scores, Unusable

Look = Callable[[Images, Sequence[Prompt]], Float[Tensor, "M K"] | Scores]
Picture = Float[Tensor, "1 3 _ _"]  # one image, of any size
LEVEL = 1 / 255
TEXTS = ("critiques", "requests", "replies")  # of `Scores`, one for each image


def each(images: Images, prompts: Sequence[Prompt], names: tuple[str, ...], look: Look, batch: int = 64) -> Scores:
    """Scores of images that do not depend on their neighbours: `look`, on at most `batch` of them at a time.

    What is looked at are the 256 levels a PNG would hold, so that an image scores the same in memory and from disk. An
    image with a pixel that is not finite or not in [0, 1], a score that is not finite, and an image `look` fails on
    become NaN with the reason; a batch that fails is tried again in halves, so that one image, or too little memory for
    all of them, does not cost the others their score.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    failures = unfit(images)
    fit = [i for i in range(len(images)) if i not in failures]

    def part(rows: list[int]) -> Scores:
        found = look(rounded(_picked(images, rows)), [prompts[i] for i in rows])
        return found if isinstance(found, Scores) else _checked(names, found)

    batches = [[[i] for i in fit[start : start + batch]] for start in range(0, len(fit), batch)]
    return _halved(len(images), names, batches, part, failures)


def asked(scorer: RewardModel, images: Images, prompts: Sequence[Prompt]) -> Scores:
    """What a scorer thinks of images, where whatever it trips over is their failure and not the caller's end.

    A call that raises, leaves by SystemExit or returns something else than a score for each image is tried again in
    halves, of images or, where the card says `groupwise`, of prompts; those it fails on by themselves become NaN with
    the reason. Ctrl-C and what else a signal raises passes, and so do Infinite, of all rows shown, and Unusable.
    """
    units = [[i] for i in range(len(images))]
    if scorer.card.groupwise:
        siblings = defaultdict(list)
        for i, prompt in enumerate(prompts):
            siblings[prompt.id, prompt.text].append(i)
        units = [*siblings.values()]

    def part(rows: list[int]) -> Scores:
        try:
            return _of_all(len(rows), scorer.names, scorer(_picked(images, rows), [prompts[i] for i in rows]))
        except Infinite as error:
            raise Infinite([rows[k] for k in error.rows]) from error

    return _halved(len(images), scorer.names, [units] if units else [], part, {}, (Infinite, Unusable))


def _picked(images: Images, rows: list[int]) -> Float[Tensor, "M 3 H W"]:
    """A view, where nothing lies between."""
    return images[rows[0] : rows[-1] + 1] if rows == [*range(rows[0], rows[-1] + 1)] else images[rows]


def _of_all(count: int, names: tuple[str, ...], found: Any) -> Scores:
    """The scores, if they are of `count` images. ValueError says what is not."""
    if not isinstance(found, Scores):
        raise ValueError(f"it returned {type(found).__name__}; Scores are needed")
    if tuple(found.names) != tuple(names):
        raise ValueError(f"it returned scores called {', '.join(found.names)}; it gives {', '.join(names)}")
    columns = {"scores": found.values, "regions": found.regions, "boxes": found.boxes or None}
    for name, column in (columns | {name: getattr(found, name) or None for name in TEXTS}).items():
        if column is not None and len(column) != count:
            raise ValueError(f"{count} images were shown, the {name} are {len(column)}")
    if not all(i in range(count) for i in found.failures):
        raise ValueError(f"{count} images were shown, failures are of numbers {sorted(found.failures)}")
    return found


def _halved(
    count: int,
    names: tuple[str, ...],
    batches: Sequence[list[list[int]]],
    part: Callable[[list[int]], Scores],
    failures: dict[int, str],
    passing: tuple[type[Exception], ...] = (Unusable,),
) -> Scores:
    """The scores of `count` images, had `part` by part; a batch is a list of units, lists of rows that stay together.
    A batch that fails is tried again in halves, and a unit that fails by itself is NaN with the reason."""
    values = torch.full((count, len(names)), torch.nan)
    regions, boxes, failures = {}, [()] * count, dict(failures)
    texts = {name: [""] * count for name in TEXTS}
    waiting = [*reversed(batches)]
    while waiting:
        units = waiting.pop()
        rows = [i for unit in units for i in unit]
        try:
            found = part(rows)
        except passing:
            raise
        except BaseException as error:
            if not _fault(error):
                raise
            if len(units) > 1:
                waiting += [units[len(units) // 2 :], units[: len(units) // 2]]
            else:
                failures |= dict.fromkeys(rows, _reason(error))
            continue
        values[rows] = found.values.detach().float().cpu()
        failures |= {rows[k]: why for k, why in found.failures.items()}
        for k, i in enumerate(rows):
            for name, column in texts.items():
                column[i] = text[k] if (text := getattr(found, name)) else ""
            boxes[i] = found.boxes[k] if found.boxes else ()
            if found.regions is not None:
                regions[i] = found.regions[k].cpu()
    maps = None
    if regions:
        blank = torch.full_like(next(iter(regions.values())), torch.nan)
        maps = torch.stack([regions.get(i, blank) for i in range(count)])
    said = {name: tuple(column) if any(column) else () for name, column in texts.items()}
    placed = tuple(boxes) if any(boxes) else ()
    return Scores(names, values, regions=maps, failures=dict(sorted(failures.items())), boxes=placed, **said)


def _fault(error: BaseException) -> bool:
    """Whether it is the scorer's own. What a signal raises, such as Ctrl-C's KeyboardInterrupt, comes to the main
    thread alone."""
    return isinstance(error, Exception | SystemExit) or threading.current_thread() is not threading.main_thread()


def _reason(error: BaseException) -> str:
    text, kind = " ".join(str(error).split()), type(error).__name__
    if not text:
        return kind
    return text if isinstance(error, ValueError | RuntimeError) else f"{kind}: {text}"


def unfit(images: Images) -> dict[int, str]:
    """Why an image cannot be scored by anyone, by its number; those that can are left out."""
    failures = {}
    if len(images):
        low, high = (bound.tolist() for bound in images.flatten(1).aminmax(dim=1))
        for i, (least, most) in enumerate(zip(low, high, strict=True)):
            if not (abs(least) < torch.inf and abs(most) < torch.inf):
                failures[i] = "a pixel is not finite"
            elif least < -LEVEL or most > 1 + LEVEL:
                failures[i] = f"pixels from {least:.3g} to {most:.3g}; an image lies in [0, 1]"
    return failures


def _checked(names: tuple[str, ...], values: Float[Tensor, "M K"]) -> Scores:
    values = values.detach().float().cpu()
    broken = ~values.isfinite()
    failures = {
        i: f"{', '.join(name for name, bad in zip(names, row, strict=True) if bad)}: the score is not finite"
        for i, row in enumerate(broken.tolist())
        if any(row)
    }
    return Scores(names, values.masked_fill(broken, torch.nan), failures=failures)


def score_pictures(
    pictures: Sequence[Picture | str], prompts: Sequence[Prompt], scorers: Mapping[str, RewardModel]
) -> list[dict[str, Any]]:
    """What each scorer thinks of pictures of unlike sizes; a picture that could not be had is the reason why.

    One row per picture: `scores` by "scorer.component" (None where there is none), `failures` with reasons by scorer,
    or by "image", and by scorer `critiques`, `requests`, `replies` and `places` (maps and regions, as `heat.record`
    has them). A scorer that raises fails its own pictures alone. A groupwise scorer gets all pictures of a prompt at
    once, and fails those of a prompt whose sizes differ.
    """
    names = [f"{name}.{component}" for name, scorer in scorers.items() for component in scorer.names]
    out = [
        {
            "scores": dict.fromkeys(names),
            "failures": {"image": picture} if isinstance(picture, str) else {},
            **{name: {} for name in TEXTS},
            "places": {},
        }
        for picture in pictures
    ]
    had = [i for i, picture in enumerate(pictures) if not isinstance(picture, str)]
    sizes = {i: tuple(pictures[i].shape[2:]) for i in had}
    mixed = defaultdict(set)
    for i in had:
        mixed[prompts[i].id, prompts[i].text].add(sizes[i])
    for name, scorer in scorers.items():
        together = defaultdict(list)
        for i in had:
            if scorer.card.groupwise and len(mixed[prompts[i].id, prompts[i].text]) > 1:
                out[i]["failures"][name] = "the images of its prompt differ in size and cannot be compared"
            else:
                together[sizes[i]].append(i)
        for same in together.values():
            _enter(out, same, name, scorer, torch.cat([pictures[i] for i in same]), [prompts[i] for i in same])
    return out


def _enter(out: list[dict[str, Any]], same: Sequence[int], name: str, scorer, images: Images, prompts) -> None:
    try:
        found = asked(scorer, images, prompts)
    except Infinite as error:
        for i in same:
            out[i]["failures"][name] = str(error)
        return
    seen = heat.records(found.regions, found.boxes, tuple(images.shape[2:]), len(same))
    for place, i in enumerate(same):
        if seen[place] is not None:
            out[i]["places"][name] = seen[place]
        for component, value in zip(found.names, found.values[place].tolist(), strict=True):
            out[i]["scores"][f"{name}.{component}"] = None if value != value else value
        if place in found.failures:
            out[i]["failures"][name] = found.failures[place]
        for texts in TEXTS:
            if (said := getattr(found, texts)) and said[place]:
                out[i][texts][name] = said[place]
