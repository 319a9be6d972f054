"""Reward services for the tests: scorers that are slow, groupwise or broken, a service in this process, one in a
process of its own, and a server that lies.

    python services.py '{"scorers": ["jpeg_size"], "seconds": 0.2, "token": "t", "grace": 5}'

runs one on a free port until it is stopped.
"""

import base64
import builtins
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
import torch
import uvicorn

from reward_models import Card, Prompt, Scores, load
from reward_models.images import to_pil
from reward_models.scoring import each
from reward_models.service.server import app, configured, serve
from reward_models.shapes_world import caption, draw, requests

# ------------------------------------------------------------------------------------------------------------- material


def drawings(count: int, seed: int = 0) -> tuple[torch.Tensor, list[Prompt]]:
    """Images of the embedded world and their prompts, with noise that only rounding to 8 bits makes a PNG."""
    rng = np.random.default_rng(seed)
    wants = [requests()[i] for i in rng.integers(len(requests()), size=count)]
    images = torch.from_numpy(np.stack([draw(w, rng) for w in wants]))
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + 0.01 * noise).clamp(0, 1), [Prompt(caption(w), w, i) for i, w in enumerate(wants)]


def plain(levels: Sequence[float], size: int = 8) -> torch.Tensor:
    """One grey image per level."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, size, size).clone()


def encoded(image: torch.Tensor, format: str = "PNG") -> str:
    file = BytesIO()
    to_pil(image[None])[0].save(file, format)
    return base64.b64encode(file.getvalue()).decode()


def ask(images: Sequence[torch.Tensor | str], prompts: Sequence[Prompt] | None = None, **more: Any) -> dict[str, Any]:
    """The body of a request; a string stands for an encoded image."""
    prompts = prompts or [Prompt("", {}, i) for i in range(len(images))]
    return {
        "images": [image if isinstance(image, str) else encoded(image) for image in images],
        "prompts": [{"text": p.text, "wants": dict(p.wants), "id": p.id} for p in prompts],
    } | more


# -------------------------------------------------------------------------------------------------------------- scorers


class Mean:
    """Mean of the pixels, after `seconds` or once `gate` opens; `calls` holds the size of each call. A prompt whose
    text is the name of an exception raises it."""

    names = ("mean",)

    def __init__(self, seconds: int | float = 0, gate: threading.Event | None = None):
        self.seconds, self.gate, self.calls, self.started = seconds, gate, [], threading.Event()
        self.card = Card("mean", low=0, settings={"seconds": seconds})

    def __call__(self, images, prompts):
        self.calls.append(len(images))
        self.started.set()
        time.sleep(self.seconds)
        if self.gate is not None:
            assert self.gate.wait(20)
        for prompt in prompts:
            if isinstance(kind := getattr(builtins, prompt.text, None), type):
                raise kind("on purpose")
        return each(images, prompts, self.names, lambda images, _: images.mean((1, 2, 3))[:, None])


class Crowd:
    """A groupwise scorer: how many images it was shown with this one's prompt, and of how many prompts in all."""

    names, card = ("siblings", "prompts"), Card("crowd", groupwise=True, sees_prompt=False)

    def __call__(self, images, prompts):
        groups = [(p.id, p.text) for p in prompts]
        return Scores(self.names, torch.tensor([[groups.count(group), len(set(groups))] for group in groups]).float())


# ------------------------------------------------------------------------------------------------------------- services


@contextmanager
def running(scorers, **settings: Any) -> Iterator[str]:
    """The URL of a service in a thread of this process."""
    server = uvicorn.Server(configured(app(scorers, host="127.0.0.1", **settings), "127.0.0.1", 0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def start(**settings: Any) -> tuple[subprocess.Popen, str]:
    """A service in a process of its own, and its URL."""
    process = subprocess.Popen([sys.executable, __file__, json.dumps(settings)], stderr=subprocess.PIPE, text=True)
    log = []
    for line in process.stderr:
        log.append(line)
        if match := re.search(r"http://127\.0\.0\.1:\d+", line):
            return process, match[0]
    raise RuntimeError("".join(log))


INFO = {
    "scorers": {
        "clip": {
            "names": ["cosine"],
            "version": "1",
            "card": {
                "scorer": "clip", "model": "m", "licence": "l", "low": -1, "high": 1, "higher": "better",
                "comparable_across_prompts": False, "sees_prompt": True, "size": "", "checkpoint": "",
                "groupwise": False, "has_map": False, "settings": {},
            },
        }
    },
    "limits": {"images": 100, "body": 10**9, "pixels": 10**9},
}  # fmt: skip


class Faulty:
    """A server that tells it is a reward service with the scorer `clip`, and answers /score as `reply` says: a status,
    headers and a body, whole or in parts, from the request, or None to close the connection without a word. `asks`
    holds the requests."""

    def __init__(self):
        self.reply: Callable[[dict], tuple[int, dict[str, str], bytes | Iterator[bytes]] | None] = self.well
        self.asks: list[dict[str, Any]] = []
        self.info: dict[str, Any] = INFO
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._send(200, {}, json.dumps(faulty.info).encode())

            def do_POST(self):
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                faulty.asks.append(sent)
                answer = faulty.reply(sent | {"authorization": self.headers["Authorization"]})
                if answer is None:
                    self.close_connection = True
                else:
                    self._send(*answer)

            def _send(self, status, headers, body):
                self.send_response(status)
                whole = {"Content-Length": str(len(body))} if isinstance(body, bytes) else {}
                for name, value in (whole | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                for part in [body] if isinstance(body, bytes) else body:
                    self.wfile.write(part)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # clients that hang up are part of the tests

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, sent: dict) -> dict[str, Any]:
        """What a service that works would say: 0.5 for everything."""
        count = len(sent["images"])
        return {
            "names": {"clip": ["cosine"]},
            "scores": [{"clip.cosine": 0.5}] * count,
            "failures": [{}] * count,
            "critiques": [{}] * count,
        }

    def well(self, sent: dict) -> tuple[int, dict[str, str], bytes]:
        return 200, {}, json.dumps(self.answer(sent)).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    scorers = {name: load(name) for name in settings.pop("scorers", [])}
    if "seconds" in settings:
        scorers["mean"] = Mean(settings.pop("seconds"))
    serve(scorers, port=0, **settings)
