"""Show images to reward models, once each, and bring the scores back to the trajectories."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign import errors
from mmalign.activity import doing
from mmalign.errors import Failed
from mmalign.rewards.combination import Combination
from mmalign.rewards.regions import marked, signs
from mmalign.types import Judgement, Trajectories, Tree
from reward_models import Prompt, RewardModel, Scores
from reward_models.regions import Region, inside, resampled
from reward_models.scoring import score_isolated
from reward_models.types import Infinite, Unusable

Scorers = Mapping[str, RewardModel]  # by name


@dataclass(frozen=True)
class Scored:
    """Raw scores of `N` images: every component as "scorer.component" -> `[N]`, NaN where it failed; by scorer the
    maps, the regions, the critique and the revised request of each image; reasons of failures by image."""

    parts: dict[str, Float[Tensor, "N"]]
    maps: dict[str, Float[Tensor, "N a b"]]
    boxes: dict[str, tuple[tuple[Region, ...], ...]]
    failures: dict[int, str]
    critiques: dict[str, tuple[str, ...]] = field(default_factory=dict)
    requests: dict[str, tuple[str, ...]] = field(default_factory=dict)


def score(
    images: Float[Tensor, "N 3 H W"],
    prompts: Sequence[Prompt],
    scorers: Scorers,
    late: Collection[str] = (),
    finished: Int[Tensor, "F"] | None = None,
) -> Scored:
    """The scores of all images by each scorer; scorers in `late` are shown the images `finished` alone. An exception of
    a scorer fails the image, and so does a region outside it. NonFinite where a score is infinite; Failed where a
    scorer can give none at all, whatever the image."""
    if late:
        some = score(images[finished], [prompts[i] for i in finished.tolist()], {name: scorers[name] for name in late})
        rest = score(images, prompts, {name: scorer for name, scorer in scorers.items() if name not in late})
        return _together(rest, _among(some, finished.tolist(), len(images)))
    scored = Scored({}, {}, {}, {})
    for name, scorer in scorers.items():
        try:
            with doing(f"scoring {len(images)} images by {name}"):
                scores = _placed(score_isolated(scorer, images, prompts), tuple(images.shape[2:]))
        except Infinite as error:
            raise errors.non_finite(f"scores of {name}", prompts, error.rows) from error
        except Unusable as error:
            raise Failed(f"{name}: {error}") from error
        scored.failures.update({i: f"{name}: {reason}" for i, reason in scores.failures.items()})
        scored.parts.update({f"{name}.{component}": scores.column(component).float() for component in scores.names})
        if scores.regions is not None:
            scored.maps[name] = scores.regions.float()
        for texts, given in (
            (scored.boxes, scores.boxes),
            (scored.critiques, scores.critiques),
            (scored.requests, scores.requests),
        ):
            if given:
                texts[name] = given
    return scored


@contextmanager
def beginning(apart: bool) -> Iterator[Callable[..., Future]]:
    """Within the block, a function that begins work with its arguments: in a thread of its own if it is to be `apart`,
    so that images are scored while the next ones are sampled, and at once otherwise."""
    if not apart:
        yield _now
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="judge")
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _now(work: Callable[..., Any], *args: Any) -> Future:
    done = Future()
    done.set_result(work(*args))
    return done


def _among(scored: Scored, rows: Sequence[int], count: int) -> Scored:
    """The scores of the images `rows` among `count`, of which the others have none."""

    def values(each: Tensor) -> Tensor:
        wide = each.new_full((count, *each.shape[1:]), torch.nan)
        wide[[*rows]] = each
        return wide

    def texts(each: tuple, blank: Any) -> tuple:
        by_row = dict(zip(rows, each, strict=True))
        return tuple(by_row.get(row, blank) for row in range(count))

    return Scored(
        {name: values(each) for name, each in scored.parts.items()},
        {name: values(each) for name, each in scored.maps.items()},
        {name: texts(each, ()) for name, each in scored.boxes.items()},
        {rows[i]: reason for i, reason in scored.failures.items()},
        {name: texts(each, "") for name, each in scored.critiques.items()},
        {name: texts(each, "") for name, each in scored.requests.items()},
    )


def _together(one: Scored, two: Scored) -> Scored:
    """The scores of the same images by different scorers."""
    return Scored(**{field.name: getattr(one, field.name) | getattr(two, field.name) for field in fields(Scored)})


def joined(parts: Sequence[Scored]) -> Scored:
    """The scores of several batches of images, as of one."""
    if len(parts) == 1:
        return parts[0]
    counts = [len(next(iter(scored.parts.values()))) for scored in parts]
    before = [0, *accumulate(counts)]

    def maps(name: str) -> Tensor:
        grid = next(scored.maps[name].shape[1:] for scored in parts if name in scored.maps)
        blanks = [torch.full((n, *grid), torch.nan) for n in counts]
        return torch.cat([scored.maps.get(name, blank) for scored, blank in zip(parts, blanks, strict=True)])

    def texts(field: str, blank: Any) -> dict[str, tuple]:
        """A scorer that reports nothing for all images of a batch has no entry there."""
        names = dict.fromkeys(name for scored in parts for name in getattr(scored, field))
        each = [(getattr(scored, field), n) for scored, n in zip(parts, counts, strict=True)]
        return {name: tuple(one for batch, n in each for one in batch.get(name, (blank,) * n)) for name in names}

    return Scored(
        {name: torch.cat([scored.parts[name] for scored in parts]) for name in parts[0].parts},
        {name: maps(name) for name in dict.fromkeys(name for scored in parts for name in scored.maps)},
        texts("boxes", ()),
        {
            i + start: reason
            for scored, start in zip(parts, before, strict=False)
            for i, reason in scored.failures.items()
        },
        texts("critiques", ""),
        texts("requests", ""),
    )


def _placed(scores: Scores, size: tuple[int, int]) -> Scores:
    """The scores, where images with a region outside them have failed."""
    outside = {}
    for i, regions in enumerate(scores.boxes):
        try:
            inside(regions, size)
        except ValueError as error:
            outside[i] = str(error)
    if not outside:
        return scores
    rows = [*outside]
    values, maps = scores.values.clone(), scores.regions
    values[rows] = torch.nan
    if maps is not None:
        maps = maps.clone()
        maps[rows] = torch.nan
    boxes = tuple(() if i in outside else regions for i, regions in enumerate(scores.boxes))
    return replace(scores, values=values, regions=maps, boxes=boxes, failures={**scores.failures, **outside})


def judge(
    paths: Trajectories,
    scored: Scored,
    size: tuple[int, int],
    combination: Combination,
    region: str | None = None,
    grid: tuple[int, int] | None = None,
    at_end: Combination | None = None,
) -> Judgement:
    """The reward of the image that stands for each state; `scored` are the raw scores of the images of `size` (height,
    width). Finished images have that of `at_end` beside it. The map of the scorer `region` is laid on `grid` cells, by
    default those of the latent. On the CPU."""
    tree = paths.tree
    parts = {name: values[tree.final[:, -1]] for name, values in scored.parts.items()}
    reward = combination(scored.parts, tree.owner)
    regions, marks = None, None
    if region is not None:
        grid = grid or tuple(paths.finals.shape[2:])
        missing = torch.full((len(reward), 1, 1), torch.nan)  # every image failed
        regions = resampled(scored.maps.get(region, missing), grid)
        boxes = scored.boxes.get(region)
        marks = marked(boxes, tree.owner.tolist(), size, grid) if boxes else signs(regions)
    rewards, ends = tree.at_states(reward), None
    if at_end is not None:
        ends = torch.stack([rewards[:, -1], at_end(scored.parts, tree.owner)[tree.final[:, -1]]], 1)
        rewards[:, -1] = ends.sum(1)
    return Judgement(rewards, parts, regions, marks, scored.failures, ends)


def unscored(tree: Tree, judged: Judgement) -> dict[int, str]:
    """The images that a scorer failed on or whose reward is missing, and why."""
    missing = tree.final[(tree.final >= 0) & judged.reward.isnan()]
    return dict.fromkeys(missing.unique().tolist(), silent(judged.parts)) | dict(judged.failures)


def silent(parts: Mapping[str, Float[Tensor, "N"]]) -> str:
    """The reason for an image without a score where no scorer gave one."""
    names = [name for name, values in parts.items() if bool(values.isnan().any())]
    return f"{', '.join(names)}: NaN, for which the scorer gives no reason"


def stop_if_failing(reasons: Mapping[int, str], images: int, limit: float) -> None:
    """Raises Failed, with a reason, where more than the share `limit` of the images have no score but `reasons`."""
    if len(reasons) > limit * images:
        reason = next(iter(reasons.values()))
        raise Failed(f"{len(reasons)} of {images} images could not be scored (limit {limit:.0%}): {reason}")
