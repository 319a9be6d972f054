"""What passes between `remote` and `serve`: JSON with images as base64 PNG, and what each field means. Never pickle.

A score is null where there is none: the scorer has no opinion, or failed, and `failures` says why.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

Scorer = Annotated[str, Field(description="a scorer's name")]


class Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Prompt(Wire):
    """`reward_models.Prompt`. Images of equal `id` and text are siblings."""

    text: str
    wants: dict[str, JsonValue] = Field({}, description="ground truth for scorers that can check one")
    id: int = Field(0, ge=-(2**63), lt=2**63)

    @model_validator(mode="after")
    def has_utf8(self):
        self.model_dump_json()  # ValueError for half a surrogate pair, which a Python string can hold
        return self


class Ask(Wire):
    """Images to score, each with its prompt. Sizes may differ."""

    images: list[str] = Field(description="PNG files, base64")
    prompts: list[Prompt] = Field(description="one per image")
    scorers: list[Scorer] | None = Field(None, description="which to ask; all if null")


class Answer(Wire):
    """What was found, by image in the order asked."""

    names: dict[Scorer, list[str]] = Field(description="the components of each scorer asked")
    scores: list[dict[str, float | None]] = Field(description="by `scorer.component`")
    failures: list[dict[Scorer, str]] = Field(description="why a scorer, or `image` itself, failed")
    critiques: list[dict[Scorer, str]] = Field(description="in words, where a scorer has any")


class Card(Wire):
    """`reward_models.Card`: what a score means and where it comes from."""

    scorer: str
    model: str
    licence: str
    low: float | None = Field(description="least score, null without a bound")
    high: float | None = Field(description="greatest score, null without a bound")
    higher: str = Field(description="what a higher score is: `better`, or `more` for an alarm that is no reward")
    compares: bool = Field(description="whether scores of different prompts may be compared")
    sees_prompt: bool
    size: str = Field(description="what becomes of an image's size")
    checkpoint: str = Field(description="SHA-256 of the weights")
    groupwise: bool = Field(description="whether the images of one prompt are shown together")
    places: bool = Field(description="whether it says where; maps are not sent")
    settings: dict[str, JsonValue]


class About(Wire):
    """A scorer."""

    names: list[str] = Field(description="components")
    version: str = Field(description="changes whenever a score might")
    card: Card


class Limits(Wire):
    """What the service takes."""

    images: int = Field(description="images in a request, and waiting in all")
    body: int = Field(description="bytes of a request")
    pixels: int = Field(description="pixels of an image")


class Info(Wire):
    scorers: dict[Scorer, About]
    limits: Limits


class Health(Wire):
    ok: bool = Field(description="false once the scoring thread is dead")
    waiting: int = Field(description="images in the queue")


class Problem(Wire):
    """Why a request was refused, in one line."""

    detail: str
