"""The reward service: scorers behind HTTP, for many callers at once. Its client is `reward_models.service.client`.

    POST /score     `schema.Ask` -> `schema.Answer`      GET /health     liveness and queue length (no token)
    GET  /info      the meaning of each score            GET /metrics    for Prometheus
    GET  /docs      the OpenAPI documentation (no token)

Memory is bounded for any input (`limits`): bodies by bytes, each and in total; JSON by its number of values; images by
the pixels in their headers, in a request, a batch and the queue. Every wait has a time-out: for a head, a body, and a
client that does not read its answer.

Not supported: TLS and users (use a proxy), several processes (start several services).
"""

import asyncio
import json
import re
import signal
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from hmac import compare_digest
from ipaddress import ip_address
from typing import Any

from reward_models import limits
from reward_models.errors import first_problem
from reward_models.images import unopened
from reward_models.service.batcher import Batcher, Job, shot_of
from reward_models.service.schema import About, Answer, Ask, Health, Info, Limits, Problem
from reward_models.types import Prompt, RewardModel

try:
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from fastapi.security import HTTPBearer
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ValueError(f"the reward service needs {error.name}: pip install 'mmalign[serve]'") from error

OPEN = ("/health", "/docs", "/openapi.json")  # paths without a token
REFUSALS = {
    400: "a body that cannot be parsed",
    401: "the token is missing or wrong",
    408: "the body did not arrive in time",
    413: "the body is too large, or holds too many values",
    422: "not a valid `Ask`, or too many images or pixels",
    503: "the queue is full; retry after `Retry-After` seconds",
}

CLOSE = {"Connection": "close"}  # the rest of the body is not read
AGAIN = {"Retry-After": "1"}


class Meters:
    """The Prometheus metrics of one service."""

    def __init__(self):
        registry = {"registry": CollectorRegistry()}
        self.registry = registry["registry"]
        self.requests = Counter("reward_requests", "Requests to /score, by HTTP status", ["status"], **registry)
        self.seconds = Histogram("reward_request_seconds", "From a request to /score to its answer", **registry)
        self.images = Counter("reward_images", "Images scored", **registry)
        self.failures = Counter(
            "reward_failures", "Images a scorer failed on; `image`: unreadable", ["scorer"], **registry
        )
        self.waiting = Gauge("reward_waiting_images", "Images in the queue", **registry)
        sizes = [2**n for n in range(13)]
        self.batch = Histogram("reward_batch_images", "Images scored together", buckets=sizes, **registry)

    def watch(self, jobs: Sequence[Job]) -> None:
        shots = [shot for job in jobs for shot in job.shots]
        self.batch.observe(len(shots))
        self.images.inc(len(shots))
        for name in (name for shot in shots for name in shot.failures):
            self.failures.labels(name).inc()


class Gate:
    """The outermost middleware: checks the token, limits the size and the arrival time of bodies, and updates the
    meters. It stores no bodies, but counts the bytes of all that are being received."""

    def __init__(self, app: ASGIApp, token: str | None, body: int, meters: Meters):
        self.app, self.token, self.body, self.meters, self.held = app, token, body, meters, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status, received, values, arriving = time.perf_counter(), 500, 0, 0, True

        async def counted() -> Message:
            nonlocal received, values, arriving
            message = await self._in_time(receive, start) if arriving else await receive()
            part, arriving = message.get("body", b""), message.get("more_body", False)
            received += len(part)
            self.held += len(part)
            values += sum(map(part.count, (b",", b":", b"[", b"{")))  # base64 contains none of them
            if received > self.body:  # the declared length may be missing or wrong
                raise HTTPException(413, self._too_large(), CLOSE)
            if values > limits.VALUES:
                raise HTTPException(413, f"a request has at most {limits.VALUES} values; send fewer images", CLOSE)
            if self.held > max(limits.BODIES, self.body):
                raise HTTPException(503, "too much data is being sent at once", CLOSE | AGAIN)
            return message

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        try:
            if scope["path"] not in OPEN and self.token and not admits(headers.get("authorization", ""), self.token):
                response = refusal(
                    401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
                )
                await response(scope, receive, watched)
            elif length.isdecimal() and int(length) > self.body:
                await refusal(413, self._too_large(), CLOSE)(scope, receive, watched)
            else:
                await self.app(scope, counted, watched)
        finally:
            self.held -= received
            if scope["path"] == "/score":
                self.meters.requests.labels(status).inc()
                self.meters.seconds.observe(time.perf_counter() - start)

    async def _in_time(self, receive: Receive, start: float) -> Message:
        """The next part of a body that began to arrive at `start`; 408 after the time-out."""
        try:
            async with asyncio.timeout(start + limits.ARRIVAL - time.perf_counter()):
                return await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {limits.ARRIVAL} s", CLOSE) from None

    def _too_large(self) -> str:
        return f"a request has at most {self.body} bytes; send fewer images"


def admits(authorization: str, token: str) -> bool:
    """Whether a header Authorization has the token, in a time that does not depend on it."""
    scheme, _, given = authorization.partition(" ")
    return scheme.lower() == "bearer" and compare_digest(given.encode(), token.encode())


def refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """The first problem of a request, in one line, without the submitted value."""
    detail = first_problem(error.errors())
    return refusal(422, detail.encode("ascii", "backslashreplace").decode())  # the input may have no UTF-8 form


def described(scorer: RewardModel) -> About:
    card = json.dumps(asdict(scorer.card), default=str)
    card = json.loads(card, parse_constant=lambda _: None)  # JSON has no infinity
    return About(names=list(scorer.names), version=scorer.card.version, card=card)


def job_of(ask: Ask, known: Collection[str], images: int, pixels: int) -> Job:
    """What is to be scored, by which of the `known` scorers. HTTPException 422 for other scorers, more than so many
    `images`, or too many pixels; an image of more than `pixels` fails alone."""
    names = list(known) if ask.scorers is None else ask.scorers
    if unknown := [name for name in names if name not in known]:
        raise HTTPException(422, f"no scorer called {unknown[0]!r}; known: {', '.join(known)}")
    if len(ask.images) != len(ask.prompts):
        raise HTTPException(422, f"{len(ask.images)} images but {len(ask.prompts)} prompts")
    if len(ask.images) > images:
        raise HTTPException(422, f"{len(ask.images)} images in one request; at most {images} are accepted")
    prompts = [Prompt(prompt.text, unopened(prompt.wants), prompt.id) for prompt in ask.prompts]
    job = Job([shot_of(*pair, pixels) for pair in zip(ask.images, prompts, strict=True)], names)
    if job.pixels > limits.TOGETHER:
        reason = f"{job.pixels} pixels in one request; at most {limits.TOGETHER} are accepted: send fewer images"
        raise HTTPException(422, reason)
    return job


def app(
    scorers: Mapping[str, RewardModel],
    *,
    token: str | None = None,
    host: str | None = None,
    batch: int = 64,
    wait: int | float = 0.01,
    queue: int = 512,
    body: int = limits.BODY,
    pixels: int = limits.IMAGE,
) -> FastAPI:
    """The service as an ASGI application.

    `token`: the token that callers must send, if any. `host`: the address to listen on; for a loopback address,
    requests with another host name are rejected. `batch`: the largest number of images scored together. `wait`: seconds
    a batch waits for more images. `queue`: the largest number of images that wait, and of images in a request. `body`:
    bytes of a request. `pixels`: pixels of an image; a request has at most `limits.TOGETHER`. ValueError without
    scorers, or for limits below 1.
    """
    if not scorers or min(batch, queue, body, pixels) < 1 or wait < 0:
        raise ValueError("a service needs a scorer, and limits above 0")
    meters = Meters()
    batcher = Batcher(scorers, batch, wait, queue, meters.watch)
    meters.waiting.set_function(lambda: batcher.waiting)
    about = {name: described(scorer) for name, scorer in scorers.items()}

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        batcher.close()

    service = FastAPI(title="mmalign reward service", lifespan=lifespan, redoc_url=None)
    service.add_exception_handler(RequestValidationError, invalid)
    service.add_middleware(Gate, token=token, body=body, meters=meters)
    if host and loopback(host):
        service.add_middleware(LocalHostOnly)
    refusals = {code: {"model": Problem, "description": reason} for code, reason in REFUSALS.items()}
    guarded = {"dependencies": [Depends(HTTPBearer(auto_error=False))] if token else []}  # for OpenAPI only

    @service.post("/score", responses=refusals, response_model_exclude_defaults=True, **guarded)
    async def score(ask: Ask) -> Answer:
        """Score images. An image that cannot be read does not affect the others."""
        job = job_of(ask, scorers, queue, pixels)
        if not batcher.submit(job):
            reason = "the service is shutting down" if batcher.closed else f"{batcher.waiting} images are waiting"
            raise HTTPException(503, reason, AGAIN)
        await asyncio.wrap_future(job.done)
        return Answer(
            names={name: about[name].names for name in job.scorers},
            scores=[shot.scores for shot in job.shots],
            failures=[shot.failures for shot in job.shots],
            critiques=[shot.critiques for shot in job.shots],
            details=[shot.details() for shot in job.shots] if ask.details else [],
        )

    @service.get("/info", responses={401: refusals[401]}, **guarded)
    async def info() -> Info:
        """The meaning of each score, and the limits of a request."""
        served = Limits(images=queue, body=body, pixels=pixels, together=limits.TOGETHER)
        return Info(scorers=about, limits=served, details=True)

    @service.get("/health")
    async def health() -> Health:
        """Whether the service is alive."""
        return Health(ok=batcher.thread.is_alive(), waiting=batcher.waiting)

    @service.get("/metrics", response_class=PlainTextResponse, responses={401: refusals[401]}, **guarded)
    async def metrics() -> str:
        """Counters and histograms, for Prometheus."""
        return generate_latest(meters.registry).decode()

    return service


def serve(
    scorers: Mapping[str, RewardModel],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    token: str | None = None,
    grace: int = 30,
    **settings: int | float,
) -> None:
    """Run the service until SIGTERM or SIGINT; then accept no more requests, drain the queue within `grace` seconds,
    and return.

    `port` 0 means any free port. `settings` are those of `app`. ValueError for a host that other machines can reach,
    without a token.
    """
    if not token and not loopback(host):
        raise ValueError(f"other machines can reach host {host}: set a token, or use 127.0.0.1")
    listen(app(scorers, token=token, host=host, **settings), host, port, grace)


def listen(service: ASGIApp, host: str, port: int, grace: int) -> None:
    """Serve an application until SIGTERM or SIGINT; then finish open requests within `grace` seconds, and return."""
    reachable(host, port)
    server = uvicorn.Server(configured(service, host, port, grace))

    def stop(*_) -> None:
        server.should_exit = True

    # uvicorn replaces these handlers while it runs, and raises the signal again after its shutdown; these then keep the
    # process from ending by the signal, because an orderly stop is not a failure
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def configured(service: ASGIApp, host: str, port: int, grace: int = 30, **settings: Any) -> uvicorn.Config:
    """The uvicorn settings, with limits on connections and waiting times."""
    return uvicorn.Config(
        service, host, port, http=BoundedConnection, ws="none", timeout_graceful_shutdown=grace, access_log=False,
        server_header=False, **settings,
    )  # fmt: skip


class BoundedConnection(H11Protocol):
    """A connection that waits `limits.HEAD` seconds for the head of each request and for its answer to be read, and
    that is closed at once if there are `limits.CONNECTIONS` others."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > limits.CONNECTIONS:
            transport.abort()
        self.timer = self.loop.call_later(limits.HEAD, self._give_up, None)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        self.timer.cancel()
        self.timer = self.loop.call_later(limits.HEAD, self._give_up, answered)

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()
        super().connection_lost(exc)

    def _give_up(self, last: Any) -> None:
        """Close, unless a request has begun since `last`."""
        if self.cycle is last:
            self.transport.abort()


class LocalHostOnly:
    """Rejects requests whose Host header does not name this machine: protection against DNS rebinding, where a web page
    elsewhere makes its own name resolve to this address."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not local(Headers(scope=scope).get("host", "")):
            advice = "use http://127.0.0.1, http://localhost or http://[::1]"
            return await refusal(400, f"the header Host names another machine; {advice}", CLOSE)(scope, receive, send)
        return await self.app(scope, receive, send)


def local(header: str) -> bool:
    """Whether a Host header, with or without a port, names this machine."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/?#\s]+)(:\d{0,5})?", header)
    return match is not None and loopback(match[1].strip("[]").lower())


def reachable(host: str, port: int) -> None:
    """ValueError, in one line, if no service can listen there: the address does not exist, or the port is in use."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host!r} --port {port}: {getattr(error, 'strerror', None) or error}") from None


def loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
