"""Input checks, batching and failure isolation shared by all scorers, and scoring of pictures of different sizes."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models import overlay
from reward_models.images import rounded
from reward_models.types import Images, Infinite, Prompt, RewardModel, Scores, Unusable

ScoreBatch = Callable[[Images, Sequence[Prompt]], Float[Tensor, "M K"] | Scores]
Picture = Float[Tensor, "1 3 _ _"]  # one image, of any size
LEVEL = 1 / 255
TEXTS = ("critiques", "requests", "replies")  # fields of `Scores` with one text per image


def each(
    images: Images, prompts: Sequence[Prompt], names: tuple[str, ...], score_batch: ScoreBatch, batch: int = 64
) -> Scores:
    """Score images that do not depend on each other, at most `batch` of them in a call of `score_batch`.

    Images are first rounded to the 256 levels of a PNG, so that an image scores the same in memory and from disk. The
    following become NaN with a reason: an image with a pixel that is not finite or not in [0, 1], a score that is not
    finite, and an image that `score_batch` raises for. A batch that raises is retried in halves, so that one bad image,
    or too little memory for all of them, does not cost the others their scores.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    failures = unfit(images)
    fit = [i for i in range(len(images)) if i not in failures]

    def score(rows: list[int]) -> Scores:
        result = score_batch(rounded(_select(images, rows)), [prompts[i] for i in rows])
        return result if isinstance(result, Scores) else _finite(names, result)

    batches = [[[i] for i in fit[start : start + batch]] for start in range(0, len(fit), batch)]
    return _score_in_halves(len(images), names, batches, score, failures)


def score_isolated(scorer: RewardModel, images: Images, prompts: Sequence[Prompt]) -> Scores:
    """Call a scorer so that its errors become failures of the images that cause them.

    A call that raises, exits by SystemExit or returns anything but a score for each image is retried in halves, of
    images or, where the card says `groupwise`, of prompts; those that fail by themselves become NaN with the reason.
    Exceptions raised by signals (Ctrl-C) pass through, and so do Infinite, with the rows of all `images`, and Unusable.
    """
    units = [[i] for i in range(len(images))]
    if scorer.card.groupwise:
        siblings = defaultdict(list)
        for i, prompt in enumerate(prompts):
            siblings[prompt.id, prompt.text].append(i)
        units = [*siblings.values()]

    def score(rows: list[int]) -> Scores:
        try:
            return _complete(len(rows), scorer.names, scorer(_select(images, rows), [prompts[i] for i in rows]))
        except Infinite as error:
            raise Infinite([rows[k] for k in error.rows]) from error

    return _score_in_halves(len(images), scorer.names, [units] if units else [], score, {}, (Infinite, Unusable))


def _select(images: Images, rows: list[int]) -> Float[Tensor, "M 3 H W"]:
    """The images at `rows`; a view where the rows are consecutive."""
    return images[rows[0] : rows[-1] + 1] if rows == [*range(rows[0], rows[-1] + 1)] else images[rows]


def _complete(count: int, names: tuple[str, ...], result: Any) -> Scores:
    """`result`, if it holds the scores of `count` images. ValueError with the mismatch otherwise."""
    if not isinstance(result, Scores):
        raise ValueError(f"it returned {type(result).__name__}; Scores are needed")
    if tuple(result.names) != tuple(names):
        raise ValueError(f"it returned scores called {', '.join(result.names)}; it gives {', '.join(names)}")
    columns = {"scores": result.values, "regions": result.regions, "boxes": result.boxes or None}
    for name, column in (columns | {name: getattr(result, name) or None for name in TEXTS}).items():
        if column is not None and len(column) != count:
            raise ValueError(f"it was given {count} images, but returned {len(column)} {name}")
    if not all(i in range(count) for i in result.failures):
        raise ValueError(f"it was given {count} images, but returned failures of images {sorted(result.failures)}")
    return result


def _score_in_halves(
    count: int,
    names: tuple[str, ...],
    batches: Sequence[list[list[int]]],
    score: Callable[[list[int]], Scores],
    failures: dict[int, str],
    passing: tuple[type[Exception], ...] = (Unusable,),
) -> Scores:
    """The scores of `count` images, computed batch by batch. A batch is a list of units, lists of rows that must stay
    by_size. A batch that raises is retried in halves; a unit that raises by itself is NaN with the reason. Exceptions
    of the types `passing` are not caught."""
    parts: list[tuple[list[int], Scores]] = []
    failures = dict(failures)
    waiting = [*reversed(batches)]
    while waiting:
        units = waiting.pop()
        rows = [i for unit in units for i in unit]
        try:
            parts.append((rows, score(rows)))
        except passing:
            raise
        except BaseException as error:
            if not _is_scorer_fault(error):
                raise
            if len(units) > 1:
                waiting += [units[len(units) // 2 :], units[: len(units) // 2]]
            else:
                failures |= dict.fromkeys(rows, _reason(error))
    return merged(count, names, parts, failures)


def merged(
    count: int, names: tuple[str, ...], parts: Iterable[tuple[list[int], Scores]], failures: Mapping[int, str]
) -> Scores:
    """The scores of `count` images from those of some `rows` each; the others are NaN. `failures` are further ones. An
    image whose map has another shape than those before it has none, and fails."""
    values = torch.full((count, len(names)), torch.nan)
    regions, boxes, failures = {}, [()] * count, dict(failures)
    texts = {name: [""] * count for name in TEXTS}
    for rows, scores in parts:
        values[rows] = scores.values.detach().float().cpu()
        failures |= {rows[k]: reason for k, reason in scores.failures.items()}
        for k, i in enumerate(rows):
            for name, column in texts.items():
                column[i] = text[k] if (text := getattr(scores, name)) else ""
            boxes[i] = scores.boxes[k] if scores.boxes else ()
            if scores.regions is not None:
                regions[i] = scores.regions[k].cpu()
    shapes = {i: " x ".join(map(str, grid.shape)) for i, grid in regions.items()}
    usual = next(iter(shapes.values()), "")
    for i, shape in shapes.items():
        if shape != usual:
            del regions[i]
            values[i], boxes[i], failures[i] = torch.nan, (), f"its map has {shape} cells, that of others {usual}"
    maps = None
    if regions:
        blank = torch.full_like(next(iter(regions.values())), torch.nan)
        maps = torch.stack([regions.get(i, blank) for i in range(count)])
    return Scores(
        names,
        values,
        regions=maps,
        failures=dict(sorted(failures.items())),
        boxes=tuple(boxes) if any(boxes) else (),
        **{name: tuple(column) if any(column) else () for name, column in texts.items()},
    )


def _is_scorer_fault(error: BaseException) -> bool:
    """Whether the scorer raised it. Exceptions raised by signals, such as KeyboardInterrupt on Ctrl-C, reach the main
    thread only."""
    return isinstance(error, Exception | SystemExit) or threading.current_thread() is not threading.main_thread()


def _reason(error: BaseException) -> str:
    text, kind = " ".join(str(error).split()), type(error).__name__
    if not text:
        return kind
    return text if isinstance(error, ValueError | RuntimeError) else f"{kind}: {text}"


def check(images: Images, prompts: Sequence[Prompt]) -> None:
    """ValueError for images that no scorer can score, or another number of prompts."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    for i, reason in unfit(images.detach()).items():
        raise ValueError(f"image {i}: {reason}")


def unfit(images: Images) -> dict[int, str]:
    """The images that no scorer can score: index -> reason."""
    failures = {}
    if len(images):
        low, high = (bound.tolist() for bound in images.flatten(1).aminmax(dim=1))
        for i, (least, most) in enumerate(zip(low, high, strict=True)):
            if not (abs(least) < torch.inf and abs(most) < torch.inf):
                failures[i] = "a pixel is not finite"
            elif least < -LEVEL or most > 1 + LEVEL:
                failures[i] = f"pixels from {least:.3g} to {most:.3g}; an image lies in [0, 1]"
    return failures


def _finite(names: tuple[str, ...], values: Float[Tensor, "M K"]) -> Scores:
    values = values.detach().float().cpu()
    broken = ~values.isfinite()
    failures = {
        i: f"{', '.join(name for name, bad in zip(names, row, strict=True) if bad)}: the score is not finite"
        for i, row in enumerate(broken.tolist())
        if any(row)
    }
    return Scores(names, values.masked_fill(broken, torch.nan), failures=failures)


def score_pictures(
    pictures: Sequence[Picture | str],
    prompts: Sequence[Prompt],
    scorers: Mapping[str, RewardModel],
    recorded: Callable[..., list[Any]] = overlay.records,
) -> list[dict[str, Any]]:
    """Score pictures of any sizes with several scorers; a missing picture is given as the reason.

    One row per picture: `scores` by "scorer.component" (None where missing), `failures` with reasons by scorer or by
    "image", and by scorer `critiques`, `requests`, `replies` and `places` (maps and regions in the form of `recorded`,
    by default `overlay.record`). A scorer that raises fails its pictures only for itself. A groupwise scorer gets all
    pictures of a prompt at once; if their sizes differ, they fail.
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
    present = [i for i, picture in enumerate(pictures) if not isinstance(picture, str)]
    sizes = {i: tuple(pictures[i].shape[2:]) for i in present}
    sizes_of = defaultdict(set)
    for i in present:
        sizes_of[prompts[i].id, prompts[i].text].add(sizes[i])
    for name, scorer in scorers.items():
        by_size = defaultdict(list)
        for i in present:
            if scorer.card.groupwise and len(sizes_of[prompts[i].id, prompts[i].text]) > 1:
                out[i]["failures"][name] = "the images of its prompt differ in size and cannot be compared"
            else:
                by_size[sizes[i]].append(i)
        for rows in by_size.values():
            images = torch.cat([pictures[i] for i in rows])
            _enter(out, rows, name, scorer, images, [prompts[i] for i in rows], recorded)
    return out


def _enter(
    out: list[dict[str, Any]],
    rows: Sequence[int],
    name: str,
    scorer: RewardModel,
    images: Images,
    prompts: Sequence[Prompt],
    recorded: Callable[..., list[Any]],
) -> None:
    """Score the images of `rows` with one scorer and write the results into `out`."""
    try:
        scores = score_isolated(scorer, images, prompts)
    except Infinite as error:
        for i in rows:
            out[i]["failures"][name] = str(error)
        return
    maps = recorded(scores.regions, scores.boxes, tuple(images.shape[2:]), len(rows))
    for k, i in enumerate(rows):
        if maps[k] is not None:
            out[i]["places"][name] = maps[k]
        for component, value in zip(scores.names, scores.values[k].tolist(), strict=True):
            out[i]["scores"][f"{name}.{component}"] = None if value != value else value
        if k in scores.failures:
            out[i]["failures"][name] = scores.failures[k]
        for field in TEXTS:
            if (texts := getattr(scores, field)) and texts[k]:
                out[i][field][name] = texts[k]
