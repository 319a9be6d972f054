"""Held-out evaluation: plain ODE sampling on fixed seeds, so that two models are compared image by image."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from torchvision.utils import save_image

from mmalign.config import BadInput, Layout
from mmalign.flow.plan import ode
from mmalign.flow.sample import chunks, gaussian, sample, seed_of
from mmalign.judge import Scorers, score
from mmalign.ranks import Ranks
from mmalign.types import Trajectories, Velocity
from reward_models import Prompt, files, heat

PLACES: dict[Layout, str] = {  # of an image: `row` counts the prompts, `member` a prompt's images, `image` all of them
    "mmalign": "{prompt.id:05d}-{member}.png",
    "geneval": "{row:05d}/samples/{member:04d}.png",
    "t2i_compbench": "samples/{prompt.text}_{image:06d}.png",
}
LONGEST = 255 - len("_000000.png")  # bytes; common file systems take names of 255
SHEET = 60  # images of a contact sheet


@dataclass(frozen=True)
class Evaluation:
    """Images and raw scores; row i shows prompt `prompt[i]` from seed number `member[i]`. `places` has, by scorer, what
    it says of places of each image, as `reward_models.heat.record` has it, or None; `failures` why an image could not
    be scored."""

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
    """Mean square deviation of each image from its siblings' mean, over all pixels; NaN without siblings."""
    _, number, count = group.unique(return_inverse=True, return_counts=True)
    flat = images.flatten(1)
    mean = torch.zeros(len(count), flat.shape[1]).index_add_(0, number, flat) / count[:, None]
    return torch.where(count[number] > 1, ((flat - mean[number]) ** 2).mean(1), torch.nan)


def diversity(images: Float[Tensor, "N 3 H W"], group: Int[Tensor, "N"]) -> float:
    """Root mean square deviation of siblings from their mean image, over all pixels; NaN without siblings."""
    return float(deviation(images, group).nanmean().sqrt())


def generate(
    policy,
    prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
    steps: int,
    batch: int,
    velocity: Velocity | None = None,
) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, H, W]` of each prompt from each of its seeds, by ODE along `velocity`, by default the policy's,
    and the prompt of each row.

    A seed gives the latents that a stock pipeline draws from a CPU generator with that seed.
    """
    start, owner = starts(policy, seeds)
    walks = walked(policy, prompts, start, owner, policy.times(steps), batch, velocity)
    return torch.cat([policy.decode(paths.ends).cpu() for paths in walks]), owner


def starts(policy, seeds: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The starting noise of each prompt's seeds, a row each, and the prompt of each row."""
    rows = [(p, seed) for p, own in enumerate(seeds) for seed in own]
    noise = torch.stack([gaussian(policy.latent_shape, seed) for _, seed in rows]).to(policy.device)
    return noise, torch.tensor([p for p, _ in rows])


def walked(
    policy,
    prompts: Sequence[Prompt],
    start: Tensor,
    owner: Int[Tensor, "N"],
    times: Float[Tensor, "states"],
    batch: int,
    velocity: Velocity | None = None,
) -> Iterator[Trajectories]:
    """Walks by ODE from each start, for the prompt `owner` of each, `batch` at a time."""
    for part in chunks(len(start), batch):
        used, index = owner[part].unique(return_inverse=True)
        cond = policy.encode([prompts[p].text for p in used.tolist()])
        own = velocity or policy.velocity
        yield sample(own, start[part], cond, index.to(policy.device), ode(times), batch=batch)


def evaluate(policy, prompts: Sequence[Prompt], members: int, steps: int, scorers: Scorers, batch: int) -> Evaluation:
    """`members` images per prompt. Seeds depend on prompt id and member alone: every run and model gets the same."""
    seeds = [[seed_of("evaluation", p.id, m) for m in range(members)] for p in prompts]
    images, prompt = generate(policy, prompts, seeds, steps, batch)
    seen = score(images, [prompts[i] for i in prompt], scorers)
    places = {
        name: heat.records(seen.maps.get(name), seen.boxes.get(name, ()), tuple(images.shape[2:]), len(images))
        for name in {**seen.maps, **seen.boxes}
    }
    member = torch.arange(members).repeat(len(prompts))
    return Evaluation(images, seen.parts, prompt, member, places, seen.failures)


def dealt(ranks: Ranks, policy, prompts: Sequence[Prompt], members: int, *settings) -> Evaluation | None:
    """`evaluate`, with the prompts dealt to all processes; the main one gets it as one alone would have it, the others
    None. All make as many images: one that would have fewer prompts repeats the first, which is not counted."""
    what, most = "the evaluation", -(-len(prompts) // ranks.size)
    own = ranks.deal(prompts)
    found = evaluate(policy, [*own, *prompts[:1] * (most - len(own))], members, *settings)
    kept = found.prompt < len(own)
    prompt, member = found.prompt[kept], found.member[kept]
    order = ranks.order(prompt, what)
    parts = {name: ranks.gather(values[kept], what)[order] for name, values in found.parts.items()}
    places = {name: rows[: len(prompt)] for name, rows in found.places.items()}
    told = ranks.tell([len(prompt), places], what)
    said = {name: [row for n, rows in told for row in rows.get(name, [None] * n)] for _, rows in told for name in rows}
    reasons = [why for own in ranks.tell([found.failures.get(i) for i in range(len(prompt))], what) for why in own]
    prompts_of, members_of = ranks.gather(ranks.number(prompt), what)[order], ranks.gather(member, what)[order]
    images, numbers = [], []
    for part in chunks(most * members, 32):  # never all of them on every process
        some = ranks.gather(found.images[kept][part], what)
        numbers.append(ranks.gather(ranks.number(prompt[part]), what))
        images += [some] if ranks.main else []
    if not ranks.main:
        return None
    pictures = torch.cat(images)[torch.cat(numbers).sort(stable=True).indices]
    return Evaluation(
        pictures, parts, prompts_of, members_of, {name: [rows[i] for i in order] for name, rows in said.items()},
        {k: reasons[i] for k, i in enumerate(order.tolist()) if reasons[i]},
    )  # fmt: skip


def paired(before: Float[Tensor, "N"], after: Float[Tensor, "N"], prompt: Int[Tensor, "N"]) -> tuple[float, float]:
    """Mean rise and the p-value of a two-sided paired t-test over prompts (a prompt's seeds are averaged: they are not
    independent), NaN of fewer than two. Images without a score on either side are left out."""
    valid = ~(before.isnan() | after.isnan())
    rise = (after - before)[valid]
    _, number, count = prompt[valid].unique(return_inverse=True, return_counts=True)
    per_prompt = torch.zeros(len(count)).index_add_(0, number, rise) / count
    if len(count) < 2:
        return float(rise.mean()), float("nan")
    if float(per_prompt.std()) == 0:
        return float(rise.mean()), 1.0 if float(rise.mean()) == 0 else 0.0
    return float(rise.mean()), float(stats.ttest_1samp(per_prompt.numpy(), 0.0).pvalue)


def contact_sheet(images: Float[Tensor, "N 3 H W"], path: Path, count: int = SHEET, columns: int = 12) -> None:
    """One PNG of `count` images evenly spaced through the batch, small ones enlarged to about 64 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]
    scale = max(1, 64 // chosen.shape[-1])
    save_image(chosen.repeat_interleave(scale, 2).repeat_interleave(scale, 3), path, nrow=columns, pad_value=1.0)


def fits(layout: Layout, prompts: Sequence[Prompt], folder: Path) -> None:
    """Raise BadInput where the benchmark's own scripts would misread what `write` is to put there.

    They score all that lies in the folder. GenEval's reads from a prompt's metadata what to look for; T2I-CompBench's
    take the prompt from the file's name, up to the first underscore, so a name cannot be mended without changing what
    is scored.
    """
    if layout == "mmalign":
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(
            f"--out {folder}: layout {layout} needs a new or empty folder; its scripts score all that is there"
        )
    for prompt in prompts:
        if layout == "geneval":
            asked = [*(prompt.wants.get("include") or [{}]), *prompt.wants.get("exclude", ())]
            if "tag" not in prompt.wants or not all({"class", "count"} <= set(own) for own in asked):
                raise BadInput(f"layout geneval needs `tag` and `include` with class and count; not in {prompt.text!r}")
        elif re.search(r"[/_\x00-\x1f\x7f]", prompt.text) or len(prompt.text.encode()) > LONGEST:
            raise BadInput(
                "layout t2i_compbench names files by the prompt: it may have no /, _ or control character and at most "
                f"{LONGEST} bytes, got {prompt.text!r}"
            )


def write(result: Evaluation, prompts: Sequence[Prompt], folder: Path, layout: Layout = "mmalign") -> None:
    """One PNG per image at the place the layout gives it, and `scores.jsonl` with a row for each. `geneval` has each
    prompt's metadata beside its images."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scores.jsonl").open("wb") as file:
        for i, (p, member) in enumerate(zip(result.prompt.tolist(), result.member.tolist(), strict=True)):
            prompt = prompts[p]
            name = PLACES[layout].format(prompt=prompt, row=p, member=member, image=i)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_image(result.images[i], folder / name)
            if layout == "geneval" and member == 0:
                metadata = json.dumps({**prompt.wants, "prompt": prompt.text})
                files.write((folder / name).parents[1] / "metadata.jsonl", metadata + "\n")
            scores = {
                key: None if value[i].isnan() else round(float(value[i]), 6) for key, value in result.parts.items()
            }
            row = {
                **prompt.wants,
                "image": name,
                "prompt": prompt.text,
                "id": prompt.id,
                "scores": scores,
                "places": {name: own[i] for name, own in result.places.items() if own[i] is not None},
            }
            file.write((json.dumps(row) + "\n").encode())
