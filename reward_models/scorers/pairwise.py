"""`pairwise`: how often a vision-language model prefers an image to the others of its prompt (Pref-GRPO's win rate).

Component `wins`: the share of an image's comparisons that it won, a tie counts half, in [0, 1]; NaN if no comparison
succeeded. A failed comparison counts for neither image. A score depends on the group: it changes with the
other images of the prompt, and the mean over a group whose comparisons all succeeded is 0.5. A prompt with one image
has no score.

Judges are biased towards a side. `orders` "random" compares each pair once; a hash of the two pictures and the prompt
decides which comes first, so that a repeated call gives the same order. "both" compares each pair in both orders, and
a different winner in each is a tie. There are G (G - 1) / 2 pairs of G images; `opponents` bounds how many others each
image is compared with. The instruction is our own. Licence: the model's own.

With `aspects` the judge scores both images in each aspect and names its winner, the form in which RationalRewards is
evaluated. `faithfulness`, `quality` and `text` are shares of comparisons won in that aspect, NaN where it never
applied; an image wins as a whole with the higher mean over the aspects that apply. A winner with the lower score, or a
score of one image alone, fails the comparison. (The released evaluation counts an aspect without a score as 2.5, which
can make a reply that was not understood a verdict.)
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.images import to_uint8
from reward_models.scorers import rational
from reward_models.scoring import each
from reward_models.types import Images, Prompt, Scores
from reward_models.vlm import ask, replies, scales, templates

ORDERS = ("random", "both")
ASPECTS = {name: rational.ASPECTS[name] for name in rational.TASKS["image"]}
SIDES = {"1": 0, "a": 0, "one": 0, "first": 0, "2": 1, "b": 1, "two": 1, "second": 1}
SIDE = re.compile(rf"(?:the )?(?:image|picture|option)? ?({'|'.join(SIDES)})(?: (?:image|picture|option))?\b", re.I)
TIE = re.compile(r"(?:it is |it's )?(?:a )?(?:tie|draw|equal|neither|both)\b", re.I)
NOTE = re.compile(r" ?(?:$|[,;:(]|\.(?: |$)| [-–—] )")
OTHER = re.compile(
    rf"[ ,;:(.–—-]*(?:(?:no|not|or|and)\b|(?:image|picture|option)? ?(?:{'|'.join(SIDES)})[ ,;:).]*$)", re.I
)
OF_SIDE = re.compile(r"score (?:of )?(?:image )?([ab12])|(?:image )?([ab12]) score")
SCALE = scales.Scale(1, 4, beyond=0.5, optional=True)
Winner = int | None  # 0 the first picture, 1 the second, None for a tie
WINS = re.compile(r" (?:is (?:the )?(?:better|winner)|wins)\b", re.I)


def read(text: str, cut: bool = False) -> Winner:
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


def read_aspects(text: str, cut: bool = False) -> dict[str, Winner]:
    """The winner as a whole, `wins`, and of each aspect that applies. ValueError if an aspect has neither two scores
    nor N/A, names a winner with the lower score, or has two different values for one thing; or if none applies."""
    lines = replies.answer(text, cut).split("\n")
    given: dict[str, dict[str, Any]] = {name: {} for name in ASPECTS}
    aspect = ""
    for number, line in enumerate(lines):
        title, note, rest = replies.heading(line)
        aspect = next((name for name, titles in ASPECTS.items() if title in (name, *titles)), aspect)
        if title.startswith("summary"):
            break
        value: Any
        if side := OF_SIDE.fullmatch(title):
            key = f"score {'ab'[SIDES[side[1] or side[2]]]}"
            value = SCALE.read(replies.after(lines, number, rest), f"{key} of {aspect}", note)
        elif title == "winner":
            key, answer = title, replies.after(lines, number, rest)
            value = "N/A" if scales.NONE.fullmatch(scales.unwrapped(answer)) else _winner(answer)
        else:
            continue
        if not aspect:
            raise ValueError(f"{title} stands before the name of an aspect")
        if given[aspect].setdefault(key, value) != value:
            raise ValueError(f"{aspect} has two different values of {key}")
    winners = {name: _winner_of(name, values) for name, values in given.items()}
    applying = [name for name, winner in winners.items() if winner != "N/A"]
    if not applying:
        raise ValueError("no aspect applies")
    lead = sum(given[name]["score a"] - given[name]["score b"] for name in applying)
    overall = None if abs(lead) < 1e-9 else int(lead < 0)
    return {"wins": overall, **{name: winners[name] for name in applying}}


def _winner_of(name: str, values: Mapping[str, Any]) -> Winner | str:
    """The winner of an aspect, "N/A" if it does not apply."""
    if missing := [key for key in ("score a", "score b", "winner") if key not in values]:
        raise ValueError(f"there is no {missing[0]} for {name}")
    a, b, winner = values["score a"], values["score b"], values["winner"]
    if (a is None) != (b is None) or (a is None) != (winner == "N/A"):
        raise ValueError(f"{name} is N/A in part")
    if a is None and name != "text":
        raise ValueError(f"{name} is N/A, but it applies to every image")
    if a is not None and winner != "N/A" and a != b and winner != int(b > a):
        raise ValueError(f"the winner of {name} is not the picture with the higher score")
    return winner


def _winner(answer: str) -> Winner:
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
    `opponents`: the most images that an image is compared with, by default all. `aspects`: compare each aspect.
    `instruction`: a file that replaces our own. `asking`: see `ask.judge`. ValueError if the model cannot be loaded or
    a setting is invalid."""

    def __init__(
        self,
        model: str,
        url: str | None = None,
        orders: str = "random",
        opponents: int | None = None,
        aspects: bool = False,
        instruction: str | None = None,
        tokens: int = 1024,
        **asking: Any,
    ):
        if orders not in ORDERS or (opponents is not None and opponents < 1):
            raise ValueError(f"pairwise: orders is random or both, opponents at least 1; got {orders!r}, {opponents!r}")
        self.orders, self.opponents, self.tokens = orders, opponents, tokens
        if not isinstance(aspects, bool):
            raise ValueError(f"pairwise: aspects is true or false, not {aspects!r}")
        self.names = ("wins", *ASPECTS) if aspects else ("wins",)
        self.read = read_aspects if aspects else lambda text, cut: {"wins": read(text, cut)}
        name = "pairwise_aspects" if aspects else "pairwise"
        self.template = templates.Template.of("pairwise", name, ("first", "second", "prompt"), instruction)
        self.judge = ask.judge("pairwise", model, url, asking)
        settings = {"orders": orders, "opponents": opponents, "instruction": self.template.source, "tokens": tokens}
        settings |= {"aspects": True} if aspects else {}
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
        reasons: dict[int, str] = {}
        results: dict[tuple[str, frozenset[int]], list[int | None]] = defaultdict(list)
        for pair, reply in zip(games, self.judge.ask(questions, self.tokens), strict=True):
            try:
                if reply.failure:
                    raise ValueError(reply.failure)
                sides = self.read(reply.text, reply.cut)
            except ValueError as error:
                reasons |= dict.fromkeys(pair, f"{error}; the reply begins {replies.excerpt(reply.text)}")
                continue
            for name, side in sides.items():
                results[name, frozenset(pair)].append(None if side is None else pair[side])
        won, met = self._counted(len(images), results)
        alone = "it is the only image of its prompt, and there is nothing to compare it with"
        failures = {i: reasons.get(i, alone) for i in (met[:, 0] == 0).nonzero()[:, 0].tolist()}
        return Scores(self.names, torch.where(met > 0, won / met, torch.nan), failures=failures)

    def _counted(
        self, count: int, results: Mapping[tuple[str, frozenset[int]], list[int | None]]
    ) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
        """The comparisons that each image won, by component, and all of its comparisons."""
        won, met = torch.zeros(count, len(self.names)), torch.zeros(count, len(self.names))
        for (name, pair), winners in results.items():
            if self.orders == "both" and len(winners) < 2:
                continue  # one order alone would be biased towards a side
            winner, column = winners[0] if len(set(winners)) == 1 else None, self.names.index(name)
            if name == "wins":
                self.swaps[0] += len(set(winners)) > 1
                self.swaps[1] += self.orders == "both"
            for i in pair:
                met[i, column] += 1
                won[i, column] += 0.5 if winner is None else float(winner == i)
        return won, met

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
