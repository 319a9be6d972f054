"""The image-text model of transformers that reward models are built on, and its features of pictures with their texts:
the last hidden states, of the last token or their mean.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from reward_models import limits
from reward_models.errors import first_problem
from reward_models.training.base import same
from reward_models.vlm import transformers_model as vlm
from reward_models.weights import fingerprint, named

INSTRUCTION = "Rate how well the picture shows this, and how good it looks: {prompt}"


@dataclass(frozen=True)
class Reading:
    """How a picture and its text are read. `instruction`: the text of the user message after the picture, with
    `{prompt}` for the prompt. `pool`: the hidden state of the last token, the one before a reply, or the mean over all
    tokens. `pixels`: the area that pictures are scaled to, 0 for what the processor does; HPSv3 has 200704. `dtype`: of
    the base's weights."""

    instruction: str = INSTRUCTION
    pool: Literal["last", "mean"] = "last"
    pixels: Annotated[int, Ge(0), Le(limits.PIXELS)] = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Base:
    """A loaded model with its processor. ValueError, in one line, if it cannot be loaded or read in this way."""

    def __init__(self, name: str, reading: Reading, device: str):
        if not name:
            raise ValueError("base is needed: the folder or hub id of an image-text model")
        if "{prompt}" not in reading.instruction:
            raise ValueError(f"instruction {reading.instruction[:60]!r} has no {{prompt}} in it")
        self.model, self.processor = vlm.load("base", name, device, reading.dtype)
        if reading.pixels:
            images = self.processor.image_processor
            if not {"shortest_edge", "longest_edge"} <= {key for key, value in dict(images.size).items() if value}:
                raise ValueError(f"pixels: the processor of {named(name)} does not scale pictures to an area")
            images.size = {"shortest_edge": reading.pixels, "longest_edge": reading.pixels}
        self.reading, self.device, self.checkpoint = reading, device, fingerprint(self.model)
        self.size = f"scaled to about {reading.pixels} pixels" if reading.pixels else "the processor's"
        self.settings = asdict(reading)
        self.width = int(self.model.config.get_text_config().hidden_size)

    def features(
        self, pictures: Sequence[Float[Tensor, "3 _ _"]], texts: Sequence[str], exact: bool = False
    ) -> Float[Tensor, "N F"]:
        """The pooled hidden states, float32. What pads a shorter row changes nothing. `exact`: the pictures stay in
        their graph and are not rounded."""
        questions = [self.reading.instruction.replace("{prompt}", text) for text in texts]
        pairs = [*zip(pictures, questions, strict=True)]
        inputs = vlm.inputs_of(self.processor, pairs, self.device, exact=exact)
        hidden = self.model.base_model(**inputs).last_hidden_state.float()
        if self.reading.pool == "last":
            return hidden[:, -1]  # rows are padded on the left
        mask = inputs["attention_mask"][..., None].to(hidden)
        return (hidden * mask).sum(1) / mask.sum(1)


def reading_of(settings: Reading) -> Reading:
    """Only what `Reading` has of the settings of a method."""
    return Reading(**{field.name: getattr(settings, field.name) for field in fields(Reading)})


def described(name: str, base: Base) -> dict[str, Any]:
    """What a folder's config says of the base model and of how it is read."""
    source = {"model": name, "pretrained": "", "checkpoint": base.checkpoint}
    return {"base": source, "licence": "the model's own", "reading": asdict(base.reading)}


def reopened(config: Mapping[str, Any], given: str | None, device: str) -> Base:
    """The base model of a config, by the user's name for it, because a file may not choose what is opened. ValueError
    if there is none, or its weights have another hash."""
    try:
        reading = TypeAdapter(Reading).validate_json(json.dumps(config.get("reading")), strict=True)
    except ValidationError as error:
        raise ValueError(f"config.json: reading: {first_problem(error.errors())}") from None
    source = config["base"]
    if not given:
        raise ValueError(f"the base is {named(source['model'])[:100]!r}; give its folder or hub id as `base`")
    base = Base(given, reading, device)
    same(source["checkpoint"], base.checkpoint, named(given))
    return base
