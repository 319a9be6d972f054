"""Is a judge fit to be a reward? A few questions with known answers, put to any scorer.

- repeats: the same images asked twice get the same scores, to well below the spread between images.
- neighbours: an image scores the same beside others, in any order.
- sees the image: blank, noise and the prompt written as text score below the pictures that were made for it.
- sees the prompt: pictures score better with their own prompt than with another's (where the card says it looks).
- answers: few images are left without a score.
- sides: a judge of pairs prefers the same picture whichever comes first.
- choices: it agrees with a labelled set of pairs, if one is given.
- spread: not all pictures score the same.
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

REPEATS = 0.25  # of the spread between images of a prompt: more noise than that drowns what is learnt from
FAILED = 0.05
SWAPPED = 0.2
AGREES = 0.6
TINY = 1e-12
HEADING = "| check | | seen | what to do |"


@dataclass(frozen=True)
class Check:
    """One line of the report. `good` None: could not be told. `advice`: what to do where it is not good."""

    check: str
    good: bool | None
    seen: str
    advice: str = ""


def examine(
    scorer: RewardModel, images: Images, prompts: Sequence[Prompt], choices: Float[Tensor, "C 2"] | None = None
) -> list[Check]:
    """The report on a scorer, of pictures of one size with their prompts, at least two of them. `choices`: scores of
    the chosen and of the other picture of labelled pairs."""
    if len(images) < 2 or len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts; as many, and at least 2, are needed")
    if scorer.card.groupwise:
        return [*_of_pairs(scorer, images, prompts), *_chosen(choices)]
    first = scorer(images, prompts)
    return [
        _answers(first),
        _spread(first),
        _repeats(scorer, first, images, prompts),
        _neighbours(scorer, first, images, prompts),
        *_junk(scorer, first, images, prompts),
        *_own_prompt(scorer, first, images, prompts),
        *_chosen(choices),
    ]


def _main(scores: Scores) -> Float[Tensor, "N"]:
    return scores.values[:, 0]


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if bool((~values.isnan()).any()) else float("nan")


def _answers(first: Scores) -> Check:
    missing = float(_main(first).isnan().float().mean())
    why = f"; {next(iter(first.failures.values()))[:160]}" if first.failures else ""
    return Check(
        "answers", missing <= FAILED, f"{missing:.0%} without a score{why}", "read the replies; see the reason"
    )


def _spread(first: Scores) -> Check:
    values = _main(first)
    spread = float(values[~values.isnan()].std(correction=0)) if bool((~values.isnan()).any()) else float("nan")
    return Check("spread", spread > 1e-6, f"standard deviation {spread:.3g}", "a constant reward teaches nothing")


def _repeats(scorer, first: Scores, images: Images, prompts) -> Check:
    again = _main(scorer(images, prompts))
    return _near("repeats", _main(first), again, "lower the temperature, or average several replies")


def _neighbours(scorer, first: Scores, images: Images, prompts) -> Check:
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
    lost = int((one.isnan() != two.isnan()).sum())
    seen = f"noise {noise:.3g}, spread between images {spread:.3g}" + (f", {lost} answered only once" if lost else "")
    return Check(check, noise <= max(REPEATS * spread, TINY), seen, advice)


def _junk(scorer, first: Scores, images: Images, prompts) -> list[Check]:
    """What no prompt asks for must score below what was made for it."""
    whole, found = _mean(_main(first)), []
    for name, junk in junk_images(images, prompts).items():
        low = _mean(_main(scorer(junk, prompts)))
        refused = low != low
        seen = f"{name} {'has no score' if refused else f'{low:.3g}'}, pictures {whole:.3g}"
        good = None if whole != whole else refused or low < whole
        found.append(Check(f"sees the image: {name}", good, seen, f"{name} pays; do not train on it alone"))
    return found


def junk_images(images: Images, prompts: Sequence[Prompt]) -> dict[str, Images]:
    """Pictures of the same size that show nothing that was asked for: grey, noise, and the prompt as text."""
    height, width = images.shape[2:]
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    return {
        "blank": torch.full_like(images, 0.5),
        "noise": noise,
        "prompt as text": torch.cat([written(own.text, height, width) for own in prompts]),
    }


def written(text: str, height: int, width: int) -> Images:
    """The text on white, in lines that fit."""
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


def _own_prompt(scorer, first: Scores, images: Images, prompts) -> list[Check]:
    others = [
        next((p for p in prompts[i + 1 :] + prompts[:i] if p.text != prompts[i].text), None) for i in range(len(images))
    ]
    rows = [i for i, own in enumerate(others) if own is not None]
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
            "it looks at the picture alone; is it the right model, and is the prompt in its question?",
        )
    ]  # fmt: skip


def _of_pairs(scorer, images: Images, prompts) -> list[Check]:
    """Of a judge of pairs: the pictures against junk, and each pair from both sides."""
    if hasattr(scorer, "orders"):
        orders, scorer.orders, scorer.swaps = scorer.orders, "both", [0, 0]
    groups = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt.text].append(i)
    junk, wins, failures, asked = junk_images(images, prompts)["noise"], [], {}, 0
    try:
        for number, rows in enumerate(groups.values()):
            some = torch.cat([images[rows], junk[rows[:1]]])
            found = scorer(some, [replace(prompts[rows[0]], id=number)] * len(some))
            wins.append((_mean(_main(found)[:-1]), float(_main(found)[-1])))
            failures |= found.failures
            asked += len(some)
    finally:
        if hasattr(scorer, "orders"):
            scorer.orders = orders
    both = torch.tensor(wins)
    lost = len(failures) / asked
    why = f"; {next(iter(failures.values()))[:160]}" if failures else ""
    own, noise = _mean(both[:, 0]), _mean(both[:, 1])
    good = None if own != own or noise != noise else noise < own
    out = [
        Check("answers", lost <= FAILED, f"{lost:.0%} without a score{why}", "read the replies; see the reason"),
        Check("sees the image: noise", good, f"noise wins {noise:.0%}, pictures {own:.0%}", "noise pays"),
    ]
    if getattr(scorer, "swaps", (0, 0))[1]:
        swapped, pairs = scorer.swaps
        share = swapped / pairs
        out.append(
            Check(
                "sides", share <= SWAPPED, f"the winner changed with the side in {share:.0%} of {pairs} pairs",
                "use orders=both, which counts such a pair as a tie",
            )
        )  # fmt: skip
    return out


def _chosen(choices: Float[Tensor, "C 2"] | None) -> list[Check]:
    if choices is None:
        return []
    had = choices[~choices.isnan().any(1)]
    if not len(had):
        return [Check("choices", None, "no pair has two scores")]
    share = float((torch.sign(had[:, 0] - had[:, 1]) + 1).mean() / 2)
    seen = f"agrees with {share:.0%} of {len(had)} choices"
    return [Check("choices", share >= AGREES, seen, "another model, or clearer instructions")]


Pair = tuple[Picture, Picture, Prompt]  # the chosen picture, the other, and their prompt


def material(source: Path, most: int) -> tuple[Images, list[Prompt], list[Pair]]:
    """Up to `most` pictures of a folder or table, all of the commonest size, their prompts, and labelled pairs of them.
    ValueError if there are not two, or one has no prompt."""
    items, choices = picture_files.read(source)
    unasked = next((own.name for own in items if own.prompt is None), None)
    if unasked is not None:
        raise ValueError(f"{source}: {unasked} has no prompt, and judges look at it")
    pictures = {own.key: picture_files.picture(own) for own in items}
    sizes = Counter(tuple(own.shape[2:]) for own in pictures.values())
    if not sizes or sizes.most_common(1)[0][1] < 2:
        raise ValueError(f"{source}: two pictures of one size are needed")
    size = sizes.most_common(1)[0][0]
    same = [own for own in items if tuple(pictures[own.key].shape[2:]) == size]
    same = [same[int(k)] for k in torch.linspace(0, len(same) - 1, min(most, len(same)))]
    prompts = [replace(own.prompt, id=number) for number, own in enumerate(same)]
    asked = {own.key: own.prompt for own in items}
    pairs = []
    for number, own in enumerate(choices):
        better, worse = ((name, own.prompt) for name in (own.better, own.worse))
        pairs.append((pictures[better], pictures[worse], replace(asked[better], id=number)))
    return torch.cat([pictures[own.key] for own in same]), prompts, pairs


def chosen(scorer: RewardModel, pairs: Sequence[Pair]) -> Float[Tensor, "C 2"] | None:
    """The scores of the chosen and of the other picture of each pair; None without pairs."""
    found = []
    for better, worse, prompt in pairs:
        if better.shape == worse.shape:
            found.append(_main(scorer(torch.cat([better, worse]), [prompt] * 2)))
        elif scorer.card.groupwise:
            found.append(torch.full((2,), torch.nan))
        else:
            found.append(torch.cat([_main(scorer(own, [prompt])) for own in (better, worse)]))
    return torch.stack(found) if found else None


def markdown(reports: Mapping[str, Sequence[Check]], images: int) -> str:
    """A page for people."""
    lines = [f"# Judges examined on {images} pictures", ""]
    for name, rows in reports.items():
        lines += [f"## {name}", "", *table(rows), ""]
    return "\n".join(lines)


def table(rows: Sequence[Check]) -> list[str]:
    """Lines of Markdown."""
    lines = [HEADING, "|---|---|---|---|"]
    for own in rows:
        mark = {True: "good", False: "**bad**", None: "unknown"}[own.good]
        seen = own.seen.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {own.check} | {mark} | {seen} | {'' if own.good else own.advice} |")
    return lines
