"""Show images to reward models, once each, and bring the scores back to the trajectories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign import errors
from mmalign.errors import Failed
from mmalign.rewards.combination import Combination
from mmalign.rewards.regions import marked, signs
from mmalign.types import Judgement, Trajectories
from reward_models import Prompt, RewardModel, Scores
from reward_models.regions import Region, inside, resampled
from reward_models.scoring import score_isolated
from reward_models.types import Infinite, Unusable

Scorers = Mapping[str, RewardModel]  # by name


@dataclass(frozen=True)
class Seen:
    """Every component as "scorer.component" -> `[N]`, NaN where it failed; by scorer the maps, the regions of each
    image, what is said of it and the revised request for it; reasons by image."""

    parts: dict[str, Float[Tensor, "N"]]
    maps: dict[str, Float[Tensor, "N a b"]]
    boxes: dict[str, tuple[tuple[Region, ...], ...]]
    failures: dict[int, str]
    said: dict[str, tuple[str, ...]] = field(default_factory=dict)
    requests: dict[str, tuple[str, ...]] = field(default_factory=dict)


def score(images: Float[Tensor, "N 3 H W"], prompts: Sequence[Prompt], scorers: Scorers) -> Seen:
    """Each scorer's view of all images. What a scorer trips over fails the image, and so does a region that is not
    inside it. NonFinite where a score is infinite; Failed where a scorer can give none at all, whatever the image."""
    seen = Seen({}, {}, {}, {})
    for name, scorer in scorers.items():
        try:
            scores = _placed(score_isolated(scorer, images, prompts), tuple(images.shape[2:]))
        except Infinite as error:
            raise errors.non_finite(f"scores of {name}", prompts, error.rows) from error
        except Unusable as error:
            raise Failed(f"{name}: {error}") from error
        seen.failures.update({i: f"{name}: {why}" for i, why in scores.failures.items()})
        seen.parts.update({f"{name}.{component}": scores.column(component).float() for component in scores.names})
        if scores.regions is not None:
            seen.maps[name] = scores.regions.float()
        for kept, found in (
            (seen.boxes, scores.boxes),
            (seen.said, scores.critiques),
            (seen.requests, scores.requests),
        ):
            if found:
                kept[name] = found
    return seen


def joined(parts: Sequence[Seen]) -> Seen:
    """What was seen in several batches of images, as in one."""
    if len(parts) == 1:
        return parts[0]
    counts = [len(next(iter(seen.parts.values()))) for seen in parts]
    before = [0, *accumulate(counts)]

    def maps(name: str) -> Tensor:
        grid = next(seen.maps[name].shape[1:] for seen in parts if name in seen.maps)
        nowhere = [torch.full((n, *grid), torch.nan) for n in counts]
        return torch.cat([seen.maps.get(name, blank) for seen, blank in zip(parts, nowhere, strict=True)])

    def texts(kept: str, blank) -> dict[str, tuple]:
        """A scorer that found nothing in all images of a batch has no entry there."""
        names = dict.fromkeys(name for seen in parts for name in getattr(seen, kept))
        each = [(getattr(seen, kept), n) for seen, n in zip(parts, counts, strict=True)]
        return {name: tuple(one for own, n in each for one in own.get(name, (blank,) * n)) for name in names}

    return Seen(
        {name: torch.cat([seen.parts[name] for seen in parts]) for name in parts[0].parts},
        {name: maps(name) for name in dict.fromkeys(name for seen in parts for name in seen.maps)},
        texts("boxes", ()),
        {i + start: why for seen, start in zip(parts, before, strict=False) for i, why in seen.failures.items()},
        texts("said", ""),
        texts("requests", ""),
    )


def _placed(scores: Scores, size: tuple[int, int]) -> Scores:
    """The scores, with those of images whose regions lie elsewhere turned into failures."""
    astray = {}
    for i, regions in enumerate(scores.boxes):
        try:
            inside(regions, size)
        except ValueError as error:
            astray[i] = str(error)
    if not astray:
        return scores
    rows = [*astray]
    values, maps = scores.values.clone(), scores.regions
    values[rows] = torch.nan
    if maps is not None:
        maps = maps.clone()
        maps[rows] = torch.nan
    boxes = tuple(() if i in astray else own for i, own in enumerate(scores.boxes))
    return replace(scores, values=values, regions=maps, boxes=boxes, failures={**scores.failures, **astray})


def judge(
    paths: Trajectories,
    seen: Seen,
    size: tuple[int, int],
    combination: Combination,
    region: str | None = None,
    grid: tuple[int, int] | None = None,
) -> Judgement:
    """Give every shown state the reward of its end, of whose image of `size` (height, width) is told what was `seen`.
    The map of the scorer `region` is laid on `grid` cells, by default those of the latent. On the CPU."""
    own = {name: values[paths.shown[:, -1].cpu()] for name, values in seen.parts.items()}
    reward = combination(seen.parts, paths.owner.cpu())
    places, marks = None, None
    if region is not None:
        grid = grid or tuple(paths.ends.shape[2:])
        nowhere = torch.full((len(reward), 1, 1), torch.nan)  # where every image failed
        places = resampled(seen.maps.get(region, nowhere), grid)
        boxes = seen.boxes.get(region)
        marks = marked(boxes, paths.owner.tolist(), size, grid) if boxes else signs(places)
    return Judgement(paths.at_states(reward), own, places, marks, seen.failures)


def unscored(paths: Trajectories, judged: Judgement) -> dict[int, str]:
    """The images, by end, that a scorer failed on or that have no reward for want of a score, and why."""
    nowhere = paths.shown[(paths.shown >= 0) & judged.reward.isnan().to(paths.shown.device)]
    return dict.fromkeys(nowhere.unique().tolist(), silent(judged.parts)) | dict(judged.failures)


def silent(parts: Mapping[str, Float[Tensor, "N"]]) -> str:
    """What is said of an image without a score that nobody gave a reason for."""
    names = [name for name, values in parts.items() if bool(values.isnan().any())]
    return f"{', '.join(names)}: NaN, for which the scorer gives no reason"


def stop_if_failing(reasons: Mapping[int, str], images: int, limit: float) -> None:
    """Failed, with a reason, where more than the share `limit` of the images have none but `reasons` for a score."""
    if len(reasons) > limit * images:
        why = next(iter(reasons.values()))
        raise Failed(f"{len(reasons)} of {images} images could not be scored (limit {limit:.0%}): {why}")
