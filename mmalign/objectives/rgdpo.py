"""Region-grouped preference optimisation (R-GDPO of GlyphPrinter, arXiv 2603.15616), for flow models.

For an image x, a region m of it, and the flow-matching error e of the policy and of the model without adapter,

    D(x, m) = mean over m of (e_policy - e_reference)        (lower: the policy has moved towards the image there)
    inter   = -log sigmoid( -scale (D(x_w, m_w) - D(x_l, m_l)) )    one region, better in image w than in image l
    intra   = -log sigmoid( -scale (D(x, m_right) - D(x, m_wrong)) )    right and wrong regions of one image

and the loss of a pair of images is the mean of its inter terms plus `intra` times the mean of its intra terms. With
`single` each region also counts by itself, against the model without adapter (the unpaired term of FDPO, by our
reading): with its credit c in [-1, 1],

    single = -log sigmoid( -scale c D(x, m) )

so that regions without a partner train the policy too. The errors of a pair share noise and time. A region counts the
same whatever its size. With one region, the whole image, inter is Diffusion-DPO (arXiv 2311.12908). The equations are
our reading; the paper was not available.

A `guide`, an adapter that was trained before and is frozen, weighs the cells of a region (TGDPO, arXiv 2506.14574,
weighs tokens). With l = scale (e_reference - e_guide), its reward of a cell, and s = 1 in a region that is the
better of the two, or right, and -1 in one that is the worse, or wrong,

    weight = clip(1 + s guidance l, 0, 2), divided by its mean over the region

so that the policy moves most towards what the guide likes in good regions, and away from what it dislikes in bad ones.

Pairs are made of the images of a prompt: best with worst, second with second to last, and so on.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmalign.learn.loss import pool
from mmalign.objectives.flow_matching import error, noise_like, times
from mmalign.objectives.objective import Draws, Finished, OnImages
from mmalign.policy.protocol import Policy, Trainable
from mmalign.types import Marks, Plan, Rows

GUIDE = "guide"  # the name of its adapter on the network
GAP = 0.5  # least difference in credit at which one of two regions is the better


@dataclass(frozen=True)
class Pairs(Rows):
    """Two images of one prompt a row, with their regions, one noise and one time for both."""

    x: Float[Tensor, "M 2 C h w"]
    noise: Float[Tensor, "M C h w"]
    t: Float[Tensor, "M"]
    share: Float[Tensor, "M 2 R a b"]
    credit: Float[Tensor, "M 2 R"]
    named: Bool[Tensor, "M 2 R"]
    index: Int[Tensor, "M"]
    step: Int[Tensor, "M"]


@dataclass(frozen=True)
class Rgdpo(OnImages):
    """`draws`: noises and times of each pair. `scale`: that of the error's change (DPO's beta). `intra`: weight of
    right against wrong regions of one image. `single`: weight of the mean over all regions of a pair that have a
    credit, each against the model without adapter. `guide`: a run, a checkpoint or a LoRA file, whose adapter weighs
    the cells of a region, by `guidance`: its strength."""

    draws: Draws = 2
    scale: Annotated[float, Gt(0)] = 10.0
    intra: Annotated[float, Ge(0)] = 1.0
    single: Annotated[float, Ge(0)] = field(default=0.0, metadata={"later": True})
    guide: str | None = field(default=None, metadata={"later": True})
    guidance: Annotated[float, Ge(0)] = field(default=1.0, metadata={"later": True})
    type = "rgdpo"
    uses = frozenset({"region", "records"})
    needs = frozenset({"region"})
    siblings, width, reference = 2, 2, True
    fewer = "replay_forwards, transitions: fewer where two images have no regions to compare"

    def __post_init__(self):
        if self.guide is None and self.guidance != 1:
            raise ValueError(f"guidance: {self.guidance} acts only with a guide; add one, or remove it")

    @property
    def guided(self) -> bool:
        return self.guide is not None and self.guidance > 0

    def rows(self, plan: Plan, seeds: int) -> int:
        return seeds * plan.trained // 2 * self.draws

    def replayed(self, measured: bool) -> int:
        return super().replayed(measured) + (self.width if self.guided else 0)

    def examples(self, policy: Trainable, images: Finished, generator: torch.Generator) -> "Pairs":
        return pairs(policy, images, self.draws, generator, self.single > 0)

    def replay(self, policy: Trainable, cond: Any, rows: "Pairs") -> tuple[Float[Tensor, "M"], dict[str, Tensor]]:
        noise, t, index = (column.repeat_interleave(2, 0) for column in (rows.noise, rows.t, rows.index))
        x = rows.x.flatten(0, 1)
        err = error(policy, x, noise, t, cond, index)
        with torch.no_grad(), policy.reference():
            anchor = error(policy, x, noise, t, cond, index)
        change = (err - anchor).unflatten(0, (-1, 2))
        if not self.guided:
            moved = alone = regional(change, rows.share)
        else:
            with torch.no_grad(), policy.acting(GUIDE):
                liked = self.scale * (anchor - error(policy, x, noise, t, cond, index)).unflatten(0, (-1, 2))
            sign = better(rows.credit, rows.named)
            signs = torch.stack([sign, -sign], 1), rows.credit.sign().nan_to_num(0.0)
            each = [rows.share * weights(liked, one, rows.share, self.guidance) for one in signs]
            moved, alone = (regional(change, share) for share in each)
        value, statistics = loss(moved, rows.credit, rows.named, self.scale, self.intra, self.single, alone)
        return value, statistics | {"error": err.detach().mean((1, 2)).view(-1, 2).mean(1)}


def better(credit: Float[Tensor, "M 2 R"], named: Bool[Tensor, "M 2 R"], gap: float = GAP) -> Float[Tensor, "M R"]:
    """1 where the region of the left image is the better of the two, -1 where that of the right is, 0 where there are
    not two, or they differ by less than `gap`."""
    difference = torch.where(named.all(1), credit[:, 0] - credit[:, 1], torch.nan)
    return torch.where(difference.abs() >= gap, difference.sign(), 0.0).nan_to_num(0.0)


def extremes(prompt: Int[Tensor, "N"], reward: Float[Tensor, "N"]) -> Int[Tensor, "Q 2"]:
    """Rows of images of one prompt: best with worst, second with second to last, and so on."""
    pairs = []
    for p in prompt.unique().tolist():
        rows = (prompt == p).nonzero()[:, 0]
        rows = rows[reward[rows].argsort(descending=True, stable=True)]
        half = len(rows) // 2
        pairs.append(torch.stack([rows[:half], rows.flip(0)[:half]], 1))
    return torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long)


def matched(
    prompt: Int[Tensor, "N"], reward: Float[Tensor, "N"], marks: Marks, single: bool = False
) -> Int[Tensor, "Q 2"]:
    """Rows of images to compare; pairs that would give no term are left out. With `single` a region is enough."""
    matches = extremes(prompt, reward)
    credit = marks.credit[matches]
    inter = better(credit, marks.named[matches]).ne(0).any(1)
    intra = ((credit > 0).any(2) & (credit < 0).any(2)).any(1)
    alone = counted(credit).flatten(1).any(1) & single
    return matches[inter | intra | alone]


def counted(credit: Float[Tensor, "M 2 R"]) -> Bool[Tensor, "M 2 R"]:
    """Whether there is a region, with a credit that is not 0."""
    return ~credit.isnan() & (credit != 0)


def pairs(policy: Policy, images: Finished, draws: int, generator: torch.Generator, single: bool = False) -> Pairs:
    """The matched images, each pair at `draws` times. There may be none."""
    matches = matched(images.prompt, images.reward, images.marks, single)
    left, marks = matches[:, 0], vars(images.marks)
    noise = noise_like(images.x[left].repeat_interleave(draws, 0), generator)
    columns = {"x": images.x[matches]} | {name: values[matches] for name, values in marks.items()}
    return Pairs(
        **{name: values.repeat_interleave(draws, 0) for name, values in columns.items()},
        noise=noise,
        t=times(policy, draws, len(matches), generator).flatten().to(noise),
        index=images.prompt[left].repeat_interleave(draws),
        step=torch.arange(draws, device=noise.device).repeat(len(matches)),
    )


def regional(err: Float[Tensor, "M 2 h w"], share: Float[Tensor, "M 2 R a b"]) -> Float[Tensor, "M 2 R"]:
    """The mean error in each region, weighted by how much of each cell it covers."""
    cells = pool(err.flatten(0, 1), share.shape[-2:]).unflatten(0, (-1, 2))
    return torch.einsum("miab,mirab->mir", cells, share) / share.sum((-2, -1)).clamp(min=1e-6)


def weights(
    liked: Float[Tensor, "M 2 h w"], sign: Float[Tensor, "M 2 R"], share: Float[Tensor, "M 2 R a b"], guidance: float
) -> Float[Tensor, "M 2 R a b"]:
    """The weight of each cell in each region, with a mean of 1 over the region: more where the guide likes what a
    region of sign 1 shows, and where it dislikes what one of sign -1 shows. All are 1 where the sign is 0, and in a
    region that would have none."""
    cells = pool(liked.flatten(0, 1), share.shape[-2:]).unflatten(0, (-1, 2))
    weight = (1 + guidance * sign[..., None, None] * cells[:, :, None]).clamp(0, 2)
    mean = (weight * share).sum((-2, -1), keepdim=True) / share.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    return torch.where(mean > 0, weight / mean.clamp(min=1e-6), 1.0)


def loss(
    moved: Float[Tensor, "M 2 R"],
    credit: Float[Tensor, "M 2 R"],
    named: Bool[Tensor, "M 2 R"],
    scale: float,
    intra: float = 1.0,
    single: float = 0.0,
    alone: Float[Tensor, "M 2 R"] | None = None,
) -> tuple[Float[Tensor, "M"], dict[str, Float[Tensor, "M"]]]:
    """The loss of each pair from `D`, and statistics: `agrees` is the share of regions of which the better one has the
    smaller D, NaN where there are no two. `alone`: the D of regions that are not compared with the other image's, where
    it is another."""
    alone = moved if alone is None else alone
    sign = better(credit, named)
    ahead = -sign * (moved[:, 0] - moved[:, 1])
    compared = sign.ne(0).float()
    between = _mean(-F.logsigmoid(scale * ahead), compared)
    right, wrong = (credit > 0).float(), (credit < 0).float()
    both = right.any(2) & wrong.any(2)
    within = _mean(-F.logsigmoid(-scale * (_mean(alone, right) - _mean(alone, wrong))), both.float())
    value = between + intra * within
    if single:
        each = -F.logsigmoid(-scale * credit.nan_to_num(0.0) * alone)
        value = value + single * _mean(each.flatten(1), counted(credit).float().flatten(1))
    return value, {
        "loss": value.detach(),
        "agrees": ((ahead.detach() > 0).float() * compared).sum(1) / compared.sum(1),
        "regions_compared": compared.sum(1),
    }


def _mean(values: Float[Tensor, "*rows R"], counts: Float[Tensor, "*rows R"]) -> Float[Tensor, "*rows"]:
    """The mean of the values that count, 0 where none does."""
    return (values * counts).sum(-1) / counts.sum(-1).clamp(min=1)
