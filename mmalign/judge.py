"""Show images to reward models, once each, and bring the scores back to the trajectories."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.types import Judgement, Trajectories
from reward_models import Prompt, Scores, combine
from reward_models.regions import Region, inside, resampled

Scorers = Mapping[str, Callable[..., Scores]]  # by name: (images, prompts) -> Scores


@dataclass(frozen=True)
class Seen:
    """Every component as "scorer.component" -> `[N]`, NaN where it failed; the scorers' maps and the regions of each
    image by name; reasons by image."""

    parts: dict[str, Float[Tensor, "N"]]
    maps: dict[str, Float[Tensor, "N a b"]]
    boxes: dict[str, tuple[tuple[Region, ...], ...]]
    failures: dict[int, str]


def score(images: Float[Tensor, "N 3 H W"], prompts: Sequence[Prompt], scorers: Scorers) -> Seen:
    """Each scorer's view of all images. A region that is not inside its image fails that image."""
    seen = Seen({}, {}, {}, {})
    for name, scorer in scorers.items():
        scores = _placed(scorer(images, prompts), tuple(images.shape[2:]))
        seen.failures.update({i: f"{name}: {why}" for i, why in scores.failures.items()})
        seen.parts.update({f"{name}.{component}": scores.column(component).float() for component in scores.names})
        if scores.regions is not None:
            seen.maps[name] = scores.regions.float()
        if scores.boxes:
            seen.boxes[name] = scores.boxes
    return seen


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


@dataclass(frozen=True)
class Combination:
    """How the components named by `weights` become one reward; the rules are those of `reward_models.combine`.

    `rule` is sum, product, gate, mrn or gdpo; `gate` the component that opens it. gdpo normalises like mrn here, and
    whitens where advantages are scaled over the batch. `reference`, mean and standard deviation by component, puts
    scores in its units first. A component that spreads by `floor` or less within a prompt counts as dead.
    """

    weights: Mapping[str, float]
    rule: str = "sum"
    gate: str | None = None
    reference: Mapping[str, tuple[float, float]] | None = None
    floor: float = combine.FLOOR

    def __call__(self, parts: Mapping[str, Float[Tensor, "E"]], owner: Int[Tensor, "E"]) -> Float[Tensor, "E"]:
        """The reward of each image; `owner` is the row of its prompt."""
        names, weights = list(self.weights), torch.tensor(list(self.weights.values()))
        values = torch.stack([parts[name] for name in names], 1)
        if self.reference is not None:
            mean, std = torch.tensor([self.reference[name] for name in names]).T
            values = combine.referenced(values, mean, std)
        if self.rule == "product":
            return combine.product(values, weights)
        if self.rule == "gate":
            return combine.gated(values, weights, names.index(self.gate))
        if self.rule in ("mrn", "gdpo"):
            return combine.normalised(values, owner, weights, self.floor)
        return combine.weighted(values, weights)


def judge(
    paths: Trajectories,
    prompts: Sequence[Prompt],
    decode: Callable[[Tensor], Tensor],
    scorers: Scorers,
    combination: Combination,
    batch: int = 32,
    region: str | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[Judgement, Float[Tensor, "E 3 H W"]]:
    """Decode, `batch` at a time, and score each finished latent once, and give every shown state the reward of its end.
    The map of the scorer `region` is laid on `grid` cells, by default those of the latent.

    Returns the judgement and the images `[E, ...]` of the ends, both on the CPU.
    """
    images = torch.cat([decode(latents).cpu() for latents in paths.ends.split(batch)])
    seen = score(images, [prompts[i] for i in paths.owner.tolist()], scorers)
    own = {name: values[paths.shown[:, -1].cpu()] for name, values in seen.parts.items()}
    reward = combination(seen.parts, paths.owner.cpu())
    places = None
    if region is not None:
        nowhere = torch.full((len(images), 1, 1), torch.nan)  # where every image failed
        places = resampled(seen.maps.get(region, nowhere), grid or tuple(paths.ends.shape[2:]))
    return Judgement(paths.at_states(reward), own, places, failures=seen.failures), images
