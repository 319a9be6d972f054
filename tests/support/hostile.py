"""A server that speaks bytes: what it sends, and how slowly, is the test's."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat


@contextmanager
def sending(parts: Callable[[], Iterator[bytes]], pause: float = 0.0, context: ssl.SSLContext | None = None):
    """The address of a server that answers each connection with `parts`, `pause` seconds before each, until the other
    side has gone; it reads no more than what comes at once."""
    ended = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        try:
            connection = context.wrap_socket(connection, server_side=True) if context else connection
            with connection:
                connection.recv(65536)
                for part in parts():
                    if ended.wait(pause):
                        return
                    connection.sendall(part)
        except OSError:
            pass  # who was answered has gone

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        listener.close()


# of nobody, made for this test, good for a hundred years
SELF_SIGNED = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgo24R/LiedolPSnp5
s13pBOdgAgh+697h2j6SuoYNxi2hRANCAATOjTb1NKkb7zTyvjrhDs3MF8Ki5hBW
I5ZexzEF5stxgNua6c73w+IAQuejNwmX9iSLSdYKhfyr4kIQTU4Ksat+
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUaKIGfJtr4wnWdTXU9aJNAZISYUkwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNjAwMDczNFoYDzIxMjYxMTAy
MDAwNzM0WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATOjTb1NKkb7zTyvjrhDs3MF8Ki5hBWI5ZexzEF5stxgNua6c73w+IA
QuejNwmX9iSLSdYKhfyr4kIQTU4Ksat+o2QwYjAdBgNVHQ4EFgQU3E0D27/MD29F
tps8o3YVzPuTcFMwHwYDVR0jBBgwFoAU3E0D27/MD29Ftps8o3YVzPuTcFMwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0gAMEUC
IQCgAds1LLmE84clVx61J8yrssNc+VvzgkUS9cbBWoX0rQIgRRcAQzBWjZCkafff
2NFuMJdDB8LaZJmtpEgsrzkNVPw=
-----END CERTIFICATE-----
"""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def letters(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


# name: what is sent, seconds before each part, and a pattern of the reason
ANSWERS: dict[str, tuple[Callable[[], Iterator[bytes]], float, str]] = {
    "nothing": (lambda: repeat(b""), 0.05, "no answer within"),
    "a status line, a letter at a time": (lambda: chain(letters(HEAD), repeat(b"x")), 0.05, "no answer within"),
    "headers without end": (lambda: chain([HEAD], repeat(b"X-More: 1\r\n")), 0.05, "no answer within"),
    "headers without end, at once": (lambda: chain([HEAD], repeat(b"X-More: 1\r\n" * 999)), 0.0, "cannot be reached"),
    "one header without end": (lambda: chain([HEAD, b"X: "], repeat(b"1" * 9999)), 0.0, "cannot be reached"),
    "promises of an answer": (lambda: repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), 0.01, "no answer within"),
    "promises of an answer, at once": (lambda: repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 99), 0.0, "no answer within"),
    "a body, a letter at a time": (
        lambda: chain([HEAD + b"Content-Length: 99999\r\n\r\n"], repeat(b" ")), 0.05, "no complete answer within",
    ),
    "a body without end": (lambda: chain([HEAD + b"\r\n"], repeat(b" " * 65536)), 0.0, "larger than"),
    "chunks without end": (
        lambda: chain([HEAD + b"Transfer-Encoding: chunked\r\n\r\n"], repeat(b"ffff\r\n" + b" " * 65535 + b"\r\n")),
        0.0, "larger than",
    ),
    "chunks of one letter": (
        lambda: chain([HEAD + b"Transfer-Encoding: chunked\r\n\r\n"], repeat(b"1\r\n \r\n")), 0.05,
        "no complete answer within",
    ),
    "a chunk's size without end": (
        lambda: chain([HEAD + b"Transfer-Encoding: chunked\r\n\r\n"], repeat(b"0" * 999)), 0.0, "cannot be reached",
    ),
    "gzip that was not asked for": (
        lambda: iter([HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"]), 0.0, "an encoding .gzip.",
    ),
    "two encodings": (
        lambda: iter([HEAD + b"Content-Encoding: br, gzip\r\nContent-Length: 3\r\n\r\nabc"]), 0.0, "encoding .br, gzip",
    ),
    "an answer after which nothing is true": (
        lambda: iter([HEAD + b"Content-Length: 20\r\n\r\n{}"]), 0.0, "cannot be reached",
    ),
    "no HTTP": (lambda: iter([b"220 mail.example ESMTP\r\n"]), 0.0, "cannot be reached"),
    "an event stream": (
        lambda: iter([
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nContent-Length: 13\r\n\r\n"
            b'data: {"a":1}'
        ]),
        0.0, "status 200 with an event stream instead of one answer: 'data:",
    ),
    "a web page": (
        lambda: iter([b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<p>log in</p>  "]),
        0.0, "status 200 with no JSON: '<p>log in</p>'",
    ),
    "a way elsewhere": (
        lambda: iter([b"HTTP/1.1 307 Moved\r\nLocation: https://elsewhere.example/\r\nContent-Length: 0\r\n\r\n"]),
        0.0, "answered 307 .it points to https://elsewhere.example/",
    ),
    "JSON nested without end": (
        lambda: iter([HEAD + b"Content-Length: 100000\r\n\r\n" + b"[" * 100_000]), 0.0, "the answer makes no sense",
    ),
}  # fmt: skip
