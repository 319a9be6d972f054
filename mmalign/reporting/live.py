"""A run's page that follows the run: what `report.html` shows, drawn anew whenever the run has written.

    GET /          the page                              GET /main    what it shows, as HTML
    GET /state     how far the run is, as JSON           GET /files   what lies in the run's folder

The page asks for the state every other second, and for the rest when that has changed. It reads files alone: the run
does not know of it, and it may be started and ended at any time.
"""

import html
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Literal
from urllib.parse import quote

from mmalign.reporting import report
from mmalign.runs import folder, reader as written
from mmalign.runs.reader import RunRecord

try:
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse
    from starlette.staticfiles import StaticFiles

    from reward_models.service.server import Named, listen, loopback
except ModuleNotFoundError as error:
    raise ValueError(f"serving a page needs {error.name}: pip install 'mmalign[serve]'") from error

RECORD = ("config.yaml", *folder.RECORDS)  # written while a run goes on
PATIENCE = 60  # seconds without a sign of life that are never called an end
SCRIPT = """
const status = document.getElementById('status'), main = document.querySelector('main');
let shown = '';
async function follow() {
  try {
    const state = await (await fetch('state', {cache: 'no-store'})).json();
    status.textContent = state.said;
    status.className = state.status;
    if (state.version !== shown) {
      const answer = await fetch('main', {cache: 'no-store'});
      if (answer.ok) {
        const open = [...main.querySelectorAll('details')].map((own) => own.open);
        main.innerHTML = await answer.text();
        main.querySelectorAll('details').forEach((own, i) => { own.open = open[i]; });
        main.querySelectorAll('label input').forEach((own) => {
          own.checked = !document.body.classList.contains('plain');
        });
        shown = state.version;
      }
    }
  } catch { status.textContent = 'no answer; trying again'; status.className = 'stale'; }
  setTimeout(follow, 2000);
}
follow();
"""
STYLE = """<style>
#status{position:sticky;top:0;z-index:1;margin:0;padding:.4em .8em;border-radius:6px;background:#eef3fb}
#status.finished{background:#e3f4e6} #status.stale{background:#fbe9e7}
</style>"""


@dataclass(frozen=True)
class State:
    """How far a run is. `version` changes whenever the run has written, `quiet` counts the seconds since then."""

    version: str
    iterations: int
    status: Literal["begun", "running", "stale", "finished"]
    quiet: float
    said: str


def state(run: Path, now: float) -> State:
    """The state of a run at the time `now`, in seconds since the epoch.

    A run is stale when nothing was written for a minute and for twice as long as its longest iteration and its longest
    evaluation took together.
    """
    files = [path.stat() for path in (run / name for name in RECORD) if path.exists()]
    version = "-".join(f"{own.st_mtime_ns:x}.{own.st_size:x}" for own in files)
    quiet = max(0.0, now - max((own.st_mtime for own in files), default=now))
    own = _read(run, version)
    c, metrics, evaluations = own.config, own.metrics, own.evaluations
    longest = max((row.get("seconds/total", 0.0) for row in metrics), default=0.0)
    longest += max((row["seconds"] for row in evaluations), default=0.0)
    done = metrics[-1]["iteration"] if metrics else 0
    if c is None:
        return State(version, done, "stale", quiet, f"{own.lacking[0]}; iteration {done}")
    if done == c.iterations and (not c.held_out or any(row["name"] == "after" for row in evaluations)):
        return State(version, done, "finished", quiet, f"finished: {done} iterations")
    ago = f"last written {quiet:.0f} s ago"
    if quiet > max(PATIENCE, 2 * longest):
        said = f"no longer being written, or busier than ever before: iteration {done} of {c.iterations}; {ago}"
        return State(version, done, "stale", quiet, said)
    if not metrics:
        return State(version, 0, "begun", quiet, f"before the first of {c.iterations} iterations; {ago}")
    said = f"iteration {done} of {c.iterations}, reward {metrics[-1]['reward']:.3f}; {ago}"
    return State(version, done, "running", quiet, said)


@lru_cache(1)
def _read(run: Path, version: str) -> RunRecord:
    """What a run has written, read once for a `version` of it."""
    return written.read(run)


def app(run: Path, host: str = "127.0.0.1") -> FastAPI:
    """The page of one run as an ASGI application. On an address that only this machine reaches it answers to no other
    name: a web page elsewhere that calls itself by this address cannot read the run."""
    service = FastAPI(title="mmalign run", docs_url=None, redoc_url=None, openapi_url=None)
    if loopback(host):
        service.add_middleware(Named)
    service.mount("/files", StaticFiles(directory=run))
    drawing, drawn = Lock(), {}  # curves are drawn one at a time, and once for all who look

    def source(image: Path) -> str:
        return f"files/{quote(image.relative_to(run).as_posix())}?{image.stat().st_mtime_ns:x}"

    @service.get("/", response_class=HTMLResponse)
    def page() -> str:
        return report.document(run.name, f"{STYLE}<p id=status></p><main></main>", SCRIPT)

    @service.get("/state")
    def read_state() -> State:
        return state(run, time.time())

    @service.get("/main", response_class=HTMLResponse)
    def read_main() -> str:
        with drawing:
            version = state(run, time.time()).version
            if version not in drawn:
                drawn.clear()
                drawn[version] = _content(run, source)
            return drawn[version]

    return service


def _content(run: Path, source: report.Source) -> str:
    """What there is to show; or, where a run names files that are not its own, that."""
    try:
        return report.content(run, source)
    except ValueError as error:
        return f"<p>{html.escape(str(error))}</p>"


def serve(run: Path, host: str = "127.0.0.1", port: int = 8001) -> None:
    """Serve the page of a run until SIGTERM or SIGINT; `port` 0 is any free one."""
    listen(app(run, host), host, port, grace=1)
