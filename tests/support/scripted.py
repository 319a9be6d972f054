"""A judge with scripted replies, in place of a model."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reward_models import load
from reward_models.vlm.types import Question, Reply

ELSEWHERE = {"model": "m", "url": "http://127.0.0.1:9/v1"}  # never asked


class Scripted:
    """`reply` gets the question and returns the reply; a ValueError of it is the failure."""

    def __init__(self, reply: Callable[[Question], str | Reply], odds: Callable[[Question], float | str] | None = None):
        self.reply, self.likely, self.about = reply, odds, {"model": "scripted"}
        self.questions: list[Question] = []
        self.schemas: list[Any] = []
        self.usage: Counter[str] = Counter()

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        self.usage["calls"] += len(questions)
        self.questions += questions
        self.schemas.append(schema)
        return [self._one(question) for question in questions]

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        self.questions += questions
        return [self.likely(question) for question in questions]

    def _one(self, question: Question) -> Reply:
        try:
            reply = self.reply(question)
        except ValueError as error:
            return Reply(failure=str(error))
        return reply if isinstance(reply, Reply) else Reply(reply)


def judged(scorer: str, reply=None, odds=None, **settings):
    """The scorer with a scripted judge, and the judge."""
    made = load(scorer, **ELSEWHERE | settings)
    made.judge = Scripted(reply, odds)
    return made, made.judge
