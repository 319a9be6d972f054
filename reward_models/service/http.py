"""An HTTP client with one deadline per request, bounded answers, retries, a circuit breaker, and secrets removed from
answers, for services that may be slow, busy, broken or hostile.

Every error is a `Fault` with the reason, never another exception.
"""

import asyncio
import math
import random
import re
import time
from base64 import b64encode
from collections.abc import Callable, Collection
from functools import cache
from threading import Lock, Thread
from typing import Any, TypeVar

from reward_models import limits
from reward_models.files import parsed

try:
    import httpx
except ImportError as error:
    raise ValueError(f"a remote scorer needs {error.name}: pip install 'mmalign[serve]'") from error

BUSY = frozenset({429, 502, 503, 504})  # statuses to retry
PAUSE = 0.25  # seconds before the first retry, doubled for each further one
WORDS = 200  # characters of an answer in a reason
SECRET = 4  # the least length of a secret; removing shorter ones would change ordinary text
Value = TypeVar("Value")
jitter = random.Random()  # separate: waiting must not advance the caller's random numbers
clock = time.monotonic


class Fault(Exception):
    """The reason why there is no usable answer. `pause`: seconds before a retry, None if a retry is useless. `broken`:
    whether the service is at fault, not the request. `status` of the answer, 0 without one, and the beginning of its
    `body`."""

    def __init__(
        self, reason: str, pause: int | float | None = None, broken: bool = True, status: int = 0, body: str = ""
    ):
        super().__init__(reason)
        self.pause, self.broken, self.status, self.body = pause, broken, status, body


class Breaker:
    """A circuit breaker. After `limit` consecutive broken requests, all are rejected for `rest` seconds; then one is
    let through, and the others are rejected until it has ended."""

    def __init__(self, limit: int | float, rest: int | float):
        self.limit, self.rest, self.lock = limit, rest, Lock()
        self.broken, self.until, self.reason = 0, -math.inf, ""

    def __enter__(self) -> None:
        with self.lock:
            if self.broken >= self.limit:
                if clock() < self.until:
                    raise Fault(f"not sent, because {self.broken} requests in a row failed; the last: {self.reason}")
                self.until = math.inf

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        with self.lock:
            if error is None or (isinstance(error, Fault) and not error.broken):
                self.broken = 0
            else:
                self.broken += 1
                self.until, self.reason = clock() + self.rest, str(error)


class Link:
    """Requests to `url`, from any thread, over persistent connections.

    `token` is sent with each request, and removed from all answers. `timeout`: seconds for a request and its complete
    answer, from the name look-up to the last byte. `retries`: when the service cannot be reached, is late or busy,
    after pauses that double and are at least as long as it asks for. `faults` and `rest`: `limit` and `rest` of the
    `Breaker`. `who`: the name of the service in reasons. An answer is JSON of at most `limits.ANSWER` bytes; redirects
    are not followed. ValueError for an invalid URL or one with a password, for a token that cannot be in an HTTP
    header, and for an unusable proxy in the environment.
    """

    def __init__(
        self,
        url: str,
        token: str,
        timeout: int | float,
        retries: int,
        faults: int | float = math.inf,
        rest: int | float = 0,
        who: str = "the service",
    ):
        if "@" in url:
            raise ValueError("a URL with a password in it would appear in reports; give a key instead")
        if "?" in url or "#" in url:
            raise ValueError(f"{url}: a URL without ? and # is needed")
        if not (token.isascii() and token.isprintable() and token == token.strip()):
            raise ValueError(f"{url}: the token has characters that are not allowed in an HTTP header")
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._client = httpx.AsyncClient(
                base_url=url, headers=headers, timeout=httpx.Timeout(None, connect=min(timeout, 10))
            )
        except httpx.InvalidURL as error:
            raise ValueError(f"{url}: {error}") from None
        except (ImportError, ValueError) as error:  # a proxy of ALL_PROXY, HTTP_PROXY or HTTPS_PROXY
            reason = "needs the package socksio: pip install 'httpx[socks]'" if "socksio" in str(error) else str(error)
            raise ValueError(f"{url}: the proxy that the environment names (ALL_PROXY or another) {reason}") from None
        self._redact, self._loop = redactor(token), running_loop()
        self.url, self.timeout, self.retries, self.who = url, timeout, retries, who
        self.breaker = Breaker(faults, rest)

    def get(self, path: str) -> Any:
        """The JSON value of the answer, without retries."""
        return self._try("GET", path, b"", BUSY)

    def post(self, path: str, body: bytes, read: Callable[[Any], Value], busy: Collection[int] = BUSY) -> Value:
        """`read` of the answer's JSON value; `read` raises a Fault for an invalid answer. A status in `busy` is
        retried."""
        with self.breaker:
            for attempt in range(self.retries):
                try:
                    return read(self._try("POST", path, body, busy))
                except Fault as fault:
                    if fault.pause is None:
                        raise
                    time.sleep(fault.pause + PAUSE * 2**attempt * jitter.uniform(0.5, 1.5))
            return read(self._try("POST", path, body, busy))

    def _try(self, method: str, path: str, body: bytes, busy: Collection[int]) -> Any:
        """The JSON of an answer with status 200. Fault for any other status, and without an answer."""
        answer = bytearray()
        pending = asyncio.run_coroutine_threadsafe(self._ask(method, path, body, answer), self._loop)
        try:
            # the loop enforces the deadline; the second bound is for a dead loop, as in a fork of this process
            response = pending.result(self.timeout + 5)
        except TimeoutError:
            pending.cancel()
            complete = "complete " if answer else ""
            raise Fault(f"no {complete}answer within {self.timeout:g} s", pause=0) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise Fault(self._redact(f"cannot be reached: {causes(error)}"), pause=0) from None
        text = answer.decode(errors="replace")
        if response.status_code != 200:
            raise self._refusal(response, self._redact(text), busy)
        try:
            return redacted(parsed(bytes(answer)), self._redact)
        except (ValueError, RecursionError) as error:
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
            stream = "an event stream instead of one answer" if kind == "text/event-stream" else "no JSON"
            reason = f"the answer makes no sense: status 200 with {stream}: {_line(text)!r} ({_line(str(error))})"
            raise Fault(self._redact(reason), status=200) from None

    async def _ask(self, method: str, path: str, body: bytes, answer: bytearray) -> httpx.Response:
        """Fill `answer` with the body of the response. Fault for one that is too large or encoded."""
        async with asyncio.timeout(self.timeout), self._client.stream(method, path, content=body) as response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise Fault(self._redact(f"the answer has an encoding ({encoding[:40]}) that was not requested"))
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > limits.ANSWER:
                    raise Fault(f"the answer is larger than {limits.ANSWER} bytes")
        return response

    def _refusal(self, response: httpx.Response, text: str, busy: Collection[int]) -> Fault:
        status, location = response.status_code, self._redact(response.headers.get("Location", ""))
        reason = f"{self.who} answered {status}: {_line(text)}".removesuffix(": ")
        reason += f" (it points to {location[:WORDS]})" if location and 300 <= status < 400 else ""
        if status not in busy:
            return Fault(reason, broken=not 400 <= status < 500, status=status, body=text[:4000])
        after = response.headers.get("Retry-After", "")
        pause = float(after) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", after) else 0  # dates are not supported
        return Fault(reason, pause if pause <= self.timeout else None, status=status, body=text[:4000])


@cache
def running_loop() -> asyncio.AbstractEventLoop:
    """An event loop in its own thread, so that a complete request can have one deadline."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="links", daemon=True).start()
    return loop


def redactor(secret: str) -> Callable[[str], str]:
    """A function that removes a secret from a text: verbatim, with any of its characters escaped as in JSON, URLs and
    HTML, in base64, and after `Bearer` in base64. A secret of fewer than `SECRET` characters is not removed."""
    if len(secret) < SECRET:
        return lambda text: text
    forms = ["".join(map(_forms, secret))]
    forms += [re.escape(b64encode(text.encode()).decode().rstrip("=")) for text in (secret, f"Bearer {secret}")]
    pattern = re.compile("|".join(forms))
    return lambda text: pattern.sub("...", text)


def _forms(letter: str) -> str:
    code = ord(letter)
    hexadecimal = "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in f"{code:02x}")
    forms = [rf"\\{{0,16}}{re.escape(letter)}", rf"\\{{1,16}}u00{hexadecimal}", rf"%(?:25)*{hexadecimal}"]
    forms += [rf"&#0*{code};", rf"&#[xX]0*{hexadecimal};"]
    forms += [{"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", " ": r"\+"}[letter]] if letter in '&<>" ' else []
    return f"(?:{'|'.join(forms)})"


def redacted(value: Any, redact: Callable[[str], str]) -> Any:
    """A JSON value with the secret removed from all of its strings."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [redacted(part, redact) for part in value]
    if isinstance(value, dict):
        return {redact(key): redacted(part, redact) for key, part in value.items()}
    return value


def causes(error: BaseException) -> str:
    """The messages of an error and its causes, down to the first cause."""
    messages: list[str] = []
    while error is not None:
        text = _line(str(error)) or type(error).__name__
        if text not in messages and not isinstance(error, BaseExceptionGroup):
            messages.append(text)
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
        error = inner or error.__cause__ or error.__context__
    return ": ".join(messages)


def _line(text: str) -> str:
    return " ".join(text[: 20 * WORDS].split())[:WORDS]
