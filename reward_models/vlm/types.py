"""The interface of judges: questions with pictures, and replies."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Picture = Float[Tensor, "3 H W"]
Part = str | Tensor  # text, or a picture


@dataclass(frozen=True, eq=False)
class Question:
    """Text and pictures [3, H, W] in [0, 1], in order; `system` is the system message."""

    parts: tuple[Part, ...]
    system: str = ""

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Reply:
    """The text of a reply. `failure`: the reason if there is no reply. `cut`: the model ran out of tokens."""

    text: str = ""
    failure: str = ""
    cut: bool = False


@runtime_checkable
class Judge(Protocol):
    """A back end. `about` describes the model, for a scorer's card; `usage` counts calls, failed calls, and tokens if
    they are known."""

    about: Mapping[str, Any]
    usage: Counter[str]

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        """A reply to each question, of at most `tokens`. `schema`: the JSON schema of a reply, for back ends that can
        enforce it. A question that fails raises nothing."""
        ...

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        """For each question log p(first answer) - log p(second answer) of the next word, or the reason for a
        failure."""
        ...
