"""Requests that a reward service must bear, each by a name, with what must come of it: the statuses it may be answered
with, or none where it is never whole and the connection is left open."""

import json
import zlib
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass

from corpus import pictures

REFUSED = frozenset({400, 401, 408, 413, 422})
ANSWERED = frozenset({200})  # with a reason for each image that is none


@dataclass(frozen=True)
class Hostile:
    """`data` as it goes over the wire. `statuses`: those of the answer; empty: there is none, for there is more to
    come."""

    name: str
    data: bytes
    statuses: frozenset[int]


def request(
    body: bytes | str, host: str = "127.0.0.1", length: int | None = None, kind: str = "application/json",
    path: str = "/score", method: str = "POST", more: str = "",
) -> bytes:  # fmt: skip
    body = body.encode(errors="surrogatepass") if isinstance(body, str) else body
    size = len(body) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n{more}\r\n"
    return head.encode() + body


def asking(images: list[str], texts: list[str] | None = None, wants: str = "{}", **more) -> str:
    """The JSON of a request; `wants` is JSON already."""
    prompts = ",".join(
        f'{{"text": {json.dumps(text)}, "wants": {wants}, "id": 0}}' for text in texts or [""] * len(images)
    )
    rest = "".join(f", {json.dumps(name)}: {json.dumps(value)}" for name, value in more.items())
    return f'{{"images": {json.dumps(images)}, "prompts": [{prompts}]{rest}}}'


def encoded(data: bytes) -> str:
    return b64encode(data).decode()


SMALL = encoded(pictures.flat(8, 8, 8, 2))


def all_kinds(queue: int = 512) -> Iterator[Hostile]:
    """Each kind in a few sizes or places; more than a hundred in all."""
    yield from bombs(queue)
    yield from odd_json()
    yield from odd_images()
    yield from odd_counts(queue)
    yield from odd_heads()
    yield from unfinished()


def bombs(queue: int) -> Iterator[Hostile]:
    """Small bodies of large pictures."""
    for depth, kind in ((1, 0), (1, 3), (8, 0), (16, 0), (16, 6)):
        if kind == 3:
            picture = (
                pictures.header(2048, 2048, 1, 3) + pictures.chunk(b"PLTE", bytes(6)) + pictures.flat(2048, 2048)[33:]
            )
        else:
            picture = pictures.flat(2048, 2048, depth, kind)
        for count in (1, 8):
            yield Hostile(
                f"{count} of 2048 x 2048, {depth} bits, kind {kind}",
                request(asking([encoded(picture)] * count)),
                ANSWERED,
            )
        for count in (9, 24, queue):
            yield Hostile(
                f"{count} of 2048 x 2048, {depth} bits, kind {kind}",
                request(asking([encoded(picture)] * count)),
                REFUSED,
            )
    for width, height in ((13_000, 13_000), (20_000, 20_000), (2**31 - 1, 1), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1)):
        data = pictures.header(width, height, 1, 0) + pictures.chunk(b"IDAT", zlib.compress(bytes(10**6)))
        yield Hostile(
            f"{width} x {height}", request(asking([encoded(data + pictures.chunk(b"IEND", b""))] * 24)), ANSWERED
        )
    twice = pictures.header(8, 8) + pictures.header(2048, 2048)[8:] + pictures.flat(2048, 2048, 8, 2)[33:]
    yield Hostile("a second head that is larger", request(asking([encoded(twice)] * queue)), ANSWERED)
    late = pictures.flat(2048, 2048, 8, 2)
    late = late[:8] + pictures.chunk(b"tEXt", b"a\0b") + late[8:]
    yield Hostile("a head that is not first", request(asking([encoded(late)] * queue)), ANSWERED)
    text = pictures.chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
    small = pictures.flat(8, 8, 8, 2)
    yield Hostile(
        "a text within that is large", request(asking([encoded(small[:33] + text + small[33:])] * 99)), ANSWERED
    )


def odd_json() -> Iterator[Hostile]:
    for depth in (33, 300, 1000, 100_000):
        yield Hostile(
            f"wants {depth} deep", request(asking([SMALL], wants='{"a":' * depth + "1" + "}" * depth)), REFUSED
        )
        yield Hostile(
            f"lists {depth} deep", request(asking([SMALL], wants=f'{{"a": {"[" * depth}{"]" * depth}}}')), REFUSED
        )
        yield Hostile(f"nothing but {depth} brackets", request("[" * depth), REFUSED)
    for count in (10**5, 10**6, 10**7):
        yield Hostile(f"{count} empty lists", request(asking([SMALL], wants=f'{{"a": [{"[]," * count}0]}}')), REFUSED)
        yield Hostile(
            f"{count} empty lists as images", request(f'{{"images": [{"[]," * count}0], "prompts": []}}'), REFUSED
        )
        yield Hostile(f"{count} numbers as images", request(f'{{"images": [{"1," * count}0], "prompts": []}}'), REFUSED)
        yield Hostile(f"{count} keys", request("{" + ",".join(f'"{i}": 0' for i in range(count // 10)) + "}"), REFUSED)
    for length in (2**15 + 1, 10**6, 10**8):
        yield Hostile(f"a prompt of {length} letters", request(asking([SMALL], ["a" * length])), REFUSED)
        yield Hostile(
            f"a prompt of {length} bytes of faces",
            request(asking([SMALL], ["x"]).replace('"x"', f'"{"😀" * (length // 4 + 2**15)}"')),
            REFUSED,
        )
        yield Hostile(
            f"wants of {length} letters", request(asking([SMALL], wants=json.dumps({"a": "a" * length * 2}))), REFUSED
        )
        yield Hostile(f"a key of {length} letters", request(asking([SMALL], **{"k" * length: 1})), REFUSED)
        yield Hostile(f"a scorer of {length} letters", request(asking([SMALL], scorers=["s" * length])), REFUSED)
    for bad in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "9" * 5000,
        '"\\ud800"',
        '"\\udc00\\ud800"',
        "01",
        "'a'",
        "tru",
    ):
        yield Hostile(f"wants {bad[:20]}", request(asking([SMALL], wants=f'{{"a": {bad}}}')), REFUSED)
    for bad in (
        "",
        "null",
        "0",
        '""',
        "[]",
        "{",
        "{}{}",
        "\0",
        "\ufeff{}",
        "\ud800",
        '{"images": null, "prompts": null}',
    ):
        yield Hostile(f"the body {bad!a}", request(bad), REFUSED)
    yield Hostile("UTF-16", request(asking([SMALL]).encode("utf-16")), REFUSED | ANSWERED)
    yield Hostile("another type", request(asking([SMALL]), kind="text/plain"), REFUSED)


def odd_images() -> Iterator[Hostile]:
    for name, image in {
        "nothing": "", "no base64": "%%%", "not ASCII": "é", "half a pair": "\ud800", "a quantum too few": SMALL[:-1],
        "line ends": f"{SMALL[:40]}\n{SMALL[40:]}", "a URL": f"data:image/png;base64,{SMALL}", "long": "A" * 10**7,
        "long faces": "😀" * 10**6,
    }.items():  # fmt: skip
        yield Hostile(f"an image of {name}", request(asking([image])), ANSWERED)
    for name, (data, _) in pictures.refused().items():
        yield Hostile(f"a picture: {name}", request(asking([encoded(data)])), ANSWERED)


def odd_counts(queue: int) -> Iterator[Hostile]:
    yield Hostile("fewer prompts", request(asking([SMALL] * 2, [""])), REFUSED)
    yield Hostile("more prompts", request(asking([SMALL], [""] * 3)), REFUSED)
    yield Hostile("too many images", request(asking([SMALL] * (queue + 1))), REFUSED)
    yield Hostile("an unknown scorer", request(asking([SMALL], scorers=["clap"])), REFUSED)
    yield Hostile("a scorer many times", request(asking([SMALL], scorers=["mean"] * 10_000)), REFUSED)
    yield Hostile("no images", request(asking([])), ANSWERED)


def odd_heads() -> Iterator[Hostile]:
    hosts = ["elsewhere.example", "127.0.0.1.elsewhere.example", "localhost.elsewhere.example:80", "10.0.0.1", "[::2]"]
    for host in [*hosts, "localhost@elsewhere.example", "", "[::1", "127.0.0.1:80:80", "0x7f.1"]:
        yield Hostile(f"the host {host!r}", request(asking([SMALL]), host=host), REFUSED)
    yield Hostile("a length of more than is taken", request("{", length=2**40), REFUSED)
    yield Hostile("a length that is none", request("{}", more="Content-Length: x\r\n"), REFUSED)
    yield Hostile("two lengths", request("{}", more="Content-Length: 5\r\n"), REFUSED)
    yield Hostile(
        "chunks and a length", request("2\r\n{}\r\n0\r\n\r\n", more="Transfer-Encoding: chunked\r\n"), REFUSED
    )
    yield Hostile("a head of a megabyte", request("{}", more=f"X: {'a' * 10**6}\r\n"), REFUSED)
    yield Hostile("a thousand heads", request("{}", more="X: 1\r\n" * 9999), REFUSED)
    yield Hostile("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01" * 9 + b"\r\n\r\n", REFUSED)
    yield Hostile(
        "an upgrade",
        request("", method="GET", path="/health", more="Connection: Upgrade\r\nUpgrade: websocket\r\n"),
        ANSWERED,
    )
    whole = asking([SMALL], ["a" * 10**5])
    yield Hostile(
        "chunks of one letter",
        b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"1\r\n%c\r\n" % letter for letter in whole.encode())
        + b"0\r\n\r\n",
        REFUSED,
    )


def unfinished() -> Iterator[Hostile]:
    whole = request(asking([SMALL]))
    for length in (0, 1, 30, whole.index(b"\r\n\r\n") + 2, whole.index(b"\r\n\r\n") + 4, len(whole) - 1):
        yield Hostile(f"{length} bytes and no more", whole[:length], frozenset())
    for size in (10**6, 2 * 10**7):
        yield Hostile(f"{size} bytes of a longer body", request(b" " * size, length=10**8), frozenset())
