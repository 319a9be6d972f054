"""Improve images without training: draw, have them criticised, draw again, and keep the one that scores best.

After RationalRewards' generate-critique-refine. Where its script replaces the first image whatever the second is worth,
here the best-scoring one is kept, and every image is scored against the first request, never against the one that
was refined. A critic is any scorer; what it may ask for is named in `MOVES`. Edits are made to the best image so far.

Seeds come from (seed, prompt id, round): batches and interruptions change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import BadInput
from mmalign.flow.sample import seed_of
from mmalign.refine.redraw import Attempt, Base, cost, draw
from mmalign.rewards.judge import score
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
}
FULL = 1 - 1e-6  # credit of a thing with which nothing is wrong


@dataclass(frozen=True)
class Settings:
    """`moves` of `MOVES`. `good`: what every component that applies must reach for an image to be done with. `by`: the
    component that decides between images. `images`, `forwards`, `judgements`: most for one prompt, the first image
    included; what a round will take is known from its moves before it is made. `patience`: rounds without a better
    image before giving up. `cut` in (0, 1); `strength` of the adapter."""

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


@dataclass(frozen=True)
class Round:
    """One image of a prompt: how it was made, from which one before (-1: from noise), what the critic says of it. Raw
    `scores` by component, NaN where it has no opinion; `failure` says why there are none."""

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
class Story:
    """All rounds of a prompt. `best` is the number of the image that scores best, the earliest of equals; `stopped`
    says why there are no more."""

    prompt: Prompt
    rounds: list[Round] = field(default_factory=list)
    best: int = 0
    stopped: str = ""

    @property
    def forwards(self) -> float:
        return sum(own.forwards for own in self.rounds)

    def add(self, new: Round, by: str) -> None:
        self.rounds.append(new)
        value, known = new.scores[by], self.rounds[self.best].scores[by]
        if value > known or (known != known and value == value):
            self.best = len(self.rounds) - 1


def refine(
    policy,
    critic: RewardModel,
    prompts: Sequence[Prompt],
    settings: Settings,
    batch: int = 64,
    images: Float[Tensor, "N 3 H W"] | None = None,
    name: str = "critic",
) -> list[Story]:
    """A story for each prompt; round 0 is drawn, or is one of `images`, which the policy's own autoencoder encodes.
    BadInput where drawing round 0 takes more than `forwards`."""
    stories = [Story(prompt) for prompt in prompts]
    first = [Attempt(p.text, seed_of("refine", settings.seed, p.id), settings.guidance) for p in prompts]
    most = settings.forwards
    if images is None:
        if most is not None and (dearest := max(cost(policy, own, settings.steps) for own in first)) > most:
            raise BadInput(f"--forwards {most:g}: the first image of a prompt takes {dearest}")
        _draw(policy, critic, stories, [(own, -1, ()) for own in first], settings, batch, name)
    else:
        latents = torch.cat([policy.encode_images(part.to(policy.device)) for part in images.split(batch)])
        made = [(None, -1, ())] * len(stories)
        _judge(critic, stories, made, images, latents, [0.0] * len(stories), settings, name)
    tried = [{_key(first[i], -1, None)} for i in range(len(stories))]
    while True:
        active, next_ones = [], []
        for story, own, seen in zip(stories, first, tried, strict=True):
            if story.stopped:
                continue
            story.stopped = finished(story, settings)
            if not story.stopped:
                move = propose(story, own, settings)
                key = _key(*move[:2], _mask(policy, story, move))
                story.stopped = "repeat: nothing new to try" if key in seen else ""
                if most is not None and story.forwards + cost(policy, move[0], settings.steps) > most:
                    story.stopped = story.stopped or f"budget: {most:g} forwards"
                seen.add(key)
            if not story.stopped:
                active.append(story)
                next_ones.append(move)
        if not active:
            return stories
        _draw(policy, critic, active, next_ones, settings, batch, name)


def finished(story: Story, settings: Settings) -> str:
    """Why a story ends, "" if it goes on."""
    best = story.rounds[story.best]
    opinions = [value for value in best.scores.values() if value == value]
    if opinions and min(opinions) >= settings.good:
        return "good"
    if len(story.rounds) >= settings.images:
        return f"budget: {settings.images} images"
    if settings.patience is not None and len(story.rounds) - 1 - story.best >= settings.patience:
        return f"no gain in {settings.patience} rounds"
    return ""


def propose(story: Story, first: Attempt, settings: Settings) -> tuple[Attempt, int, tuple[str, ...]]:
    """The next attempt, the round it begins from (-1: noise alone), and the moves that could be made."""
    best, number, moves = story.rounds[story.best], len(story.rounds), []
    attempt = replace(best.attempt or first)
    attempt = replace(attempt, start=1.0)
    parent = -1
    for move in settings.moves:
        made = True
        if move == "request" and best.request and best.request != attempt.request:
            attempt = replace(attempt, request=best.request)
        elif move == "seed":
            attempt = replace(attempt, seed=seed_of("refine", settings.seed, story.prompt.id, number))
        elif move == "guidance":
            attempt = replace(attempt, guidance=max(1.0, settings.guidance) + number)
        elif move == "cut":
            attempt, parent = replace(attempt, start=settings.cut), story.best
        elif move == "strength":
            attempt = replace(attempt, strength=settings.strength)
        elif move in ("region", "keep") and _boxes(best, move):
            parent = story.best
        else:
            made = False
        moves += [move] if made else []
    return attempt, parent, tuple(moves)


def _boxes(own: Round, move: str) -> list[Region]:
    """Of the image, what is redrawn (region) or kept (keep)."""
    return [region for region in own.regions if (region.credit < 0 if move == "region" else region.credit >= FULL)]


def _mask(policy, story: Story, move: tuple[Attempt, int, tuple[str, ...]]) -> Float[Tensor, "h w"] | None:
    """Where the image of a round is redrawn, None if nothing is taken from it."""
    _, parent, moves = move
    if parent < 0:
        return None
    own, latent = story.rounds[parent], policy.latent_shape[1:]
    mask = torch.ones(latent)
    size = tuple(own.image.shape[1:])
    if "region" in moves:
        mask = (box_shares(_boxes(own, "region"), size, latent).amax(0) > 0).float()
    if "keep" in moves:
        mask = mask * (box_shares(_boxes(own, "keep"), size, latent).amax(0) < 0.5).float()
    return mask


def _key(attempt: Attempt, parent: int, mask: Tensor | None) -> tuple:
    return attempt, parent, None if mask is None else tuple(mask.flatten().tolist())


def _draw(policy, critic, stories: Sequence[Story], made, settings: Settings, batch: int, name: str) -> None:
    bases = []
    for story, move in zip(stories, made, strict=True):
        mask = _mask(policy, story, move)
        bases.append(None if mask is None else Base(story.rounds[move[1]].latent, mask))
    latents, forwards = draw(policy, [own for own, _, _ in made], bases, settings.steps, batch)
    images = torch.cat([policy.decode(part).cpu() for part in latents.split(batch)])
    _judge(critic, stories, made, images, latents, forwards, settings, name)


def _judge(
    critic, stories: Sequence[Story], made, images, latents, forwards: Sequence[float], settings: Settings, name: str
) -> None:
    seen = score(images, [story.prompt for story in stories], {name: critic})
    by = settings.by or critic.names[0]
    for i, (story, (attempt, parent, moves)) in enumerate(zip(stories, made, strict=True)):
        story.add(
            Round(
                attempt, parent, moves, images[i], latents[i].cpu(),
                {component: float(seen.parts[f"{name}.{component}"][i]) for component in critic.names},
                seen.critiques.get(name, [""] * len(images))[i], seen.requests.get(name, [""] * len(images))[i],
                seen.boxes.get(name, [()] * len(images))[i], seen.failures.get(i, ""), forwards[i],
            ),
            by,
        )  # fmt: skip
