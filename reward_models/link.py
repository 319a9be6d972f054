"""A link to a service over HTTP that may be late, busy, broken or gone: time-outs, retries, a circuit breaker.

Whatever goes wrong is a `Fault` that says what, never another exception.
"""

import math
import random
import time
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

try:
    import httpx
except ImportError as error:
    raise ValueError(f"a remote scorer needs {error.name}: pip install 'mmalign[serve]'") from error

BUSY = (429, 502, 503, 504)  # worth another try
PAUSE = 0.25  # seconds before the second try, twice as long before each further one
LARGEST = 64 * 2**20  # bytes of an answer
Found = TypeVar("Found")
jitter = random.Random()  # its own: waiting must not move the random numbers of whoever waits


class Fault(Exception):
    """Why there is no answer that can be used. `pause`: seconds after which another try is worth it, None if it is not.
    `broken`: whether the service is to blame, and not what it was asked."""

    def __init__(self, why: str, pause: int | None = None, broken: bool = True):
        super().__init__(why)
        self.pause, self.broken = pause, broken


class Breaker:
    """Spares a service that is down, and those who would wait for it. After `limit` broken requests in a row none is
    let through for `rest` seconds; then one is, and the others go on being refused until it has ended."""

    def __init__(self, limit: int, rest: int | float):
        self.limit, self.rest, self.lock = limit, rest, Lock()
        self.broken, self.until, self.why = 0, -math.inf, ""

    def __enter__(self) -> None:
        with self.lock:
            if self.broken >= self.limit:
                if time.monotonic() < self.until:
                    raise Fault(f"not asked, since {self.broken} requests in a row failed; the last: {self.why}")
                self.until = math.inf

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        with self.lock:
            if error is None or (isinstance(error, Fault) and not error.broken):
                self.broken = 0
            else:
                self.broken += 1
                self.until, self.why = time.monotonic() + self.rest, str(error)


class Link:
    """Requests to `url`, from any thread, over connections that are kept.

    `token` goes with each, and is never told to anyone else. `timeout`: seconds for an answer. `retries`: further tries
    when the service cannot be reached, is late or busy, after pauses that double, and as long as it asks for. `faults`
    and `rest`: limit and seconds of the `Breaker`. ValueError for a URL that is none or holds a password, and for a
    token that no HTTP header can hold.
    """

    def __init__(self, url: str, token: str, timeout: int | float, retries: int, faults: int, rest: int | float):
        if "@" in url:
            raise ValueError("a URL with a password in it would be told to others; give a token instead")
        if not (token.isascii() and token.isprintable()):
            raise ValueError(f"{url}: the token holds characters that no HTTP header can")
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Timeout(timeout, connect=min(timeout, 10))
        try:
            self._client = httpx.Client(base_url=url, headers=headers, timeout=limits)
        except httpx.InvalidURL as error:
            raise ValueError(f"{url}: {error}") from None
        self._token, self.timeout, self.retries = token, timeout, retries
        self.breaker = Breaker(faults, rest)

    def get(self, path: str) -> bytes:
        """The answer to one try."""
        return self._try("GET", path, b"")

    def post(self, path: str, body: bytes, read: Callable[[bytes], Found]) -> Found:
        """What `read` makes of the answer; it raises a Fault where the answer is not as it should be."""
        with self.breaker:
            for attempt in range(self.retries):
                try:
                    return read(self._try("POST", path, body))
                except Fault as fault:
                    if fault.pause is None:
                        raise
                    time.sleep(fault.pause + PAUSE * 2**attempt * jitter.uniform(0.5, 1.5))
            return read(self._try("POST", path, body))

    def _try(self, method: str, path: str, body: bytes) -> bytes:
        """The body of an answer with status 200. Fault for any other, and for none."""
        answer, late = bytearray(), time.monotonic() + self.timeout
        try:
            with self._client.stream(method, path, content=body) as response:
                for chunk in response.iter_raw():
                    answer += chunk
                    if len(answer) > LARGEST:
                        raise Fault(f"the answer is larger than {LARGEST} bytes")
                    if time.monotonic() > late:  # a time-out is between two chunks, however many there are
                        raise Fault(f"no whole answer within {self.timeout:g} s", pause=0)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise Fault(f"no answer within {self.timeout:g} s", pause=0) from None
        except httpx.HTTPError as error:
            raise Fault(f"cannot be reached: {error or type(error).__name__}", pause=0) from None
        if response.status_code == 200:
            return bytes(answer)
        raise self._refusal(response.status_code, response.headers.get("Retry-After", ""), answer)

    def _refusal(self, status: int, after: str, answer: bytearray) -> Fault:
        text = answer.decode(errors="replace")
        text = text.replace(self._token, "...") if self._token else text  # some services echo what they were sent
        why = f"the service answered {status}: {' '.join(text.split())[:200]}".removesuffix(": ")
        if status not in BUSY:
            return Fault(why, broken=not 400 <= status < 500)
        pause = int(after) if after.isdecimal() else 0  # a date instead of seconds is not understood
        return Fault(why, pause if pause <= self.timeout else None)
