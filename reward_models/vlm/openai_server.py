"""A model behind a server that speaks OpenAI's chat protocol: vLLM, SGLang, `transformers serve`, or a hosted one.

Pictures travel as PNG, the rules before the picture and the request, so that a server that caches prefixes reads the
rules once. Whatever goes wrong with a question is that question's failure, with the reason: nothing is raised, and
nothing becomes a score. The key is struck out of whatever the server writes.
"""

import json
import math
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from reward_models.images import png, to_pil
from reward_models.service.http import Fault, Link
from reward_models.vlm.transformers_model import spellings
from reward_models.vlm.types import Question, Reply

BUSY = frozenset({408, 409, 429, *range(501, 600)})  # statuses worth another try; 500 is too, but for a schema
SETTINGS = {"key": None, "concurrency": 16, "timeout": 120, "retries": 3, "temperature": 0.0, "max_calls": None}
SETTINGS |= {"structured": True, "top": 20, "extra": None}


@dataclass(frozen=True)
class Taken:
    """What a server takes: the name it has for the bound on a reply's tokens, whether a temperature, a schema."""

    bound: str = "max_tokens"
    temperature: bool = True
    schema: bool = True

    def less(self, status: int, body: str, schema: bool) -> "Taken | None":
        """What to try after a refusal, of a question with or without a `schema`; None where nothing is left."""
        if status in (400, 422) and self.bound == "max_tokens" and "max_tokens" in body:
            return replace(self, bound="max_completion_tokens")
        if status in (400, 422) and self.temperature and "temperature" in body:
            return replace(self, temperature=False)
        if status in (400, 422, 500) and self.schema and schema:
            return replace(self, schema=False)
        return None


@dataclass
class Server:
    """The back end. `concurrency`: requests under way at once. `timeout`: seconds for one and its whole answer,
    `retries`: further tries after a time-out, a lost connection, 429 (after what its Retry-After says) or 5xx.
    `max_calls`: questions in all; those beyond fail. `structured`: hold replies to a JSON schema. `top`: how many of
    the likeliest next words the server lists. `extra`: further fields of the request, the server's own. `taken`: what
    the server was found to take; what it refuses is left out from then on, if it answers without."""

    link: Link
    model: str
    about: Mapping[str, Any]
    concurrency: int
    temperature: int | float
    max_calls: int | None
    structured: bool
    top: int
    extra: Mapping[str, Any] | None
    taken: Taken = Taken()
    usage: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, scorer: str, model: str, url: str, settings: Mapping[str, Any]) -> "Server":
        """The server at `url`, e.g. http://127.0.0.1:8000/v1. `key`: by default the environment variable
        OPENAI_API_KEY. ValueError for a setting that is not there or makes no sense."""
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise ValueError(
                f"{scorer}: no setting {unknown[0]!r} for a model on a server; it takes {', '.join(SETTINGS)}"
            )
        own = SETTINGS | dict(settings)
        if own["concurrency"] < 1 or own["timeout"] <= 0 or own["retries"] < 0 or (own["max_calls"] or 1) < 1:
            raise ValueError(f"{scorer}: concurrency, timeout and max_calls are above 0, retries not below")
        if not str(url).startswith(("http://", "https://")):
            raise ValueError(f"{scorer}: url {url!r} must begin with http:// or https://")
        try:
            key = own["key"] or os.environ.get("OPENAI_API_KEY") or ""
            link = Link(url.rstrip("/"), str(key), own["timeout"], own["retries"], who="the server")
        except ValueError as error:
            raise ValueError(f"{scorer}: {error}") from None
        about = {"model": model, "temperature": own["temperature"], "extra": own["extra"]}
        return cls(
            link, model, about, own["concurrency"], own["temperature"], own["max_calls"], own["structured"],
            own["top"], own["extra"],
        )  # fmt: skip

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        return self._each(questions, lambda own: self._reply(own, tokens, schema), lambda why: Reply(failure=why))

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        return self._each(questions, lambda own: self._odds(own, answers), str)

    def _each(self, questions: Sequence[Question], answer: Callable, failed: Callable[[str], Any]) -> list:
        def one(question: Question):
            with self.lock:
                if self.max_calls is not None and self.usage["calls"] >= self.max_calls:
                    self.usage["refused"] += 1
                    return failed(f"the budget of {self.max_calls} calls is spent")
                self.usage["calls"] += 1
            try:
                return answer(question)
            except Exception as error:  # whatever a server sends is this question's failure, not the others'
                with self.lock:
                    self.usage["failed"] += 1
                status = getattr(error, "status", 0)
                hint = f" (perhaps it is {self.link.url}/v1)" if status in (404, 405) and not self._versioned() else ""
                return failed(f"{self.link.url}: {' '.join(str(error).split()) or type(error).__name__}{hint}")

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(one, questions))

    def _versioned(self) -> bool:
        return self.link.url.endswith("/v1")

    def _reply(self, question: Question, tokens: int, schema: Mapping[str, Any] | None) -> Reply:
        answer = self._answer(question, tokens, {}, schema if self.structured else None)
        choice = sensible(answer, choice_of)
        return Reply(sensible(answer, written), cut=choice.get("finish_reason") == "length")

    def _odds(self, question: Question, answers: tuple[str, str]) -> float:
        answer = self._answer(question, 1, {"logprobs": True, "top_logprobs": self.top})
        return sensible(answer, lambda own: log_odds(own, answers))

    def _answer(
        self, question: Question, tokens: int, more: Mapping[str, Any], schema: Mapping[str, Any] | None = None
    ) -> Any:
        """The answer's JSON, to the most of what is asked that the server takes."""
        begun = taken = self.taken
        asked = {"model": self.model, "messages": messages(question), **more}
        while True:
            whole = asked | {taken.bound: tokens} | ({"temperature": self.temperature} if taken.temperature else {})
            held = schema is not None and taken.schema
            if held:
                form = {"name": "reply", "schema": schema, "strict": True}
                whole |= {"response_format": {"type": "json_schema", "json_schema": form}}
            body, busy = json.dumps(whole | dict(self.extra or {})).encode(), BUSY if held else BUSY | {500}
            try:
                answer = self.link.post("/chat/completions", body, lambda found: found, busy)
                break
            except Fault as fault:
                taken = taken.less(fault.status, fault.body, held)
                if taken is None:
                    raise
        usage = answer.get("usage") if isinstance(answer, dict) else None
        with self.lock:
            if taken != begun:
                self.taken = taken
            for name, place in (("prompt_tokens", "prompt_tokens"), ("reply_tokens", "completion_tokens")):
                count = usage.get(place) if isinstance(usage, dict) else 0
                self.usage[name] += count if isinstance(count, int) and count > 0 else 0
        if begun.temperature and not taken.temperature:
            warnings.warn(f"{self.model}: the server takes no temperature; replies are drawn at its own", stacklevel=2)
        return answer


def sensible(answer: Any, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of an answer. ValueError that shows its beginning, where it raises."""
    try:
        return read(answer)
    except ValueError as error:
        why = str(error)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = f"the answer makes no sense: {error!r:.100}"
    raise ValueError(f"{why}; status 200, the answer begins {json.dumps(answer, ensure_ascii=False)[:200]!r}")


def choice_of(answer: Any) -> Mapping[str, Any]:
    """The first choice of a chat completion. ValueError if there is none, or it was withheld."""
    if not isinstance(answer, dict) or not answer.get("choices"):
        raise ValueError("the answer holds no reply (no choices)")
    choice = answer["choices"][0]
    if choice.get("finish_reason") == "content_filter":
        raise ValueError("the server's filter withheld the reply")
    if choice.get("message") is None:
        raise ValueError("the answer holds no reply (no message)")
    return choice


def written(answer: Any) -> str:
    """The text of a chat completion's first choice, without its reasoning. ValueError if there is none."""
    choice = choice_of(answer)
    message = choice["message"]
    content = message.get("content")
    parts = content if isinstance(content, list) else [] if content is None else [content]
    text = "".join(map(_part, parts))
    if text:
        return text
    if refusal := message.get("refusal"):
        raise ValueError(f"the model refused: {refusal}")
    if any(parts) or message.get("reasoning_content") or message.get("reasoning"):
        short = ", for it ran out of tokens" if choice.get("finish_reason") == "length" else ""
        raise ValueError(f"the reply holds reasoning alone{short}")
    raise ValueError("the reply is empty")


def _part(part: Any) -> str:
    """The text of one part of a reply; none of reasoning."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "refusal":
        raise ValueError(f"the model refused: {part.get('refusal')}")
    if kind in ("thinking", "reasoning", "redacted_thinking"):
        return ""
    raise ValueError(f"the reply is no text but {part!r:.40}")


def log_odds(answer: Any, answers: tuple[str, str]) -> float:
    """log p(first answer) - log p(second) of the first word. ValueError where the server does not list both."""
    content = (choice_of(answer).get("logprobs") or {}).get("content")
    listed = content[0]["top_logprobs"] if content else []
    if not listed:
        raise ValueError("the server gives no probabilities of words (logprobs)")
    masses = [
        sum(math.exp(own["logprob"]) for own in listed if own["token"].strip() in {s.strip() for s in spellings(word)})
        for word in answers
    ]
    if not all(masses):
        raise ValueError(f"not both of {answers[0]!r} and {answers[1]!r} are among the {len(listed)} likeliest words")
    return math.log(masses[0]) - math.log(masses[1])


def messages(question: Question) -> list[dict[str, Any]]:
    """The question in OpenAI's form."""
    told = [{"role": "system", "content": question.system}] if question.system else []
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(to_pil(part[None])[0])}"}}
        for part in question.parts
    ]
    return [*told, {"role": "user", "content": content}]
