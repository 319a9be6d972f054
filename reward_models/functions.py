"""A function as a scorer: what a user writes in a notebook, or names as `my_module:my_function` in a config."""

import hashlib
import inspect
import re
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch

from reward_models import images as pictures, scoring
from reward_models.types import Card, Images, ImageScores, Prompt, Scores

TAKEN = ("images", "prompts")
NAME = re.compile(r"\w[\w-]*")


class FunctionScorer:
    """A scorer that calls `function(images, prompts, **columns)`, which returns a number for each image: higher is
    better, None for no opinion.

    `images` are PIL images, or a tensor `[N, 3, H, W]` float32 in [0, 1] where the function annotates that parameter
    with a tensor type; `prompts` the texts. `columns` are the fields of the prompts' ground truth which the function
    has parameters for (all of them with `**columns`), a list of N values each, None where a prompt has no such field.

        def brightness(images, prompts):
            return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]

        FunctionScorer(brightness)(torch.rand(2, 3, 32, 32), [Prompt("a"), Prompt("b")]).values  # [2, 1]

    What the function raises, and a returned value other than a finite number, is a failure of its image, with the
    reason. ValueError for a function that does not take images and prompts.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function, self.name = function, name or name_of(function)
        if not NAME.fullmatch(self.name):
            raise ValueError(f"reward function {self.name!r}: a name of letters, digits, - and _ is needed")
        if not is_function(function):
            raise ValueError(f"reward function {self.name!r} must take images and prompts, as its first parameters")
        first, _, *rest = inspect.signature(function).parameters.values()
        self.tensors = "Tensor" in str(first.annotation) or "Float[" in str(first.annotation)
        self.all_columns = any(p.kind is p.VAR_KEYWORD for p in rest)
        named = [p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.columns = tuple(p.name for p in named)
        self.required = tuple(p.name for p in named if p.default is p.empty)
        self.names = ("score",)
        self.card = Card(
            self.name, licence="yours", comparable_across_prompts=True, settings={"source": _source_hash(function)}
        )

    def check_columns(self, fields: Iterable[str]) -> None:
        """ValueError for a required column which is none of the `fields` of the prompts."""
        fields = {*fields}
        for name in self.required:
            if name not in fields:
                known = f"they have {', '.join(sorted(fields))}" if fields else "they are texts alone"
                raise ValueError(f"reward function {self.name!r} needs {name!r} of the prompts, and {known}")

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return scoring.each(images, prompts, self.names, self._score)

    def _score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        self.check_columns(field for p in prompts for field in p.wants)
        given = images if self.tensors else pictures.to_pil(images)
        try:
            values = self.function(given, [p.text for p in prompts], **self._columns(prompts))
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}{_line(error, self.function)}") from error
        try:
            values = list(values)
        except TypeError:
            raise ValueError(f"it returned {type(values).__name__}; a list of numbers is needed") from None
        if len(values) != len(prompts):
            raise ValueError(f"it was given {len(prompts)} images, but returned {len(values)} scores")
        return Scores.collect(self.names, [_row(value) for value in values])

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
        fields = dict.fromkeys(field for p in prompts for field in p.wants)
        wanted = [field for field in fields if field not in TAKEN] if self.all_columns else self.columns
        return {name: [p.wants.get(name) for p in prompts] for name in wanted if self.all_columns or name in fields}


def is_function(value: Any) -> bool:
    """Whether it is a function whose first parameters are `images` and `prompts`."""
    if isinstance(value, type) or not callable(value):
        return False
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(positional[:2]) == TAKEN


def name_of(function: Callable[..., Any]) -> str:
    """Its name, or `reward` for one that has none, as a lambda."""
    name = getattr(function, "__name__", type(function).__name__)
    return name if NAME.fullmatch(name) else "reward"


def _row(value: Any) -> ImageScores:
    """The score of one image; None stands for no opinion."""
    if value is None:
        return ImageScores()
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real) and not hasattr(value, "__float__"):
        return ImageScores(failure=f"it returned {str(value)[:60]!r} for the image; a number or None is needed")
    number = float(value)
    if not abs(number) <= torch.finfo(torch.float32).max:
        return ImageScores(failure=f"it returned {number} for the image; a finite number or None is needed")
    return ImageScores({"score": number})


def _line(error: Exception, function: Callable[..., Any]) -> str:
    """Where in the function's own file the error was raised, as words."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    return f" (line {frames[-1].lineno} of {frames[-1].name})" if frames else ""


def _source_hash(function: Callable[..., Any]) -> str:
    """A hash of the function's source, so that cached scores and a resumed run notice a change; of its bytecode where
    it has no source."""
    try:
        text = textwrap.dedent(inspect.getsource(function)).encode()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = code.co_code + repr(code.co_names).encode() if code else repr(type(function)).encode()
    return hashlib.sha256(text).hexdigest()[:16]
