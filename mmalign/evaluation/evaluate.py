"""Held-out evaluation: ODE sampling from fixed seeds, so that two models are compared image by image."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.utils import save_image

from mmalign.config.checks import component
from mmalign.distributed.processes import Ranks
from mmalign.evaluation.comparison import rises
from mmalign.evaluation.generate import generate
from mmalign.evaluation.toward import Toward
from mmalign.flow.sample import chunks
from mmalign.policy.protocol import Policy
from mmalign.rewards.judge import Scorers, beginning, joined, score
from mmalign.seeds import seed_of
from reward_models import Prompt, overlay
from reward_models.combine import group_sum
from reward_models.meaning import clusters

SHEET = 60  # images of a contact sheet
STRIP = 6  # images of an evaluation between start and end that are written one by one


@dataclass(frozen=True)
class Evaluation:
    """Images and raw scores; row i is of prompt `prompt[i]` from seed number `member[i]`. `places` has, by scorer, the
    map and boxes of each image as `reward_models.overlay.record` writes them, or None; `failures` the reasons of images
    that could not be scored."""

    images: Float[Tensor, "N 3 H W"]
    parts: dict[str, Float[Tensor, "N"]]
    prompt: Int[Tensor, "N"]
    member: Int[Tensor, "N"]
    places: dict[str, list[dict[str, Any] | None]]
    failures: Mapping[int, str] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Mean of each component over the images that have it, and `diversity` where prompts have siblings."""
        means = {name: float(values.nanmean()) for name, values in self.parts.items()}
        return means | ({"diversity": diversity(self.images, self.prompt)} if bool((self.member > 0).any()) else {})


def deviation(images: Float[Tensor, "N 3 H W"], group: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Mean square deviation of each image from the mean of its n siblings, over all pixels, times n / (n - 1): its mean
    over siblings is the unbiased variance, whatever their number. NaN without siblings."""
    flat, count = images.flatten(1), group_sum(torch.ones(len(group)), group)
    mean = group_sum(flat, group) / count[:, None]
    return torch.where(count > 1, ((flat - mean) ** 2).mean(1) * count / (count - 1), torch.nan)


def diversity(images: Float[Tensor, "N 3 H W"], group: Int[Tensor, "N"]) -> float:
    """Root of the mean variance of siblings, over all pixels and groups, which does not depend on how many siblings
    there are; NaN without siblings."""
    return float(deviation(images, group).nanmean().sqrt())


def agreements(result: Evaluation, trained: Iterable[str], watched: Sequence[str]) -> dict[str, float]:
    """How often each trained component and each component of the watched scorers prefer the same of two images of a
    prompt: `agrees/one~other`, the share of the pairs that both decide, and their number, `pairs/one~other`. Empty
    without siblings. Trained rewards that leave what others value drift apart from them (JarvisEvo, arXiv 2511.23002).
    """
    siblings: dict[int, list[int]] = {}
    for i, prompt in enumerate(result.prompt.tolist()):
        siblings.setdefault(prompt, []).append(i)
    pairs = [pair for rows in siblings.values() for pair in combinations(rows, 2)]
    first, second = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
    others = [name for name in result.parts if component(name)[0] in watched]
    row = {}
    for one, other in ((one, other) for one in trained for other in others if one != other):
        signs = [(result.parts[name][first] - result.parts[name][second]).sign() for name in (one, other)]
        decided = (signs[0].abs() == 1) & (signs[1].abs() == 1)  # false for NaN
        if decided.any():
            share = float((signs[0] == signs[1])[decided].float().mean())
            row |= {f"agrees/{one}~{other}": share, f"pairs/{one}~{other}": int(decided.sum())}
    return row


def noise_seed(prompt: Prompt, member: int) -> int:
    """The seed of the noise of a prompt's n-th held-out image, as stock pipelines take it."""
    return seed_of("evaluation", prompt.id, member)


def evaluate(
    policy: Policy, prompts: Sequence[Prompt], members: int, steps: int, scorers: Scorers, batch: int,
    toward: Toward | None = None, parts: int = 1, suffix: str = "",
) -> Evaluation:  # fmt: skip
    """`members` images per prompt. Seeds depend on prompt id and member alone: every run and model gets the same. The
    model reads the `suffix` after each prompt, and scorers do not. The prompts are sampled in so many `parts`, each
    while the one before is scored."""
    drawn, owners, scores = [], [], []
    with beginning(parts > 1) as begin:
        for rows in torch.arange(len(prompts)).tensor_split(max(1, min(parts, len(prompts)))):
            some = [prompts[i] for i in rows.tolist()]
            requests = [replace(p, text=p.text + suffix) for p in some]
            seeds = [[noise_seed(p, m) for m in range(members)] for p in some]
            images, owner = generate(policy, requests, seeds, steps, batch, toward=toward)
            drawn.append(images)
            owners.append(rows[owner])
            scores.append(begin(score, images, [some[i] for i in owner.tolist()], scorers))
        scored = joined([future.result() for future in scores])
    images, prompt = torch.cat(drawn), torch.cat(owners)
    places = {
        name: overlay.records(scored.maps.get(name), scored.boxes.get(name, ()), tuple(images.shape[2:]), len(images))
        for name in {**scored.maps, **scored.boxes}
    }
    member = torch.arange(members).repeat(len(prompts))
    return Evaluation(images, scored.parts, prompt, member, places, scored.failures)


def means_by_tag(result: Evaluation, prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """Mean of each component over `all` images, and over those of the prompts of each `tag` in their ground truth, in
    the order of the prompts; "" for prompts without one."""
    tags = [prompts[p].wants.get("tag", "") for p in result.prompt.tolist()]
    means = {"all": result.means()}
    for tag in dict.fromkeys(tags):
        rows = [i for i, other in enumerate(tags) if other == tag]
        means[tag] = {name: float(values[rows].nanmean()) for name, values in result.parts.items()}
    return means


def compared(before: Evaluation, after: Evaluation, prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """The rises between two evaluations on the same prompts and seeds, over the meanings of the prompts."""
    cluster = clusters(prompts[p].text for p in before.prompt.tolist())
    return rises(before.parts, after.parts, cluster)


def evaluate_distributed(
    ranks: Ranks, policy: Policy, prompts: Sequence[Prompt], members: int, *settings: Any, **options: Any
) -> Evaluation | None:
    """`evaluate`, with the prompts sharded over the ranks. The main rank gets the result that a single process would;
    the others get None. All ranks make as many images: a rank with fewer prompts repeats the first one, and the images
    of that are not counted."""
    what, most = "the evaluation", -(-len(prompts) // ranks.size)
    local = ranks.local(prompts)
    result = evaluate(policy, [*local, *prompts[:1] * (most - len(local))], members, *settings, **options)
    counted = result.prompt < len(local)
    prompt, member = result.prompt[counted], result.member[counted]
    order = ranks.order(prompt, what)
    parts = {name: ranks.gather(values[counted], what)[order] for name, values in result.parts.items()}
    places = {name: rows[: len(prompt)] for name, rows in result.places.items()}
    each = ranks.all_gather_object([len(prompt), places], what)
    names = [name for _, rows in each for name in rows]
    places = {name: [row for n, rows in each for row in rows.get(name, [None] * n)] for name in names}
    reasons = ranks.all_gather_object([result.failures.get(i) for i in range(len(prompt))], what)
    reasons = [reason for of_rank in reasons for reason in of_rank]
    prompts_of, members_of = ranks.gather(ranks.global_index(prompt), what)[order], ranks.gather(member, what)[order]
    images, numbers = [], []
    for rows in chunks(most * members, 32):  # never all of them on every rank
        gathered = ranks.gather(result.images[counted][rows], what)
        numbers.append(ranks.gather(ranks.global_index(prompt[rows]), what))
        images += [gathered] if ranks.main else []
    if not ranks.main:
        return None
    return Evaluation(
        torch.cat(images)[torch.cat(numbers).sort(stable=True).indices], parts, prompts_of, members_of,
        {name: [rows[i] for i in order] for name, rows in places.items()},
        {k: reasons[i] for k, i in enumerate(order.tolist()) if reasons[i]},
    )  # fmt: skip


def contact_sheet(images: Float[Tensor, "N 3 H W"], path: Path, count: int = SHEET, columns: int = 12) -> None:
    """One PNG of `count` images evenly spaced through the batch, small ones enlarged to about 64 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = images[_spaced(count, len(images))]
    scale = max(1, 64 // chosen.shape[-1])
    save_image(chosen.repeat_interleave(scale, 2).repeat_interleave(scale, 3), path, nrow=columns, pad_value=1.0)


def few(result: Evaluation, count: int = STRIP) -> Evaluation:
    """`count` images evenly spaced through the batch, with all that is known of them. Of two evaluations on the same
    prompts these are the same prompts and seeds."""
    rows = _spaced(count, len(result.images))
    numbers = rows.tolist()
    return Evaluation(
        result.images[rows],
        {name: values[rows] for name, values in result.parts.items()},
        result.prompt[rows],
        result.member[rows],
        {name: [each[i] for i in numbers] for name, each in result.places.items()},
        {k: result.failures[i] for k, i in enumerate(numbers) if i in result.failures},
    )


def _spaced(count: int, total: int) -> Int[Tensor, "n"]:
    """The numbers of `count` rows evenly spaced through `total`, the first and the last among them; all if there are
    not more."""
    return torch.linspace(0, total - 1, min(count, total)).long()
