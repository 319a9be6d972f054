"""`pairwise`: how often a vision-language model prefers an image to the others of its prompt (Pref-GRPO's win rate).

One component, `wins`: the share of an image's comparisons that it won, a tie counts half, in [0, 1]; NaN if no
comparison succeeded. A failed comparison counts for neither image. A score depends on the group: it changes with the
other images of the prompt, and the mean over a group whose comparisons all succeeded is 0.5. A prompt with one image
has no score.

Judges are biased towards a side. `orders` "random" compares each pair once; a hash of the two pictures and the prompt
decides which comes first, so that a repeated call gives the same order. "both" compares each pair in both orders, and
a different winner in each is a tie. There are G (G - 1) / 2 pairs of G images; `opponents` bounds how many others each
image is compared with. The instruction is our own. Licence: the model's own.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from reward_models.images import to_uint8
from reward_models.scoring import each
from reward_models.types import Images, Prompt, Scores
from reward_models.vlm import ask, replies, scales, templates

ORDERS = ("random", "both")
SIDES = {"1": 0, "a": 0, "one": 0, "first": 0, "2": 1, "b": 1, "two": 1, "second": 1}
SIDE = re.compile(rf"(?:the )?(?:image|picture|option)? ?({'|'.join(SIDES)})(?: (?:image|picture|option))?\b", re.I)
TIE = re.compile(r"(?:it is |it's )?(?:a )?(?:tie|draw|equal|neither|both)\b", re.I)
NOTE = re.compile(r" ?(?:$|[,;:(]|\.(?: |$)| [-–—] )")
OTHER = re.compile(
    rf"[ ,;:(.–—-]*(?:(?:no|not|or|and)\b|(?:image|picture|option)? ?(?:{'|'.join(SIDES)})[ ,;:).]*$)", re.I
)
WINS = re.compile(r" (?:is (?:the )?(?:better|winner)|wins)\b", re.I)


def read(text: str, cut: bool = False) -> int | None:
    """The picture that won: 0 the first, 1 the second, None for a tie. ValueError if the reply names no winner or
    two."""
    text = replies.answer(text, cut)
    answers = [
        part[: part.lower().index("</answer>")]
        for part in re.split("<answer>", text, flags=re.I)[1:]
        if "</answer>" in part.lower()
    ]
    for value in replies.values(text):
        row = replies.plain(value) if isinstance(value, dict) else {}
        answers += [str(row[key]) for key in ("winner", "better", "answer") if row.get(key) is not None]
    answers = answers or [line for line, _ in replies.titled(text, ("winner", "answer", "better"))]
    if not answers:
        lines = (scales.unwrapped(line) for line in text.split("\n"))
        answers = [line for line in lines if (side := SIDE.match(line)) and WINS.match(line[side.end() :])]
    winners = set(map(_winner, answers))
    if len(winners) != 1:
        raise ValueError("the reply names two winners" if winners else "the reply names no winner")
    return winners.pop()


def _winner(answer: str) -> int | None:
    """The side that an answer names. ValueError if it names several, or has other words before a note."""
    text = " ".join(scales.unwrapped(answer).split())
    tie = TIE.match(text)
    side = tie or SIDE.match(text)
    rest = text[side.end() :] if side else text
    if side and (WINS.match(rest) or NOTE.match(rest)) and not OTHER.match(rest) and " or " not in rest.lower():
        return None if tie else SIDES[side[1].lower()]
    raise ValueError(f"the winner is {answer.strip()[:99]!r:.40}; picture 1, picture 2 or tie is needed")


class Pairwise:
    """The scorer. `model` is a folder or hub id, or with `url` its name on the server. `orders`: "random" or "both".
    `opponents`: the most images that an image is compared with, by default all. `instruction`: a file that replaces
    our own. `asking`: see `ask.judge`. ValueError if the model cannot be loaded or a setting is invalid."""

    names = ("wins",)

    def __init__(
        self,
        model: str,
        url: str | None = None,
        orders: str = "random",
        opponents: int | None = None,
        instruction: str | None = None,
        tokens: int = 1024,
        **asking: Any,
    ):
        if orders not in ORDERS or (opponents is not None and opponents < 1):
            raise ValueError(f"pairwise: orders is random or both, opponents at least 1; got {orders!r}, {opponents!r}")
        self.orders, self.opponents, self.tokens = orders, opponents, tokens
        self.template = templates.Template.of("pairwise", "pairwise", ("first", "second", "prompt"), instruction)
        self.judge = ask.judge("pairwise", model, url, asking)
        settings = {"orders": orders, "opponents": opponents, "instruction": self.template.source, "tokens": tokens}
        self.card = ask.card("pairwise", self.judge, 0, 1, settings, groupwise=True)
        self.swaps = [0, 0]  # of the pairs compared in both orders: those whose winner changed, and all

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, batch=max(1, len(images)))

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        names = [hashlib.sha256(pixels.numpy().tobytes()).hexdigest() for pixels in to_uint8(images).cpu()]
        games = [self._sides(names, prompts, *pair) for pair in self._pairs(names, prompts)]
        if self.orders == "both":
            games = [side for one, two in games for side in ((one, two), (two, one))]
        questions = [
            self.template.fill(first=images[one], second=images[two], prompt=templates.quoted(prompts[one].text))
            for one, two in games
        ]
        won, met, reasons = torch.zeros(len(images)), torch.zeros(len(images)), {}
        results: dict[frozenset[int], list[int | None]] = defaultdict(list)
        for pair, reply in zip(games, self.judge.ask(questions, self.tokens), strict=True):
            try:
                if reply.failure:
                    raise ValueError(reply.failure)
                side = read(reply.text, reply.cut)
            except ValueError as error:
                reasons |= dict.fromkeys(pair, f"{error}; the reply begins {replies.excerpt(reply.text)}")
                continue
            results[frozenset(pair)].append(None if side is None else pair[side])
        for pair, winners in results.items():
            if self.orders == "both" and len(winners) < 2:
                continue  # one order alone would be biased towards a side
            winner = winners[0] if len(set(winners)) == 1 else None
            self.swaps[0] += len(set(winners)) > 1
            self.swaps[1] += self.orders == "both"
            for i in pair:
                met[i] += 1
                won[i] += 0.5 if winner is None else float(winner == i)
        alone = "it is the only image of its prompt, and there is nothing to compare it with"
        failures = {i: reasons.get(i, alone) for i in (met == 0).nonzero()[:, 0].tolist()}
        return Scores(self.names, torch.where(met > 0, won / met, torch.nan)[:, None], failures=failures)

    def _pairs(self, names: Sequence[str], prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
        """Pairs of images of one prompt; with `opponents`, neighbours in a circle sorted by the pictures' digests."""
        groups = defaultdict(list)
        for i, prompt in enumerate(prompts):
            groups[prompt.id, prompt.text].append(i)
        pairs = []
        for rows in groups.values():
            reach = len(rows) if self.opponents is None else -(-self.opponents // 2)
            circle = sorted(rows, key=names.__getitem__)
            for a, b in combinations(range(len(circle)), 2):
                if min(b - a, len(circle) - b + a) <= reach:
                    pairs.append((circle[a], circle[b]))
        return pairs

    def _sides(self, names: Sequence[str], prompts: Sequence[Prompt], one: int, two: int) -> tuple[int, int]:
        low, high = sorted((one, two), key=names.__getitem__)
        coin = hashlib.sha256(f"{names[low]} {names[high]} {prompts[one].text}".encode()).digest()[0] & 1
        return (high, low) if coin else (low, high)
