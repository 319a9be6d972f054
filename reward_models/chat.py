"""A model behind a server that speaks OpenAI's chat protocol: vLLM, SGLang, `transformers serve`, or a hosted one.

Pictures travel as PNG, the rules before the picture and the request, so that a server that caches prefixes reads the
rules once. Whatever goes wrong with a question is that question's failure, with the reason: nothing is raised, and
nothing becomes a score.
"""

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any

from reward_models.ask import Question, Reply
from reward_models.images import png, to_pil
from reward_models.vlm import spellings

NO_KEY = "no-key"  # the client wants some
SETTINGS = {"key": None, "concurrency": 16, "timeout": 120, "retries": 3, "temperature": 0.0, "max_calls": None}
SETTINGS |= {"structured": True, "top": 20, "extra": None}


@dataclass
class Server:
    """The back end. `concurrency`: requests under way at once. `timeout`: seconds for one, `retries`: further tries
    after a time-out, a lost connection, 429 (after what its Retry-After says) or 5xx. `max_calls`: questions in all;
    those beyond fail. `structured`: hold replies to a JSON schema, for as long as the server takes one. `top`: how many
    of the likeliest next words the server lists. `extra`: further fields of the request, the server's own."""

    client: Any
    model: str
    about: Mapping[str, Any]
    concurrency: int
    temperature: int | float
    max_calls: int | None
    structured: bool
    top: int
    extra: Mapping[str, Any] | None
    spent: Counter[str] = field(default_factory=Counter)
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
        if "@" in url:
            raise ValueError(f"{scorer}: a URL with a password in it would be told to others; give a key instead")
        try:
            from openai import OpenAI
        except ModuleNotFoundError:
            raise ValueError(f"{scorer}: judges on a server need the package openai; install mmalign[judges]") from None
        key = own["key"] or os.environ.get("OPENAI_API_KEY") or NO_KEY
        client = OpenAI(base_url=url, api_key=key, timeout=float(own["timeout"]), max_retries=own["retries"])
        about = {"model": model, "temperature": own["temperature"], "extra": own["extra"]}
        return cls(
            client, model, about, own["concurrency"], own["temperature"], own["max_calls"], own["structured"],
            own["top"], own["extra"],
        )  # fmt: skip

    def ask(self, questions: Sequence[Question], tokens: int, schema: Mapping[str, Any] | None = None) -> list[Reply]:
        return self._each(questions, lambda own: self._reply(own, tokens, schema), lambda why: Reply(failure=why))

    def odds(self, questions: Sequence[Question], answers: tuple[str, str]) -> list[float | str]:
        return self._each(questions, lambda own: self._odds(own, answers), str)

    def _each(self, questions: Sequence[Question], answer: Callable, failed: Callable[[str], Any]) -> list:
        def one(question: Question):
            with self.lock:
                if self.max_calls is not None and self.spent["calls"] >= self.max_calls:
                    self.spent["refused"] += 1
                    return failed(f"the budget of {self.max_calls} calls is spent")
                self.spent["calls"] += 1
            try:
                return answer(question)
            except Exception as error:  # whatever a server sends is this question's failure, not the others'
                with self.lock:
                    self.spent["failed"] += 1
                return failed(_reason(error, self.client.api_key))

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(one, questions))

    def _reply(self, question: Question, tokens: int, schema: Mapping[str, Any] | None) -> Reply:
        from openai import BadRequestError, UnprocessableEntityError

        held = {}
        if schema is not None and self.structured:
            form = {"name": "reply", "schema": schema, "strict": True}
            held = {"response_format": {"type": "json_schema", "json_schema": form}}
        try:
            choice = self._choice(question, max_tokens=tokens, **held)
        except (BadRequestError, UnprocessableEntityError):
            if not held:
                raise
            choice = self._choice(question, max_tokens=tokens)  # if this fails too, the schema was not to blame
            self.structured = False
        text = choice.message.content
        if not text:
            refusal = getattr(choice.message, "refusal", None)
            raise ValueError(f"the model refused: {refusal}" if refusal else "the reply is empty")
        if not isinstance(text, str):
            raise ValueError(f"the reply is no text but {text!r:.40}")
        return Reply(text, cut=choice.finish_reason == "length")

    def _odds(self, question: Question, answers: tuple[str, str]) -> float:
        choice = self._choice(question, max_tokens=1, logprobs=True, top_logprobs=self.top)
        listed = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else []
        if not listed:
            raise ValueError("the server gives no probabilities of words (logprobs)")
        masses = [
            sum(math.exp(own.logprob) for own in listed if own.token.strip() in {s.strip() for s in spellings(word)})
            for word in answers
        ]
        if not all(masses):
            raise ValueError(
                f"not both of {answers[0]!r} and {answers[1]!r} are among the {len(listed)} likeliest words"
            )
        return math.log(masses[0]) - math.log(masses[1])

    def _choice(self, question: Question, **settings: Any) -> Any:
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=messages(question),
            temperature=self.temperature,
            extra_body=self.extra,
            **settings,
        )
        usage = getattr(answer, "usage", None)
        with self.lock:
            self.spent["prompt_tokens"] += getattr(usage, "prompt_tokens", 0) or 0
            self.spent["reply_tokens"] += getattr(usage, "completion_tokens", 0) or 0
        if not getattr(answer, "choices", None):
            raise ValueError("the answer holds no reply (no choices)")
        choice = answer.choices[0]
        if choice.finish_reason == "content_filter":
            raise ValueError("the server's filter withheld the reply")
        if choice.message is None:
            raise ValueError("the answer holds no reply (no message)")
        return choice


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


def _reason(error: Exception, key: str) -> str:
    """One line without the key, which some servers send back; the client's own messages hold whole bodies."""
    status = getattr(error, "status_code", None)
    text = " ".join(str(error).replace(key, "...").split())[:300] or type(error).__name__
    if status is not None:
        return f"the server answered {status}: {text}"
    kind = {"APITimeoutError": "the server did not answer in time", "APIConnectionError": "no answer from the server"}
    if isinstance(error, ValueError) and not isinstance(error, JSONDecodeError):
        return text
    return kind.get(type(error).__name__, f"the answer makes no sense: {text}")
