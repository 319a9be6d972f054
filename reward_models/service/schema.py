"""The JSON schema between the `remote` client and the reward service; images are base64 PNG. Never pickle.

A score is null if the scorer has no opinion, or failed; then `failures` has the reason.
"""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, model_validator

from reward_models import limits

Grid = list[list[float | None]]
Scorer = Annotated[str, Field(description="a scorer's name", max_length=limits.NAMES)]


class Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Prompt(Wire):
    """`reward_models.Prompt`. Images of equal `id` and text are siblings."""

    text: str = Field(max_length=limits.PROMPT)
    wants: dict[str, JsonValue] = Field(
        {},
        description=f"ground truth for scorers that can check it; at most {limits.WANTS} bytes of JSON, nested "
        f"at most {limits.DEPTH} deep",
    )
    id: int = Field(0, ge=-(2**63), lt=2**63)

    @model_validator(mode="after")
    def is_bounded(self):
        if deeper(self.wants, limits.DEPTH):
            raise ValueError(f"wants are nested deeper than {limits.DEPTH}")
        self.text.encode()  # ValueError for a lone surrogate
        size = len(json.dumps(self.wants, ensure_ascii=False).encode())
        if size > limits.WANTS:
            raise ValueError(f"wants take {size} bytes of JSON, more than the {limits.WANTS} allowed")
        return self


def deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (most == 0 or any(deeper(part, most - 1) for part in inner))


class Ask(Wire):
    """Images to score, each with its prompt. Sizes may differ."""

    images: Annotated[list[str], FailFast()] = Field(description="PNG files, base64")
    prompts: Annotated[list[Prompt], FailFast()] = Field(description="one per image")
    scorers: list[Scorer] | None = Field(None, description="the scorers to run; all if null", max_length=limits.NAMES)
    details: bool = Field(False, description="whether the answer has the `details` of each image")


class Region(Wire):
    """`reward_models.regions.Region`."""

    box: list[float] = Field(description="left, top, right, bottom in pixels", min_length=4, max_length=4)
    credit: float = Field(ge=-1, le=1)
    label: str = ""
    reason: str = ""


class Details(Wire):
    """What a scorer says of an image besides its scores."""

    request: str = Field("", description="a revised request that might give a better image")
    reply: str = Field("", description="the raw text of a judge that writes")
    map: Grid | None = Field(None, description="rows of a grid over the image, in [-1, 1], null for no opinion")
    boxes: list[Region] = Field([], description="what the map was painted from")


class Answer(Wire):
    """The results, by image in the order of the request."""

    names: dict[Scorer, list[str]] = Field(description="the components of each requested scorer")
    scores: list[dict[str, float | None]] = Field(description="by `scorer.component`")
    failures: list[dict[Scorer, str]] = Field(description="the reason why a scorer, or the `image` itself, failed")
    critiques: list[dict[Scorer, str]] = Field(description="a sentence from each scorer that writes one")
    details: list[dict[Scorer, Details]] = Field([], description="if the request asks for them")


class Card(Wire):
    """`reward_models.Card`: what a score means and where it comes from."""

    scorer: str
    model: str
    licence: str
    low: float | None = Field(description="least score, null without a bound")
    high: float | None = Field(description="greatest score, null without a bound")
    higher: str = Field(description="what higher means: `better`, or `more` for a statistic that is not a reward")
    comparable_across_prompts: bool = Field(description="whether scores of different prompts may be compared")
    sees_prompt: bool
    size: str = Field(description="how an image is resized")
    checkpoint: str = Field(description="SHA-256 of the weights")
    groupwise: bool = Field(description="whether the images of one prompt must be in one call")
    has_map: bool = Field(description="whether it also scores regions")
    settings: dict[str, JsonValue]


class About(Wire):
    """A scorer."""

    names: list[str] = Field(description="components")
    version: str = Field(description="changes with the weights and settings")
    card: Card


class Limits(Wire):
    """The limits of the service."""

    images: int = Field(description="images in a request, and in the queue")
    body: int = Field(description="bytes of a request")
    pixels: int = Field(description="pixels of an image")
    together: int = Field(limits.TOGETHER, description="pixels of the images of a request")


class Info(Wire):
    scorers: dict[Scorer, About]
    limits: Limits
    details: bool = Field(False, description="whether a request may ask for `details`")


class Health(Wire):
    ok: bool = Field(description="false once the scoring thread is dead")
    waiting: int = Field(description="images in the queue")


class Problem(Wire):
    """The reason why a request was rejected, in one line."""

    detail: str
