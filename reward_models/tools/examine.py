"""Sanity checks for a scorer used as a reward.

- repeats: scoring the same images twice gives the same scores, up to noise well below the spread between images.
- neighbours: the score of an image does not depend on the other images in the batch, or on their order.
- sees the image: a blank image, noise and the prompt written as text score below the pictures generated for the prompt.
- sees the prompt: pictures score higher with their own prompt than with another (if the scorer's card has
  `sees_prompt`).
- answers: few images have no score.
- sides: a judge of pairs prefers the same picture in both orders.
- choices: the scorer agrees with a labelled set of pairs, if one is given.
- spread: the pictures do not all get the same score.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reward_models.images import from_pil
from reward_models.scoring import Picture
from reward_models.tools import picture_files
from reward_models.types import Images, Prompt, RewardModel, Scores

REPEATS = 0.25  # noise as a share of the spread between images; more would drown the training signal
FAILED = 0.05
SWAPPED = 0.2
AGREES = 0.6
TINY = 1e-12
HEADING = "| check | | result | what to do |"


@dataclass(frozen=True)
class Check:
    """One line of the report. `good`: None if inconclusive. `result`: the measured values. `advice`: what to do if the
    check fails."""

    check: str
    good: bool | None
    result: str
    advice: str = ""


def examine(
    scorer: RewardModel, images: Images, prompts: Sequence[Prompt], choices: Float[Tensor, "C 2"] | None = None
) -> list[Check]:
    """The report on a scorer, from at least two pictures of one size with their prompts. `choices`: the scores of the
    chosen and of the other picture of labelled pairs."""
    if len(images) < 2 or len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts; equal numbers of at least 2 are needed")
    if scorer.card.groupwise:
        return [*_of_pairs(scorer, images, prompts), *_chosen(choices)]
    first = scorer(images, prompts)
    return [
        _answers(first),
        _spread(first),
        _repeats(scorer, first, images, prompts),
        _neighbours(scorer, first, images, prompts),
        *_junk(scorer, first, images, prompts),
        *_prefers_its_prompt(scorer, first, images, prompts),
        *_chosen(choices),
    ]


def _main(scores: Scores) -> Float[Tensor, "N"]:
    return scores.values[:, 0]


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if bool((~values.isnan()).any()) else float("nan")


def _answers(first: Scores) -> Check:
    missing = float(_main(first).isnan().float().mean())
    reason = f"; {next(iter(first.failures.values()))[:160]}" if first.failures else ""
    return Check(
        "answers", missing <= FAILED, f"{missing:.0%} without a score{reason}", "read the replies; see the reason"
    )


def _spread(first: Scores) -> Check:
    values = _main(first)
    spread = float(values[~values.isnan()].std(correction=0)) if bool((~values.isnan()).any()) else float("nan")
    return Check("spread", spread > 1e-6, f"standard deviation {spread:.3g}", "a constant reward has no gradient")


def _repeats(scorer: RewardModel, first: Scores, images: Images, prompts: Sequence[Prompt]) -> Check:
    again = _main(scorer(images, prompts))
    return _near("repeats", _main(first), again, "lower the temperature, or average several replies")


def _neighbours(scorer: RewardModel, first: Scores, images: Images, prompts: Sequence[Prompt]) -> Check:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    half = max(1, len(order) // 2)
    parts = [_main(scorer(images[rows], [prompts[i] for i in rows.tolist()])) for rows in order.split(half)]
    again = torch.empty(len(images))
    again[order] = torch.cat(parts)
    return _near("neighbours", _main(first), again, "its scores depend on the batch; check padding and normalisation")


def _near(check: str, one: Tensor, two: Tensor, advice: str) -> Check:
    both = ~(one.isnan() | two.isnan())
    if not bool(both.any()):
        return Check(check, None, "no scores")
    noise = float(((one - two)[both] ** 2).mean().sqrt()) / 2**0.5
    spread = float(one[both].std(correction=0))
    once = int((one.isnan() != two.isnan()).sum())
    result = f"noise {noise:.3g}, spread between images {spread:.3g}" + (f", {once} answered only once" if once else "")
    return Check(check, noise <= max(REPEATS * spread, TINY), result, advice)


def _junk(scorer: RewardModel, first: Scores, images: Images, prompts: Sequence[Prompt]) -> list[Check]:
    """Pictures that ignore the prompt must score below those generated for it."""
    usual, checks = _mean(_main(first)), []
    for name, junk in junk_images(images, prompts).items():
        low = _mean(_main(scorer(junk, prompts)))
        missing = low != low
        result = f"{name} {'has no score' if missing else f'{low:.3g}'}, pictures {usual:.3g}"
        good = None if usual != usual else missing or low < usual
        checks.append(Check(f"sees the image: {name}", good, result, f"{name} is rewarded; do not train on it alone"))
    return checks


def junk_images(images: Images, prompts: Sequence[Prompt]) -> dict[str, Images]:
    """Pictures of the same size that ignore the prompt: grey, noise, and the prompt written as text."""
    height, width = images.shape[2:]
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    return {
        "blank": torch.full_like(images, 0.5),
        "noise": noise,
        "prompt as text": torch.cat([text_image(prompt.text, height, width) for prompt in prompts]),
    }


def text_image(text: str, height: int, width: int) -> Images:
    """The text in black on white, wrapped to the width."""
    picture = Image.new("RGB", (width, height), "white")
    size = max(8, height // 12)
    font = ImageFont.load_default(size)
    draw, line, y = ImageDraw.Draw(picture), "", 2
    for word in [*text.split(), ""]:
        longer = f"{line} {word}".strip()
        if line and (not word or draw.textlength(longer, font) > width - 4):
            draw.text((2, y), line, "black", font)
            line, y = word, y + size + 2
        else:
            line = longer
    return from_pil([picture])


def _prefers_its_prompt(scorer: RewardModel, first: Scores, images: Images, prompts: Sequence[Prompt]) -> list[Check]:
    others = [
        next((p for p in prompts[i + 1 :] + prompts[:i] if p.text != prompts[i].text), None) for i in range(len(images))
    ]
    rows = [i for i, other in enumerate(others) if other is not None]
    if not scorer.card.sees_prompt or not rows:
        return []
    wrong = _main(scorer(images[rows], [others[i] for i in rows]))
    better = torch.sign(_main(first)[rows] - wrong)
    better = better[~better.isnan()]
    if not len(better):
        return [Check("sees the prompt", None, "no scores")]
    share = float((better + 1).mean() / 2)
    return [
        Check(
            "sees the prompt", share >= AGREES, f"own prompt above another's {share:.0%} of the time",
            "it ignores the prompt; is it the right model, and is the prompt in its question?",
        )
    ]  # fmt: skip


def _of_pairs(scorer: RewardModel, images: Images, prompts: Sequence[Prompt]) -> list[Check]:
    """Checks of a judge of pairs: pictures against junk, and each pair in both orders."""
    if hasattr(scorer, "orders"):
        orders, scorer.orders, scorer.swaps = scorer.orders, "both", [0, 0]
    groups = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt.text].append(i)
    junk, wins, failures, count = junk_images(images, prompts)["noise"], [], {}, 0
    try:
        for number, rows in enumerate(groups.values()):
            group = torch.cat([images[rows], junk[rows[:1]]])
            scores = scorer(group, [replace(prompts[rows[0]], id=number)] * len(group))
            wins.append((_mean(_main(scores)[:-1]), float(_main(scores)[-1])))
            failures |= scores.failures
            count += len(group)
    finally:
        if hasattr(scorer, "orders"):
            scorer.orders = orders
    both = torch.tensor(wins)
    missing = len(failures) / count
    reason = f"; {next(iter(failures.values()))[:160]}" if failures else ""
    usual, noise = _mean(both[:, 0]), _mean(both[:, 1])
    good = None if usual != usual or noise != noise else noise < usual
    checks = [
        Check(
            "answers", missing <= FAILED, f"{missing:.0%} without a score{reason}", "read the replies; see the reason"
        ),
        Check("sees the image: noise", good, f"noise wins {noise:.0%}, pictures {usual:.0%}", "noise is rewarded"),
    ]
    if getattr(scorer, "swaps", (0, 0))[1]:
        swapped, pairs = scorer.swaps
        share = swapped / pairs
        checks.append(
            Check(
                "sides", share <= SWAPPED, f"the winner changed with the side in {share:.0%} of {pairs} pairs",
                "use orders=both, which counts such a pair as a tie",
            )
        )  # fmt: skip
    return checks


def _chosen(choices: Float[Tensor, "C 2"] | None) -> list[Check]:
    if choices is None:
        return []
    complete = choices[~choices.isnan().any(1)]
    if not len(complete):
        return [Check("choices", None, "no pair has two scores")]
    share = float((torch.sign(complete[:, 0] - complete[:, 1]) + 1).mean() / 2)
    result = f"agrees with {share:.0%} of {len(complete)} choices"
    return [Check("choices", share >= AGREES, result, "another model, or clearer instructions")]


Pair = tuple[Picture, Picture, Prompt]  # the chosen picture, the other, and their prompt


def material(source: Path, most: int) -> tuple[Images, list[Prompt], list[Pair]]:
    """Up to `most` pictures of a folder or table, all of the most common size, their prompts, and labelled pairs of
    them without ties. ValueError if there are fewer than two, or one has no prompt."""
    items, choices = picture_files.read(source)
    without = next((item.name for item in items if item.prompt is None), None)
    if without is not None:
        raise ValueError(f"{source}: {without} has no prompt, which judges need")
    pictures = {item.key: picture_files.picture(item) for item in items}
    sizes = Counter(tuple(picture.shape[2:]) for picture in pictures.values())
    if not sizes or sizes.most_common(1)[0][1] < 2:
        raise ValueError(f"{source}: two pictures of one size are needed")
    size = sizes.most_common(1)[0][0]
    same = [item for item in items if tuple(pictures[item.key].shape[2:]) == size]
    same = [same[int(k)] for k in torch.linspace(0, len(same) - 1, min(most, len(same)))]
    prompts = [replace(item.prompt, id=number) for number, item in enumerate(same)]
    prompt_of = {item.key: item.prompt for item in items}
    pairs = []
    for number, choice in enumerate(choice for choice in choices if not choice.tie):
        better, worse = ((name, choice.prompt) for name in (choice.better, choice.worse))
        pairs.append((pictures[better], pictures[worse], replace(prompt_of[better], id=number)))
    return torch.cat([pictures[item.key] for item in same]), prompts, pairs


def chosen(scorer: RewardModel, pairs: Sequence[Pair]) -> Float[Tensor, "C 2"] | None:
    """The scores of the chosen and of the other picture of each pair; None without pairs."""
    scores = []
    for better, worse, prompt in pairs:
        if better.shape == worse.shape:
            scores.append(_main(scorer(torch.cat([better, worse]), [prompt] * 2)))
        elif scorer.card.groupwise:
            scores.append(torch.full((2,), torch.nan))
        else:
            scores.append(torch.cat([_main(scorer(picture, [prompt])) for picture in (better, worse)]))
    return torch.stack(scores) if scores else None


def markdown(reports: Mapping[str, Sequence[Check]], images: int) -> str:
    """The reports as a Markdown page."""
    lines = [f"# Judges examined on {images} pictures", ""]
    for name, rows in reports.items():
        lines += [f"## {name}", "", *table(rows), ""]
    return "\n".join(lines)


def table(rows: Sequence[Check]) -> list[str]:
    """A Markdown table, line by line."""
    lines = [HEADING, "|---|---|---|---|"]
    for row in rows:
        mark = {True: "good", False: "**bad**", None: "unknown"}[row.good]
        result = row.result.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {row.check} | {mark} | {result} | {'' if row.good else row.advice} |")
    return lines
