"""Tests of the reward service: its answers, the requests it refuses, and that callers do not affect each other."""

import asyncio
import json
import re
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import httpx
import hypothesis
import pytest
import schemathesis
from corpus import requests
from hypothesis import given, strategies as st
from services import Crowd, Mean, ask, drawings, encoded, plain, running, start
from starlette.testclient import TestClient

from reward_models import Prompt, limits, load, scoring
from reward_models.service import server as serve

LIMITS = {"queue": 8, "body": 200_000, "pixels": 1500}


@pytest.fixture(scope="module")
def url():
    with running({"mean": Mean(), "shapes": load("shapes")}, token="secret", wait=0.001, **LIMITS) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}, timeout=20) as client:
        yield client


def metric(client, name: str) -> float:
    return float(next(line for line in client.get("/metrics").text.splitlines() if line.startswith(name)).split()[-1])


def until(condition) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def png(width: int, height: int, data: bytes = b"") -> str:
    """A PNG file by its parts, whatever they hold."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    return b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


# -------------------------------------------------------------------------------------------------------------- answers


def test_every_image_has_its_scores_reasons_and_critiques(client):
    images, prompts = drawings(4)
    answer = client.post("/score", json=ask(images, [*prompts[:3], Prompt("no truth")])).json()
    local = load("shapes")(images, prompts)
    assert answer["names"] == {"mean": ["mean"], "shapes": ["strict", "partial"]}
    for i in range(3):
        shapes = dict(zip(("shapes.strict", "shapes.partial"), local.values[i].tolist(), strict=True))
        assert answer["scores"][i] == {"mean.mean": answer["scores"][i]["mean.mean"]} | shapes
        assert answer["critiques"][i] == {"shapes": local.critiques[i]}
    assert answer["scores"][3]["shapes.strict"] is None
    assert answer["scores"][3]["mean.mean"] > 0
    assert answer["failures"][:3] == [{}] * 3
    assert answer["failures"][3] == {
        "shapes": "prompt has no ground truth: `shapes` needs captions of the embedded world"
    }


BOMB = png(20_000, 20_000, zlib.compress(bytes(10_000_000)))
UNREADABLE = {
    "no base64": ("%%%", "Only base64 data is allowed"),
    "not ascii": ("é", "must be ASCII"),
    "nothing": ("", "cannot identify image file"),
    "garbage": (b64encode(b"garbage" * 9).decode(), "cannot identify image file"),
    "cut off": (encoded(plain([0.5])[0])[:64], "[Tt]runcated|broken|not enough"),
    "no pixels": (png(8, 8), "truncated|broken|not enough"),
    "a JPEG": (encoded(plain([0.5])[0], "JPEG"), "cannot identify image file"),
    "a bomb": (BOMB, "20000 x 20000 pixels|decompression bomb"),
    "too many pixels": (encoded(plain([0.5], size=40)[0]), "40 x 40 pixels, more than the 1500 allowed"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_that_cannot_be_read_fails_alone(client, kind):
    image, says = UNREADABLE[kind]
    body = ask([plain([0.2])[0], image, plain([0.6], size=9)[0]], scorers=["mean"])
    answer = client.post("/score", json=body).json()
    assert [row["mean.mean"] for row in answer["scores"]] == [pytest.approx(0.2), None, pytest.approx(0.6)]
    assert [list(reason) for reason in answer["failures"]] == [[], ["image"], []]
    assert answer["failures"][1]["image"].startswith("cannot be read: ")
    assert re.search(says, answer["failures"][1]["image"])


def test_no_images_have_no_scores(client):
    answer = client.post("/score", json=ask([])).json()
    assert answer == {"names": answer["names"], "scores": [], "failures": [], "critiques": []}


def test_the_meaning_of_scores_is_listed(client):
    info = client.get("/info").json()
    assert info["limits"] == {"images": 8, "body": 200_000, "pixels": 1500, "together": 2**25}
    assert info["scorers"]["mean"]["card"]["low"] == 0
    assert info["scorers"]["mean"]["card"]["high"] is None
    assert info["scorers"]["shapes"]["names"] == ["strict", "partial"]
    assert info["scorers"]["shapes"]["version"] == load("shapes").card.version


# ------------------------------------------------------------------------------------------------------------- refusals

GOOD = json.dumps(ask([plain([0.5])[0]]))
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("", 422, "Field required"),
        ("no JSON", 422, "JSON decode error"),
        (b"\xff\xfe\x00", (400, 422), "body"),
        ("[]", 422, "body: Input should be a valid dictionary"),
        (GOOD.replace('"images"', '"image"'), 422, "body.images: Field required"),
        (json.dumps(ask([plain([0.5])[0]], [Prompt("a")] * 2)), 422, "1 images but 2 prompts"),
        (json.dumps(ask(["x"] * 9)), 422, "9 images in one request; at most 8 are accepted"),
        (GOOD[:-1] + ', "more": 1}', 422, "body.more: Extra inputs are not permitted"),
        (GOOD[:-1] + ', "\\ud800": 1}', 422, "body: "),
        (GOOD[:-1] + ', "scorers": ["clap"]}', 422, "no scorer called 'clap'; known: mean, shapes"),
        (GOOD.replace('"id": 0', '"id": "0"'), 422, "body.prompts.0.id: Input should be a valid integer"),
        (GOOD.replace('"id": 0', '"id": NaN'), 422, "body.prompts.0.id: Input should be a valid integer"),
        (GOOD.replace('"id": 0', f'"id": {2**63}'), 422, "body.prompts.0.id: Input should be less than"),
        (GOOD.replace('"id": 0', '"id": ' + "1" * 5000), (400, 422), "body"),
        (GOOD.replace('"wants": {}', '"wants": {"a": [NaN]}'), 422, "Input should be a finite number"),
        (GOOD.replace('"wants": {}', '"wants": {"a": "\\ud800"}'), 422, "surrogates not allowed"),
        (GOOD.replace('"wants": {}', '"wants": {"a": ' + DEEP[99_700:100_300] + "}"), 422, "Recursion error"),
        (DEEP[1000:-1000][:190_000], (400, 422), "body"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(client, body, status, says):
    answer = client.post("/score", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (status if isinstance(status, tuple) else (status,))
    assert list(answer.json()) == ["detail"]
    assert says in answer.json()["detail"]
    assert len(answer.json()["detail"]) <= 300
    assert client.post("/score", content=GOOD, headers={"Content-Type": "application/json"}).status_code == 200


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "ü"])
def test_without_the_token_only_health_and_the_manual_are_open(url, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    for method, path in (("POST", "/score"), ("GET", "/info"), ("GET", "/metrics"), ("GET", "/nowhere")):
        answer = httpx.request(method, url + path, headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    for path in ("/health", "/docs", "/openapi.json"):
        assert httpx.get(url + path, headers=headers).status_code == 200
    assert httpx.get(url + "/info", headers={"Authorization": "bearer secret"}).status_code == 200
    assert "secret" not in httpx.get(url + "/openapi.json").text


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(client):
    body = json.dumps(ask([plain([0.5])[0]])).encode() + b" " * 200_000
    for content in (body, (body[i : i + 5000] for i in range(0, len(body), 5000))):
        answer = client.post("/score", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["detail"]) == (
            413,
            "a request has at most 200000 bytes; send fewer images",
        )


@pytest.mark.parametrize(
    ("header", "bytes_read"), [((b"transfer-encoding", b"chunked"), 11_000), ((b"content-length", b"99999"), 0)]
)
def test_no_more_of_a_body_is_read_than_the_limit(header, bytes_read):
    service = serve.app({"mean": Mean()}, body=10_000)
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/score", "raw_path": b"/score",
        "query_string": b"", "root_path": "", "scheme": "http", "client": ("a", 1), "server": ("b", 2),
        "headers": [(b"content-type", b"application/json"), header],
    }  # fmt: skip
    read, sent = [], []

    async def receive():
        read.append(1000)
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(service(scope, receive, send))
    assert sent[0]["status"] == 413
    assert sum(read) == bytes_read


def test_a_full_queue_says_when_to_come_again():
    gate = threading.Event()
    mean = Mean(gate=gate)
    with running({"mean": mean}, batch=1, queue=2, wait=0) as url, ThreadPoolExecutor(3) as pool:
        send = lambda level: httpx.post(f"{url}/score", json=ask(plain([level])), timeout=20)  # noqa: E731
        first = pool.submit(send, 0.2)
        assert mean.started.wait(10)
        others = [pool.submit(send, level) for level in (0.4, 0.6)]
        until(lambda: httpx.get(f"{url}/health").json()["waiting"] == 2)
        refused = send(0.8)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        gate.set()
        means = [answer.result().json()["scores"][0]["mean.mean"] for answer in (first, *others)]
        assert means == pytest.approx([0.2, 0.4, 0.6], abs=0.01)
        assert send(0.8).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_a_host_that_others_reach_needs_a_token(host):
    with pytest.raises(ValueError, match=f"other machines can reach host {host}: set a token"):
        serve.serve({"mean": Mean()}, host=host)


def test_limits_that_make_no_sense_are_refused():
    for settings in ({"batch": 0}, {"queue": 0}, {"body": 0}, {"pixels": 0}, {"wait": -1}):
        with pytest.raises(ValueError, match="limits above 0"):
            serve.app({"mean": Mean()}, **settings)
    with pytest.raises(ValueError, match="needs a scorer"):
        serve.app({})


@pytest.mark.parametrize(
    ("module", "missing"), [("server", "uvicorn"), ("server", "prometheus_client"), ("http", "httpx")]
)
def test_a_missing_package_is_named(monkeypatch, module, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"reward_models.service.{module}", raising=False)
    with pytest.raises(ValueError, match=rf"needs {missing}: pip install 'mmalign\[serve\]'"):
        import_module(f"reward_models.service.{module}")


# -------------------------------------------------------------------------------------------------------- many at once


def test_sixty_four_callers_share_batches_and_each_gets_its_own_scores():
    levels = [i / 255 for i in range(64)]
    mean = Mean(0.02)
    with running({"mean": mean}, wait=0.02) as url, httpx.Client(timeout=20) as client, ThreadPoolExecutor(64) as pool:
        bodies = [ask(plain([level, 1 - level])) for level in levels]
        answers = list(pool.map(lambda body: client.post(f"{url}/score", json=body).json(), bodies))
        client.base_url = url
        batches, images = metric(client, "reward_batch_images_count"), metric(client, "reward_batch_images_sum")
    for level, answer in zip(levels, answers, strict=True):
        assert [row["mean.mean"] for row in answer["scores"]] == pytest.approx([level, 1 - level], abs=1e-6)
    assert images == sum(mean.calls) == 128
    assert batches == len(mean.calls) < 64
    assert max(mean.calls) > 2


def test_a_groupwise_scorer_sees_the_prompts_of_one_caller_only():
    with running({"crowd": Crowd(), "mean": Mean(0.02)}, wait=0.05) as url, ThreadPoolExecutor(8) as pool:
        prompts = [Prompt("a", {}, 1)] * 3 + [Prompt("b", {}, 2)] * 2
        images = plain([0.1, 0.2, 0.3, 0.4, 0.5])
        answers = list(pool.map(lambda _: httpx.post(f"{url}/score", json=ask(images, prompts)).json(), range(8)))
        with httpx.Client(base_url=url) as client:
            assert metric(client, "reward_batch_images_count") < 8
    for answer in answers:
        assert [row["crowd.siblings"] for row in answer["scores"]] == [3, 3, 3, 2, 2]
        assert [row["crowd.prompts"] for row in answer["scores"]] == [2] * 5


@pytest.mark.parametrize("error", ["ValueError", "KeyError", "MemoryError", "SystemExit", "KeyboardInterrupt"])
def test_one_callers_prompt_that_breaks_a_scorer_costs_no_other_caller_a_score(error):
    mean = Mean()
    with running({"mean": mean, "crowd": Crowd()}, wait=0.2, batch=7) as url, ThreadPoolExecutor(3) as pool:
        texts = ["fine", error, "fine"]
        bodies = [ask(plain([0.2, 0.4]), [Prompt("fine", {}, 0), Prompt(text, {}, 1)]) for text in texts]
        answers = list(pool.map(lambda body: httpx.post(f"{url}/score", json=body).json(), bodies))
        assert max(mean.calls) == 6
        for text, answer in zip(texts, answers, strict=True):
            assert answer["scores"][0] == {"mean.mean": pytest.approx(0.2), "crowd.siblings": 1, "crowd.prompts": 2}
            assert answer["scores"][1]["crowd.siblings"] == 1
            if text == "fine":
                assert answer["scores"][1]["mean.mean"] == pytest.approx(0.4)
                assert answer["failures"] == [{}, {}]
            else:
                assert answer["scores"][1]["mean.mean"] is None
                assert "on purpose" in answer["failures"][1]["mean"]
        assert httpx.get(f"{url}/health").json()["ok"]
        with httpx.Client(base_url=url) as client:
            assert metric(client, 'reward_failures_total{scorer="mean"}') == 1
            assert metric(client, 'reward_requests_total{status="200"}') == 3
            assert metric(client, "reward_request_seconds_count") == 3


class Short:
    """Returns too few scores: what broadcasting would silently spread over all images."""

    names, card = ("one",), Mean().card

    def __call__(self, images, prompts):
        return scoring.each(images[:1], prompts[:1], self.names, lambda images, _: images.mean((1, 2, 3))[:, None])


def test_a_scorer_that_returns_too_few_scores_has_none():
    with running({"short": Short(), "mean": Mean()}) as url:
        answer = httpx.post(f"{url}/score", json=ask(plain([0.2, 0.4]))).json()
    assert [row["mean.mean"] for row in answer["scores"]] == pytest.approx([0.2, 0.4])
    # shown alone, by halving, each image has its score after all
    assert [row["short.one"] for row in answer["scores"]] == pytest.approx([0.2, 0.4])


def test_a_caller_that_leaves_does_not_break_the_batch():
    gate = threading.Event()
    mean = Mean(gate=gate)
    with running({"mean": mean}, batch=4, wait=0) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(httpx.post, f"{url}/score", json=ask(plain([0.2])), timeout=20)
        assert mean.started.wait(10)
        body = json.dumps(ask(plain([0.9]))).encode()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as leaver:
            leaver.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            leaver.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: httpx.get(f"{url}/health").json()["waiting"] == 1)
        stayer = pool.submit(httpx.post, f"{url}/score", json=ask(plain([0.4])), timeout=20)
        until(lambda: httpx.get(f"{url}/health").json()["waiting"] == 2)
        gate.set()
        means = [answer.result().json()["scores"][0]["mean.mean"] for answer in (first, stayer)]
        assert means == pytest.approx([0.2, 0.4])
        assert httpx.get(f"{url}/health").json() == {"ok": True, "waiting": 0}


# --------------------------------------------------------------------------------------------------------------- ending


@pytest.fixture(scope="module")
def processes():
    """Two services, started together: one to finish its work, one that is too slow to."""
    settings = ({"seconds": 0.3, "batch": 1}, {"seconds": 86_400, "batch": 1, "grace": 1})
    with ThreadPoolExecutor(2) as pool:
        services = list(pool.map(lambda arguments: start(**arguments), settings))
    yield services
    for process, _ in services:
        process.kill()
        process.wait()


def send_and_stop(process, url, count, number):
    """The answers or errors of requests in flight when the process gets the signal `number`; and its exit code."""
    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(httpx.post, f"{url}/score", json=ask(plain([0.5])), timeout=600) for _ in range(count)]
        until(lambda: httpx.get(f"{url}/health").json()["waiting"] == count - 1)
        process.send_signal(number)
        code = process.wait(600)
        return [future.exception() or future.result() for future in waiting], code


def test_sigterm_finishes_what_waits_and_exits_with_0(processes):
    answers, code = send_and_stop(*processes[0], 4, signal.SIGTERM)
    assert [answer.json()["scores"] for answer in answers] == [[{"mean.mean": pytest.approx(0.5, abs=0.01)}]] * 4
    assert code == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{processes[0][1]}/health")


def test_a_scorer_that_hangs_does_not_keep_the_service_from_ending(processes):
    """It would take a day; the grace is a second."""
    answers, code = send_and_stop(*processes[1], 2, signal.SIGINT)
    assert not any(isinstance(answer, httpx.Response) and answer.status_code == 200 for answer in answers)
    assert code == 0


# -------------------------------------------------------------------------------------------------------------- OpenAPI


@pytest.fixture(scope="module")
def fuzzed():
    with running(CRITICS, wait=0, **LIMITS) as url:
        yield url
        assert httpx.get(f"{url}/health").json() == {"ok": True, "waiting": 0}


CRITICS = {"mean": Mean(), "crowd": Crowd()}
schema = schemathesis.openapi.from_dict(serve.app(CRITICS).openapi())


@schema.parametrize()
@hypothesis.settings(max_examples=40, derandomize=True, deadline=None, database=None)
def test_the_service_does_what_its_openapi_says(fuzzed, case):
    case.call_and_validate(
        base_url=fuzzed,
        checks=[
            schemathesis.checks.not_a_server_error,
            schemathesis.checks.response_schema_conformance,
            schemathesis.checks.status_code_conformance,
            schemathesis.checks.content_type_conformance,
        ],
    )


def test_a_service_that_ends_takes_no_more_and_says_so():
    service = serve.app({"mean": Mean()})
    with TestClient(service) as client:
        assert client.post("/score", json=ask(plain([0.5]))).status_code == 200
    answer = TestClient(service).post("/score", json=ask(plain([0.5])))
    assert (answer.status_code, answer.json()["detail"]) == (503, "the service is shutting down")


# ------------------------------------------------------------------------------------------------------ hostile callers

MOST = 3 * 2**30  # bytes of memory, one request after another; docs/serve.md says how much more many at once take


def most_memory(process) -> int:
    """The most bytes of memory that a process has held."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024


def sent(url: str, hostile: requests.Hostile) -> tuple[int | None, socket.socket]:
    """Send raw bytes. The status of the answer, None without one; and the connection."""
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=600)
    with suppress(BrokenPipeError, ConnectionResetError):  # it was refused before it was complete
        connection.sendall(hostile.data)
    if not hostile.statuses:
        return None, connection
    try:
        head = connection.recv(12)
    except ConnectionResetError:
        head = b""
    return int(head[9:12]) if len(head) == 12 else None, connection


def bear(hostiles, process, url: str) -> int:
    """Send each, and a good one after each; the most bytes of memory this took."""
    good, left = ask([plain([0.4])[0]], scorers=["mean"]), []
    with httpx.Client(base_url=url, timeout=600) as client:
        for hostile in hostiles:
            status, connection = sent(url, hostile)
            # where the answer was lost, for it came before all was sent, the connection was closed: no less a refusal
            assert status in hostile.statuses or (status is None and 200 not in hostile.statuses), hostile.name
            left.append(connection) if status is None and not hostile.statuses else connection.close()
            answer = client.post("/score", json=good)
            assert answer.status_code == 200, (hostile.name, answer.text)
            assert answer.json()["scores"] == [{"mean.mean": pytest.approx(0.4)}], hostile.name
    for connection in left:
        connection.close()
    assert process.poll() is None
    return most_memory(process)


def test_a_service_bears_hostile_requests_within_bounded_memory():
    """One of each kind."""
    firsts: dict[str, requests.Hostile] = {}
    for kind in (requests.bombs(512), requests.odd_json(), requests.odd_images(), requests.odd_counts(512),
                 requests.odd_heads(), requests.unfinished()):  # fmt: skip
        for hostile in kind:
            firsts.setdefault(re.sub(r"\d+|: .*|'.*", "", hostile.name), hostile)
    process, url = start(seconds=0, scorers=["jpeg_size"])
    try:
        assert bear(firsts.values(), process, url) < MOST
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_service_bears_all_hostile_requests_in_a_row():
    hostiles = list(requests.all_kinds())
    assert len(hostiles) > 100
    process, url = start(seconds=0, scorers=["jpeg_size"])
    try:
        assert bear(hostiles, process, url) < MOST
    finally:
        process.kill()
        process.wait()


def beginning(url: str, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=600)
    connection.sendall(data)
    return connection


def rest(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


BODY = json.dumps(ask([plain([0.5])[0]])).encode()
WHOLE = requests.request(BODY)


@pytest.mark.parametrize("length", [0, 1, 20, WHOLE.index(b"\r\n\r\n") + 3])
def test_a_caller_with_an_incomplete_head_is_disconnected(monkeypatch, length):
    monkeypatch.setattr(limits, "HEAD", 0.1)
    with running({"mean": Mean()}) as url:
        assert rest(beginning(url, WHOLE[:length])) == b""
        slow = beginning(url, WHOLE)  # after an answer too
        slow.sendall(WHOLE[:length])
        assert rest(slow).startswith(b"HTTP/1.1 200 OK")


def test_a_scorer_may_take_longer_than_a_caller(monkeypatch):
    monkeypatch.setattr(limits, "HEAD", 0.05)
    monkeypatch.setattr(limits, "ARRIVAL", 0.1)
    with running({"mean": Mean(0.4)}) as url:
        answer = httpx.post(f"{url}/score", content=BODY, headers={"Content-Type": "application/json"}, timeout=600)
        assert answer.status_code == 200


@pytest.mark.parametrize("length", [0, 1, len(BODY) - 1])
def test_a_caller_with_an_incomplete_body_gets_an_error_and_is_disconnected(monkeypatch, length):
    monkeypatch.setattr(limits, "ARRIVAL", 0.1)
    with running({"mean": Mean()}) as url:
        answer = rest(beginning(url, WHOLE[: len(WHOLE) - len(BODY) + length]))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body did not arrive within 0.1 s" in answer
        assert httpx.get(f"{url}/health").json()["ok"]


def test_bodies_are_bounded_together_whoever_sends_them(monkeypatch):
    monkeypatch.setattr(limits, "BODIES", 100_000)
    part = requests.request(b" " * 40_000, length=90_000)
    with running({"mean": Mean()}, body=100_000) as url:
        halves = [beginning(url, part), beginning(url, part)]
        until(lambda: httpx.post(f"{url}/score", content=b" " * 40_000).status_code == 503)
        refused = httpx.post(f"{url}/score", content=b" " * 40_000)
        assert refused.json() == {"detail": "too much data is being sent at once"}
        assert refused.headers["Retry-After"] == "1"
        for half in halves:
            half.close()
        until(lambda: httpx.post(f"{url}/score", content=b" " * 90_000).status_code == 422)  # they no longer count


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(limits, "CONNECTIONS", 3)
    with running({"mean": Mean()}) as url:
        others = [beginning(url, WHOLE[:20]) for _ in range(3)]
        assert rest(beginning(url, b"")) == b""
        for other in others:
            other.close()
        until(
            lambda: rest(beginning(url, WHOLE.replace(b"Host", b"Connection: close\r\nHost"))).startswith(
                b"HTTP/1.1 200"
            )
        )


@pytest.mark.parametrize(
    ("bound", "value", "status", "says"),
    [
        ("VALUES", 5, 413, "a request has at most 5 values"),
        ("TOGETHER", 127, 422, "128 pixels in one request; at most 127 are accepted"),
        ("QUEUED", 127, 503, "0 images are waiting"),
    ],
)
def test_a_bound_is_named(monkeypatch, bound, value, status, says):
    with running({"mean": Mean()}) as url:
        assert httpx.post(f"{url}/score", json=ask(plain([0.1, 0.2]))).status_code == 200
        monkeypatch.setattr(limits, bound, value)
        answer = httpx.post(f"{url}/score", json=ask(plain([0.1, 0.2])))
        assert answer.status_code == status
        assert answer.json()["detail"].startswith(says)


def test_a_batch_is_bounded_in_pixels(monkeypatch):
    monkeypatch.setattr(limits, "TOGETHER", 200)
    mean = Mean()
    with running({"mean": mean}, wait=0.5) as url, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda level: httpx.post(f"{url}/score", json=ask(plain([level]))), [0.2] * 4))
    assert [answer.json()["scores"] for answer in answers] == [[{"mean.mean": pytest.approx(0.2)}]] * 4
    assert max(mean.calls) <= 3  # of 64 pixels each


def test_a_host_is_this_machine_by_its_own_names():
    for host in ("127.0.0.1", "127.0.0.1:80", "localhost", "LOCALHOST:8000", "[::1]", "[::1]:8000", "127.1.2.3"):
        assert serve.local(host)
    for host in ("", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[::1",
                 "::1]", "a@127.0.0.1", "127.0.0.1/x", "10.0.0.1", "[::2]", "0.0.0.0", "127.0.0.1:80:80"):  # fmt: skip
        assert not serve.local(host)


@given(st.text(max_size=60))
@hypothesis.settings(derandomize=True, deadline=None, database=None)
def test_no_other_text_is_this_machine(text):
    assert not serve.local(text) or text.partition(":")[0].lower() == "localhost" or text[0] in "1["


def test_the_service_answers_to_no_other_name():
    for host, status in (("elsewhere.example", 400), ("localhost:1", 200), ("[::1]", 200)):
        client = TestClient(serve.app({"mean": Mean()}, host="127.0.0.1"), headers={"Host": host})
        assert client.get("/health").status_code == status
    assert (
        TestClient(serve.app({"mean": Mean()}, host="0.0.0.0")).get("/health", headers={"Host": "a"}).status_code == 200
    )
