"""What a judge takes and gives: questions with pictures, and replies."""

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
    """Text and pictures [3, H, W] in [0, 1], in order; `system` is what the model is told beforehand."""

    parts: tuple[Part, ...]
    system: str = ""

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Reply:
    """What came back. `failure` says why there is none; `cut`: the model ran out of tokens."""

    text: str = ""
    failure: str = ""
    cut: bool = False


@runtime_checkable
class Judge(Protocol):
    """A back end. `about` names what answers, for a scorer's card; `usage` counts calls, failed ones, and tokens where
    they are known."""

    about: Mapping[str, Any]
    usage: Counter[str]

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        """A reply to each, of at most `tokens`. `schema`: the JSON schema of a reply, where the model can be held to
        one. Nothing is raised for a question that fails."""
        ...

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        """log p(first answer) - log p(second) of the next word, or why there is none."""
        ...
