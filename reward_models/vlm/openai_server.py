"""Client for a model on a server that speaks OpenAI's chat protocol: vLLM, SGLang, `transformers serve`, or a hosted
one.

Pictures are sent as PNG. The instructions come before the picture and the request, so that a server with a prefix cache
processes them once. An error is the failure of its question, with the reason: nothing is raised, and nothing becomes a
score. The key is removed from everything that the server returns.
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

BUSY = frozenset({408, 409, 429, *range(501, 600)})  # statuses to retry; 500 too, unless a schema was sent
SETTINGS = {"key": None, "concurrency": 16, "timeout": 120, "retries": 3, "temperature": 0.0, "max_calls": None}
SETTINGS |= {"structured": True, "top": 20, "extra": None}


@dataclass(frozen=True)
class Supported:
    """What a server supports: its name for the limit on reply tokens, a temperature, a schema."""

    bound: str = "max_tokens"
    temperature: bool = True
    schema: bool = True

    def less(self, status: int, body: str, schema: bool) -> "Supported | None":
        """What to try after the server rejected a question, with or without a `schema`; None if nothing is left."""
        if status in (400, 422) and self.bound == "max_tokens" and "max_tokens" in body:
            return replace(self, bound="max_completion_tokens")
        if status in (400, 422) and self.temperature and "temperature" in body:
            return replace(self, temperature=False)
        if status in (400, 422, 500) and self.schema and schema:
            return replace(self, schema=False)
        return None


@dataclass
class Server:
    """The back end. `concurrency`: simultaneous requests. `timeout`: seconds for a request and its complete answer.
    `retries`: after a time-out, a lost connection, 429 (after its Retry-After) or 5xx. `max_calls`: the total number of
    questions; further ones fail. `structured`: enforce the JSON schema of replies. `top`: the number of top next words
    that the server lists. `extra`: further, server-specific fields of the request. `supported`: what the server has
    accepted so far; a rejected field is left out from then on, if the server answers without it."""

    link: Link
    model: str
    about: Mapping[str, Any]
    concurrency: int
    temperature: int | float
    max_calls: int | None
    structured: bool
    top: int
    extra: Mapping[str, Any] | None
    supported: Supported = Supported()
    usage: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, scorer: str, model: str, url: str, settings: Mapping[str, Any]) -> "Server":
        """The server at `url`, e.g. http://127.0.0.1:8000/v1. `key`: by default the environment variable
        OPENAI_API_KEY. ValueError for an unknown or invalid setting."""
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise ValueError(
                f"{scorer}: no setting {unknown[0]!r} for a model on a server; it takes {', '.join(SETTINGS)}"
            )
        chosen = SETTINGS | dict(settings)
        if (
            chosen["concurrency"] < 1
            or chosen["timeout"] <= 0
            or chosen["retries"] < 0
            or (chosen["max_calls"] or 1) < 1
        ):
            raise ValueError(f"{scorer}: concurrency, timeout and max_calls must be above 0, retries at least 0")
        if not str(url).startswith(("http://", "https://")):
            raise ValueError(f"{scorer}: url {url!r} must begin with http:// or https://")
        try:
            key = chosen["key"] or os.environ.get("OPENAI_API_KEY") or ""
            link = Link(url.rstrip("/"), str(key), chosen["timeout"], chosen["retries"], who="the server")
        except ValueError as error:
            raise ValueError(f"{scorer}: {error}") from None
        about = {"model": model, "temperature": chosen["temperature"], "extra": chosen["extra"]}
        return cls(
            link, model, about, chosen["concurrency"], chosen["temperature"], chosen["max_calls"], chosen["structured"],
            chosen["top"], chosen["extra"],
        )  # fmt: skip

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        return self._each(questions, lambda question: self._reply(question, tokens, schema), _failed)

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        return self._each(questions, lambda question: self._odds(question, answers), str)

    def _each(self, questions: Sequence[Question], answer: Callable, failed: Callable[[str], Any]) -> list:
        def one(question: Question):
            with self.lock:
                if self.max_calls is not None and self.usage["calls"] >= self.max_calls:
                    self.usage["refused"] += 1
                    return failed(f"the budget of {self.max_calls} calls is spent")
                self.usage["calls"] += 1
            try:
                return answer(question)
            except Exception as error:  # a bad answer fails this question only
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
        return Reply(sensible(answer, text_of), cut=choice.get("finish_reason") == "length")

    def _odds(self, question: Question, answers: tuple[str, str]) -> float:
        answer = self._answer(question, 1, {"logprobs": True, "top_logprobs": self.top})
        return sensible(answer, lambda value: log_odds(value, answers))

    def _answer(
        self, question: Question, tokens: int, more: Mapping[str, Any], schema: Mapping[str, Any] | None = None
    ) -> Any:
        """The answer's JSON, to a request with all fields that the server supports."""
        before = supported = self.supported
        fields = {"model": self.model, "messages": messages(question), **more}
        while True:
            request = fields | {supported.bound: tokens}
            request |= {"temperature": self.temperature} if supported.temperature else {}
            with_schema = schema is not None and supported.schema
            if with_schema:
                form = {"name": "reply", "schema": schema, "strict": True}
                request |= {"response_format": {"type": "json_schema", "json_schema": form}}
            body = json.dumps(request | dict(self.extra or {})).encode()
            busy = BUSY if with_schema else BUSY | {500}
            try:
                answer = self.link.post("/chat/completions", body, lambda value: value, busy)
                break
            except Fault as fault:
                supported = supported.less(fault.status, fault.body, with_schema)
                if supported is None:
                    raise
        usage = answer.get("usage") if isinstance(answer, dict) else None
        with self.lock:
            if supported != before:
                self.supported = supported
            for name, key in (("prompt_tokens", "prompt_tokens"), ("reply_tokens", "completion_tokens")):
                count = usage.get(key) if isinstance(usage, dict) else 0
                self.usage[name] += count if isinstance(count, int) and count > 0 else 0
        if before.temperature and not supported.temperature:
            warnings.warn(f"{self.model}: the server rejects a temperature; it samples with its own", stacklevel=2)
        return answer


def _failed(reason: str) -> Reply:
    return Reply(failure=reason)


def sensible(answer: Any, read: Callable[[Any], Any]) -> Any:
    """`read(answer)`. ValueError with the beginning of the answer if it raises."""
    try:
        return read(answer)
    except ValueError as error:
        reason = str(error)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"the answer makes no sense: {error!r:.100}"
    raise ValueError(f"{reason}; status 200, the answer begins {json.dumps(answer, ensure_ascii=False)[:200]!r}")


def choice_of(answer: Any) -> Mapping[str, Any]:
    """The first choice of a chat completion. ValueError if it is missing or was filtered."""
    if not isinstance(answer, dict) or not answer.get("choices"):
        raise ValueError("the answer contains no reply (no choices)")
    choice = answer["choices"][0]
    if choice.get("finish_reason") == "content_filter":
        raise ValueError("the server's filter withheld the reply")
    if choice.get("message") is None:
        raise ValueError("the answer contains no reply (no message)")
    return choice


def text_of(answer: Any) -> str:
    """The text of a chat completion's first choice, without its reasoning. ValueError if it is missing."""
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
        cause = " because it ran out of tokens" if choice.get("finish_reason") == "length" else ""
        raise ValueError(f"the reply contains only reasoning{cause}")
    raise ValueError("the reply is empty")


def _part(part: Any) -> str:
    """The text of one part of a reply; empty for reasoning."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "refusal":
        raise ValueError(f"the model refused: {part.get('refusal')}")
    if kind in ("thinking", "reasoning", "redacted_thinking"):
        return ""
    raise ValueError(f"the reply is not text but {part!r:.40}")


def log_odds(answer: Any, answers: tuple[str, str]) -> float:
    """log p(first answer) - log p(second) of the first word. ValueError if the server does not list both."""
    content = (choice_of(answer).get("logprobs") or {}).get("content")
    listed = content[0]["top_logprobs"] if content else []
    if not listed:
        raise ValueError("the server gives no token probabilities (logprobs)")
    probabilities = []
    for word in answers:
        forms = {form.strip() for form in spellings(word)}
        probabilities.append(sum(math.exp(entry["logprob"]) for entry in listed if entry["token"].strip() in forms))
    if not all(probabilities):
        raise ValueError(f"not both of {answers[0]!r} and {answers[1]!r} are among the top {len(listed)} words")
    return math.log(probabilities[0]) - math.log(probabilities[1])


def messages(question: Question) -> list[dict[str, Any]]:
    """The question as messages of OpenAI's protocol."""
    system = [{"role": "system", "content": question.system}] if question.system else []
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(to_pil(part[None])[0])}"}}
        for part in question.parts
    ]
    return [*system, {"role": "user", "content": content}]
