"""A link to a service over HTTP that may be late, busy, broken, gone or hostile: one deadline for all of a request, a
bound on what it answers, retries, a circuit breaker, and no secret in what comes back.

Whatever goes wrong is a `Fault` that says what, never another exception.
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

BUSY = frozenset({429, 502, 503, 504})  # worth another try
PAUSE = 0.25  # seconds before the second try, twice as long before each further one
WORDS = 200  # characters of an answer that a reason holds
SECRET = 4  # characters from which on a token is one: to strike out fewer would change what is said
Found = TypeVar("Found")
jitter = random.Random()  # its own: waiting must not move the random numbers of whoever waits
clock = time.monotonic


class Fault(Exception):
    """Why there is no answer that can be used. `pause`: seconds after which another try is worth it, None if it is not.
    `broken`: whether the service is to blame, and not what it was asked. `status` of the answer, 0 without one, and the
    beginning of its `body`."""

    def __init__(
        self, why: str, pause: int | float | None = None, broken: bool = True, status: int = 0, body: str = ""
    ):
        super().__init__(why)
        self.pause, self.broken, self.status, self.body = pause, broken, status, body


class Breaker:
    """Spares a service that is down, and those who would wait for it. After `limit` broken requests in a row none is
    let through for `rest` seconds; then one is, and the others go on being refused until it has ended."""

    def __init__(self, limit: int | float, rest: int | float):
        self.limit, self.rest, self.lock = limit, rest, Lock()
        self.broken, self.until, self.why = 0, -math.inf, ""

    def __enter__(self) -> None:
        with self.lock:
            if self.broken >= self.limit:
                if clock() < self.until:
                    raise Fault(f"not asked, since {self.broken} requests in a row failed; the last: {self.why}")
                self.until = math.inf

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        with self.lock:
            if error is None or (isinstance(error, Fault) and not error.broken):
                self.broken = 0
            else:
                self.broken += 1
                self.until, self.why = clock() + self.rest, str(error)


class Link:
    """Requests to `url`, from any thread, over connections that are kept.

    `token` goes with each, and is struck out of all that comes back. `timeout`: seconds for a request and its whole
    answer, from the look-up of the name to the last byte. `retries`: further tries when the service cannot be reached,
    is late or busy, after pauses that double, and as long as it asks for. `faults` and `rest`: limit and seconds of the
    `Breaker`. `who` is what reasons call the other side. An answer is JSON of at most `limits.ANSWER` bytes; redirects
    are not followed. ValueError for a URL that is none or holds a password, for a token that no HTTP header can hold,
    and for a proxy in the environment that cannot be used.
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
            raise ValueError("a URL with a password in it would be told to others; give a key instead")
        if "?" in url or "#" in url:
            raise ValueError(f"{url}: a URL without ? and # is needed")
        if not (token.isascii() and token.isprintable() and token == token.strip()):
            raise ValueError(f"{url}: the token holds characters that no HTTP header can")
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._client = httpx.AsyncClient(
                base_url=url, headers=headers, timeout=httpx.Timeout(None, connect=min(timeout, 10))
            )
        except httpx.InvalidURL as error:
            raise ValueError(f"{url}: {error}") from None
        except (ImportError, ValueError) as error:  # a proxy of ALL_PROXY, HTTP_PROXY or HTTPS_PROXY
            why = "needs the package socksio: pip install 'httpx[socks]'" if "socksio" in str(error) else str(error)
            raise ValueError(f"{url}: the proxy that the environment names (ALL_PROXY or another) {why}") from None
        self._strike, self._loop = striking(token), running_loop()
        self.url, self.timeout, self.retries, self.who = url, timeout, retries, who
        self.breaker = Breaker(faults, rest)

    def get(self, path: str) -> Any:
        """The answer to one try: what its JSON stands for."""
        return self._try("GET", path, b"", BUSY)

    def post(self, path: str, body: bytes, read: Callable[[Any], Found], busy: Collection[int] = BUSY) -> Found:
        """What `read` makes of the answer's JSON; it raises a Fault where the answer is not as it should be. A status
        of `busy` is worth another try."""
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
        """The JSON of an answer with status 200. Fault for any other, and for none."""
        answer = bytearray()
        going = asyncio.run_coroutine_threadsafe(self._ask(method, path, body, answer), self._loop)
        try:
            # the loop keeps the time; the second bound is for one that does not turn, as in a fork of this process
            response = going.result(self.timeout + 5)
        except TimeoutError:
            going.cancel()
            whole = "whole " if answer else ""
            raise Fault(f"no {whole}answer within {self.timeout:g} s", pause=0) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise Fault(self._strike(f"cannot be reached: {causes(error)}"), pause=0) from None
        text = answer.decode(errors="replace")
        if response.status_code != 200:
            raise self._refusal(response, self._strike(text), busy)
        try:
            return struck(parsed(bytes(answer)), self._strike)
        except (ValueError, RecursionError) as error:
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
            stream = "an event stream, where one answer was asked for" if kind == "text/event-stream" else "no JSON"
            why = f"the answer makes no sense: status 200 with {stream}: {_line(text)!r} ({_line(str(error))})"
            raise Fault(self._strike(why), status=200) from None

    async def _ask(self, method: str, path: str, body: bytes, answer: bytearray) -> httpx.Response:
        """Fill `answer` with the body of the response. Fault for one that is too large or encoded."""
        async with asyncio.timeout(self.timeout), self._client.stream(method, path, content=body) as response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise Fault(self._strike(f"the answer is encoded ({encoding[:40]}), though none was asked for"))
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > limits.ANSWER:
                    raise Fault(f"the answer is larger than {limits.ANSWER} bytes")
        return response

    def _refusal(self, response: httpx.Response, text: str, busy: Collection[int]) -> Fault:
        status, place = response.status_code, self._strike(response.headers.get("Location", ""))
        why = f"{self.who} answered {status}: {_line(text)}".removesuffix(": ")
        why += f" (it points to {place[:WORDS]})" if place and 300 <= status < 400 else ""
        if status not in busy:
            return Fault(why, broken=not 400 <= status < 500, status=status, body=text[:4000])
        after = response.headers.get("Retry-After", "")
        pause = float(after) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", after) else 0  # a date is not understood
        return Fault(why, pause if pause <= self.timeout else None, status=status, body=text[:4000])


@cache
def running_loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own: only there can all of a request be held to one deadline."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="links", daemon=True).start()
    return loop


def striking(secret: str) -> Callable[[str], str]:
    """What strikes a secret out of a text: as it is, each of its characters escaped or not as in JSON, URLs and HTML,
    in base64, and after `Bearer` in base64. One of fewer than `SECRET` characters is none."""
    if len(secret) < SECRET:
        return lambda text: text
    forms = ["".join(map(_forms, secret))]
    forms += [re.escape(b64encode(own.encode()).decode().rstrip("=")) for own in (secret, f"Bearer {secret}")]
    pattern = re.compile("|".join(forms))
    return lambda text: pattern.sub("...", text)


def _forms(letter: str) -> str:
    code = ord(letter)
    hexadecimal = "".join(f"[{own}{own.upper()}]" if own.isalpha() else own for own in f"{code:02x}")
    forms = [rf"\\{{0,16}}{re.escape(letter)}", rf"\\{{1,16}}u00{hexadecimal}", rf"%(?:25)*{hexadecimal}"]
    forms += [rf"&#0*{code};", rf"&#[xX]0*{hexadecimal};"]
    forms += [{"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", " ": r"\+"}[letter]] if letter in '&<>" ' else []
    return f"(?:{'|'.join(forms)})"


def struck(value: Any, strike: Callable[[str], str]) -> Any:
    """A JSON value with all of its words struck."""
    if isinstance(value, str):
        return strike(value)
    if isinstance(value, list):
        return [struck(own, strike) for own in value]
    if isinstance(value, dict):
        return {strike(key): struck(own, strike) for key, own in value.items()}
    return value


def causes(error: BaseException) -> str:
    """An error and what lies under it, down to the first cause."""
    said: list[str] = []
    while error is not None:
        text = _line(str(error)) or type(error).__name__
        if text not in said and not isinstance(error, BaseExceptionGroup):
            said.append(text)
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
        error = inner or error.__cause__ or error.__context__
    return ": ".join(said)


def _line(text: str) -> str:
    return " ".join(text[: 20 * WORDS].split())[:WORDS]
