"""A served page that follows a run: the content of `report.html`, updated whenever the run writes.

    GET /          the page                              GET /main    its content, as an HTML fragment
    GET /state     the progress of the run, as JSON      GET /files   the files of the run's folder

The page requests the state every two seconds, and the content when the state's version has changed. The server only
reads files, unless it takes votes (`mmalign.reporting.voting`): it is independent of the process of the run, and can be
started and stopped at any time.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Literal

from mmalign.pages import render
from mmalign.reporting import report, votes as preferences
from mmalign.runs import folder, reader
from mmalign.runs.reader import RunRecord
from reward_models import pages

try:
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse
    from starlette.staticfiles import StaticFiles

    from mmalign.reporting import protection, voting
    from reward_models.service.server import LocalHostOnly, invalid, listen, loopback
except ModuleNotFoundError as error:
    raise ValueError(f"serving a page needs {error.name}: pip install 'mmalign[serve]'") from error

WATCHED = ("config.yaml", *folder.RECORDS)  # files that change during a run
TOKEN = "MMALIGN_TOKEN"  # the environment variable of the token
PATIENCE = 60  # seconds without a write after which a run may be called stale


@dataclass(frozen=True)
class State:
    """The progress of a run. `version` changes with every write, `quiet` is the time since the last one in seconds."""

    version: str
    iterations: int
    status: Literal["begun", "running", "stale", "finished"]
    quiet: float
    message: str


def state(run: Path, now: float) -> State:
    """The state of a run at the time `now`, in seconds since the epoch.

    A run is stale if nothing was written for a minute and for twice the time of its longest iteration and its longest
    evaluation together.
    """
    files = _watched(run)
    version = _version(files)
    quiet = max(0.0, now - max((file.st_mtime for file in files), default=now))
    record = _read(run, version)
    c, metrics, evaluations = record.config, record.metrics, record.evaluations
    longest = max((row.get("seconds/total", 0.0) for row in metrics), default=0.0)
    longest += max((row["seconds"] for row in evaluations), default=0.0)
    done = metrics[-1]["iteration"] if metrics else 0
    if c is None:
        return State(version, done, "stale", quiet, f"{record.lacking[0]}; iteration {done}")
    if done == c.iterations and (not c.held_out or any(row["name"] == "after" for row in evaluations)):
        return State(version, done, "finished", quiet, f"finished: {done} iterations")
    ago = f"last written {quiet:.0f} s ago"
    if quiet > max(PATIENCE, 2 * longest):
        message = f"stopped, or slower than ever before: iteration {done} of {c.iterations}; {ago}"
        return State(version, done, "stale", quiet, message)
    if not metrics:
        return State(version, 0, "begun", quiet, f"before the first of {c.iterations} iterations; {ago}")
    message = f"iteration {done} of {c.iterations}, reward {metrics[-1]['reward']:.3f}; {ago}"
    return State(version, done, "running", quiet, message)


def _watched(run: Path) -> list[os.stat_result]:
    return [path.stat() for path in (run / name for name in WATCHED) if path.exists()]


def _version(files: Sequence[os.stat_result]) -> str:
    return "-".join(f"{file.st_mtime_ns:x}.{file.st_size:x}" for file in files)


@lru_cache(1)
def _read(run: Path, version: str) -> RunRecord:
    """The record of a run, read once per `version`."""
    return reader.read(run)


@lru_cache(1)
def _pairs(run: Path, version: str) -> list[preferences.Pair]:
    """The pairs of a run to vote on, made once per `version`."""
    return preferences.pairs(run, _read(run, version).scores)


def app(run: Path, host: str = "127.0.0.1", votes: bool = False, token: str | None = None) -> FastAPI:
    """The page of one run as an ASGI application. On a loopback address it answers only to the names of that address,
    so that a web page whose domain resolves to it cannot read the run. With `votes` it takes votes; with a `token`
    every visitor needs it."""
    service = FastAPI(title="mmalign run", docs_url=None, redoc_url=None, openapi_url=None)
    service.add_exception_handler(RequestValidationError, invalid)
    if loopback(host):
        service.add_middleware(LocalHostOnly)
    service.add_middleware(protection.Guard, token=token)
    if votes:
        service.include_router(voting.routes(run, report.COMMAND, lambda: _pairs(run, _version(_watched(run)))))
    service.mount("/files", StaticFiles(directory=run))
    rendering, rendered = Lock(), {}  # the content is rendered once per version, by one thread at a time

    def source(image: Path) -> str:
        return f"files/{pages.url(image.relative_to(run))}?{image.stat().st_mtime_ns:x}"

    @service.get("/", response_class=HTMLResponse)
    def page() -> HTMLResponse:
        return protection.page("live.html", command=report.COMMAND, title=run.name, votes=votes)

    @service.get("/state")
    def read_state() -> State:
        return state(run, time.time())

    @service.get("/main", response_class=HTMLResponse)
    def read_main() -> str:
        with rendering:
            version = state(run, time.time()).version
            if version not in rendered:
                rendered.clear()
                rendered[version] = _content(run, source)
            return rendered[version]

    return service


def _content(run: Path, source: report.Source) -> str:
    """The content of the page; if the run names files outside its folder, the reason why it is refused."""
    try:
        return report.content(run, source)
    except ValueError as error:
        return render("refused.html", reason=str(error))


def serve(run: Path, host: str = "127.0.0.1", port: int = 8001, votes: bool = False, token: str | None = None) -> None:
    """Serve the page of a run until SIGTERM or SIGINT; with `port` 0, on any free port. With `votes` it takes votes.
    `token`: what every visitor needs; on a host that other machines can reach, by default that of MMALIGN_TOKEN.
    ValueError for votes on such a host without a token, and for a file of votes that cannot be continued."""
    if token == "":
        raise ValueError("--token is empty")
    if token is None and not loopback(host):
        token = os.environ.get(TOKEN) or None
    if votes:
        if not token and not loopback(host):
            raise ValueError(f"other machines can reach host {host}: votes need a --token (or {TOKEN})")
        preferences.check(run)
    listen(app(run, host, votes, token), host, port, grace=1)
