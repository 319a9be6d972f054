"""A chat server that does what a test says, over real HTTP."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

CUT = object()  # the connection ends in the middle of the body
HANG = object()  # no answer


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    """A complete answer."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}} | more
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def picture(request: dict[str, Any]) -> Image.Image:
    """The first picture of a request."""
    parts = [
        part for message in request["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    kind, _, body = url.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


@contextmanager
def chatting(answer: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server whose `answer` gets each request: a body with status 200, or (status, headers, body),
    or CUT or HANG; and the requests so far."""
    requests: list[dict[str, Any]] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            reply = answer(request)
            if reply is HANG:
                ended.wait(20)
                self.close_connection = True
                return
            status, headers, body = (
                reply if isinstance(reply, tuple) else (200, {}, completion("x") if reply is CUT else reply)
            )
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in (
                {"Content-Type": "application/json", "Content-Length": str(len(data))} | headers
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if reply is CUT else data)
            self.close_connection = reply is CUT

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


class Busy:
    """How many requests are under way, and the most there have been."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()

    @contextmanager
    def one(self, seconds: float) -> Iterator[None]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(seconds)
        yield
        with self.lock:
            self.now -= 1
