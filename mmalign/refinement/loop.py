"""The critique-refine loop: draw an image, have it criticised, draw again, keep the one that scores best. No training.

After RationalRewards' generate-critique-refine. Its script replaces the first image whatever the second scores; here
the best-scoring image is kept, and every image is scored against the first request, never against a refined one. A
critic is any scorer; the moves it may ask for are named in `MOVES`. Edits are made to the best image so far.

Seeds come from (seed, prompt id, round): batches and interruptions change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import BadInput
from mmalign.evaluation.toward import Toward
from mmalign.policy.protocol import Policy
from mmalign.refinement.redraw import Attempt, Base, cost, draw
from mmalign.rewards.judge import score
from mmalign.seeds import seed_of
from mmalign.types import Latents
from reward_models import Prompt, RewardModel
from reward_models.regions import Region, box_shares

MOVES = {
    "request": "the request the critic writes, if it writes one",
    "seed": "fresh noise",
    "guidance": "classifier-free guidance higher by 1 each round",
    "region": "redraw only what the critic blames (boxes of negative credit)",
    "keep": "keep only what the critic praises (boxes of full credit), redraw the rest",
    "cut": "begin from the image, noised to the time `cut`",
    "strength": "more of the adapter than was trained: `strength` times its change",
    "toward": "along the gradient of a scorer at late steps (`mmalign.evaluation.toward`)",
}
FULL = 1 - 1e-6  # credit of a region with which nothing is wrong


@dataclass(frozen=True)
class Settings:
    """`moves` of `MOVES`. `good`: what every component that applies must reach for a prompt to be finished. `by`: the
    component that decides between images, "" for the critic's first. `images`, `forwards`: most for one prompt, the
    first image included; the forwards of a round are known from its moves before it is drawn. `patience`: rounds
    without a better image before giving up. `cut` in (0, 1); `strength` of the adapter."""

    moves: tuple[str, ...] = ("request", "seed")
    by: str = ""
    good: int | float = 1.0
    images: int = 4
    forwards: int | float | None = None
    patience: int | None = None
    cut: float = 0.9
    strength: float = 1.5
    guidance: float = 1.0
    steps: int = 10
    seed: int = 0

    def check(self, adapter: bool, toward: bool = False) -> None:
        """BadInput for moves that are not known or cannot be made, with or without an adapter and guidance."""
        unknown = [move for move in self.moves if move not in MOVES]
        if unknown or not self.moves:
            raise BadInput(f"moves: {', '.join(unknown) or 'none'}; known are {', '.join(MOVES)}")
        if "strength" in self.moves and not adapter:
            raise BadInput("moves: strength makes more of an adapter; give one")
        if toward != ("toward" in self.moves):
            raise BadInput("moves: toward goes along the gradient of a scorer; give both, or neither")
        if "cut" in self.moves and not 0 < self.cut < 1:
            raise BadInput(f"cut {self.cut}: a time between 0 (the image) and 1 (noise) is needed")
        if {"region", "keep"} & {*self.moves} and self.steps < 3:
            raise BadInput(f"steps {self.steps}: inpainting takes at least 3")


class Move(NamedTuple):
    """A round before it is drawn: its attempt (None: a given image), the round it begins from (-1: noise), and the
    names of its moves."""

    attempt: Attempt | None
    parent: int = -1
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Round:
    """One image of a prompt: how it was made, from which earlier round (-1: noise), and the critic's view of it. Raw
    `scores` by component, NaN where it has no opinion; `failure` is the reason if there are none."""

    attempt: Attempt | None
    parent: int
    moves: tuple[str, ...]
    image: Float[Tensor, "3 H W"]
    latent: Float[Tensor, "C h w"]
    scores: dict[str, float]
    critique: str
    request: str
    regions: tuple[Region, ...]
    failure: str
    forwards: float


@dataclass
class Refinement:
    """All rounds of a prompt. `best` is the index of the image that scores best, the earliest of equals; `stopped` is
    the reason why there are no more rounds."""

    prompt: Prompt
    rounds: list[Round] = field(default_factory=list)
    best: int = 0
    stopped: str = ""

    @property
    def forwards(self) -> float:
        return sum(one.forwards for one in self.rounds)

    def add(self, new: Round, by: str) -> None:
        self.rounds.append(new)
        value, best = new.scores[by], self.rounds[self.best].scores[by]
        if value > best or (best != best and value == value):
            self.best = len(self.rounds) - 1


def refine(
    policy: Policy,
    critic: RewardModel,
    prompts: Sequence[Prompt],
    settings: Settings,
    batch: int = 64,
    images: Float[Tensor, "N 3 H W"] | None = None,
    name: str = "critic",
    toward: Toward | None = None,
) -> list[Refinement]:
    """A refinement of each prompt. Round 0 is drawn, or is one of `images`, which the policy's autoencoder encodes.
    `name` of the critic stands before the reasons of failures; `toward` is the guidance of the move of that name.
    BadInput where drawing round 0 takes more than `settings.forwards`."""
    loop = _Loop(policy, critic, settings, batch, name, toward)
    refinements = [Refinement(prompt) for prompt in prompts]
    first = [Attempt(p.text, seed_of("refine", settings.seed, p.id), settings.guidance) for p in prompts]
    if images is None:
        loop.check_cost(first)
        loop.draw(refinements, [Move(attempt) for attempt in first])
    else:
        latents = torch.cat([policy.encode_images(part.to(policy.device)) for part in images.split(batch)])
        loop.judge(refinements, [Move(None)] * len(prompts), images, latents, [0.0] * len(prompts))
    tried = [{_key(Move(attempt), None)} for attempt in first]
    while True:
        active, moves = [], []
        for refinement, attempt, before in zip(refinements, first, tried, strict=True):
            if not refinement.stopped and (move := loop.next_move(refinement, attempt, before)) is not None:
                active.append(refinement)
                moves.append(move)
        if not active:
            return refinements
        loop.draw(active, moves)


@dataclass(frozen=True)
class _Loop:
    """The loop over rounds: the things that all rounds of all prompts share, and its steps."""

    policy: Policy
    critic: RewardModel
    settings: Settings
    batch: int
    name: str
    toward: Toward | None

    def check_cost(self, attempts: Sequence[Attempt]) -> None:
        most = self.settings.forwards
        needed = max(cost(self.policy, attempt, self.settings.steps) for attempt in attempts)
        if most is not None and needed > most:
            raise BadInput(f"--forwards {most:g}: the first image of a prompt takes {needed}")

    def next_move(self, refinement: Refinement, first: Attempt, tried: set[tuple]) -> Move | None:
        """The next round of a prompt; None, with the reason in `stopped`, where there is none. `tried` gets it."""
        most = self.settings.forwards
        refinement.stopped = finished(refinement, self.settings)
        if refinement.stopped:
            return None
        move = propose(refinement, first, self.settings)
        key = _key(move, _mask(self.policy, refinement, move))
        if key in tried:
            refinement.stopped = "repeat: nothing new to try"
        elif most is not None and refinement.forwards + cost(self.policy, move.attempt, self.settings.steps) > most:
            refinement.stopped = f"budget: {most:g} forwards"
        tried.add(key)
        return None if refinement.stopped else move

    def draw(self, refinements: Sequence[Refinement], moves: Sequence[Move]) -> None:
        bases = []
        for refinement, move in zip(refinements, moves, strict=True):
            mask = _mask(self.policy, refinement, move)
            bases.append(None if mask is None else Base(refinement.rounds[move.parent].latent, mask))
        attempts = [move.attempt for move in moves]
        prompts = [refinement.prompt for refinement in refinements]
        latents, forwards = draw(self.policy, attempts, bases, self.settings.steps, self.batch, self.toward, prompts)
        images = torch.cat([self.policy.decode(part).cpu() for part in latents.split(self.batch)])
        self.judge(refinements, moves, images, latents, forwards)

    def judge(
        self,
        refinements: Sequence[Refinement],
        moves: Sequence[Move],
        images: Float[Tensor, "N 3 H W"],
        latents: Latents,
        forwards: Sequence[float],
    ) -> None:
        scored = score(images, [refinement.prompt for refinement in refinements], {self.name: self.critic})
        names, count = self.critic.names, len(images)
        critiques = scored.critiques.get(self.name, [""] * count)
        requests = scored.requests.get(self.name, [""] * count)
        regions = scored.boxes.get(self.name, [()] * count)
        for i, (refinement, move) in enumerate(zip(refinements, moves, strict=True)):
            new = Round(
                move.attempt, move.parent, move.names, images[i], latents[i].cpu(),
                {component: float(scored.parts[f"{self.name}.{component}"][i]) for component in names},
                critiques[i], requests[i], regions[i], scored.failures.get(i, ""), forwards[i],
            )  # fmt: skip
            refinement.add(new, self.settings.by or names[0])


def finished(refinement: Refinement, settings: Settings) -> str:
    """The reason why a refinement ends, "" if it continues."""
    best = refinement.rounds[refinement.best]
    opinions = [value for value in best.scores.values() if value == value]
    if opinions and min(opinions) >= settings.good:
        return "good"
    if len(refinement.rounds) >= settings.images:
        return f"budget: {settings.images} images"
    if settings.patience is not None and len(refinement.rounds) - 1 - refinement.best >= settings.patience:
        return f"no gain in {settings.patience} rounds"
    return ""


def propose(refinement: Refinement, first: Attempt, settings: Settings) -> Move:
    """The next round, with the moves of the settings that can be made."""
    best, number = refinement.rounds[refinement.best], len(refinement.rounds)
    attempt, parent, names = replace(best.attempt or first, start=1.0), -1, []
    for name in settings.moves:
        made = True
        if name == "request" and best.request and best.request != attempt.request:
            attempt = replace(attempt, request=best.request)
        elif name == "seed":
            attempt = replace(attempt, seed=seed_of("refine", settings.seed, refinement.prompt.id, number))
        elif name == "guidance":
            attempt = replace(attempt, guidance=max(1.0, settings.guidance) + number)
        elif name == "cut":
            attempt, parent = replace(attempt, start=settings.cut), refinement.best
        elif name == "strength":
            attempt = replace(attempt, strength=settings.strength)
        elif name == "toward":
            attempt = replace(attempt, toward=True)
        elif name in ("region", "keep") and _boxes(best, name):
            parent = refinement.best
        else:
            made = False
        names += [name] if made else []
    return Move(attempt, parent, tuple(names))


def _boxes(image: Round, move: str) -> list[Region]:
    """The regions of an image that are redrawn (region) or preserved (keep)."""
    return [region for region in image.regions if (region.credit < 0 if move == "region" else region.credit >= FULL)]


def _mask(policy: Policy, refinement: Refinement, move: Move) -> Float[Tensor, "h w"] | None:
    """1 where the image of the parent round is redrawn; None for a round that begins from noise."""
    if move.parent < 0:
        return None
    image, latent = refinement.rounds[move.parent], policy.latent_shape[1:]
    mask, size = torch.ones(latent), tuple(image.image.shape[1:])
    if "region" in move.names:
        mask = (box_shares(_boxes(image, "region"), size, latent).amax(0) > 0).float()
    if "keep" in move.names:
        mask = mask * (box_shares(_boxes(image, "keep"), size, latent).amax(0) < 0.5).float()
    return mask


def _key(move: Move, mask: Tensor | None) -> tuple:
    """Equal for rounds that would draw the same image."""
    return move.attempt, move.parent, None if mask is None else tuple(mask.flatten().tolist())
