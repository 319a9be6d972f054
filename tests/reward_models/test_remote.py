"""Tests of the client of a reward service, against working and faulty servers: a fault gives a reason, never a 0."""

import json
import re
import signal
import threading
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import count, repeat

import httpx
import pytest
import torch
from PIL import Image
from services import INFO, Crowd, Faulty, Mean, drawings, plain, running, start

from reward_models import Prompt, limits, load
from reward_models.images import from_pil, png, to_pil, to_uint8
from reward_models.service import http as link
from reward_models.service.client import Remote, packed

FINE = [Prompt("", {}, i) for i in range(8)]
QUICK = dict(timeout=0.4, retries=1, rest=0.2)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(link, "PAUSE", 0.01)
    monkeypatch.delenv("MMALIGN_TOKEN", raising=False)


@pytest.fixture
def faulty():
    server = Faulty()
    yield server
    server.close()


@pytest.mark.parametrize("name", ["jpeg_size", "shapes", "clip", "image_stats"])
def test_remote_scores_are_the_local_ones(name):
    images, prompts = drawings(9)
    local = load(name)
    prompts[8] = Prompt("without truth", {}, 8)
    with running({name: local}) as url:
        remote = Remote(url)
        scores, expected = remote(images, prompts), local(images, prompts)
        in_parts = Remote(url, batch=4)(images, prompts)
    assert remote.names == tuple(f"{name}.{component}" for component in local.names)
    torch.testing.assert_close(scores.values, expected.values, rtol=0, atol=0, equal_nan=True)
    # sums of floats depend on how many images a model is shown at once
    torch.testing.assert_close(in_parts.values, expected.values, rtol=0, atol=1e-6, equal_nan=True)
    assert scores.failures == in_parts.failures == expected.failures
    assert scores.critiques == in_parts.critiques == expected.critiques


@pytest.mark.parametrize("batch", [2, 16])
def test_regions_requests_and_replies_are_those_of_the_scorer(batch):
    images, prompts = drawings(9)
    prompts = [*prompts[1:], Prompt("without truth", {}, 8)]  # each image is of another prompt
    prompts[0] = Prompt("a circle and a square", {}, 0)  # which leaves colours and the relation open
    local = load("shapes_critic")
    with running({"jpeg_size": load("jpeg_size"), "critic": local}) as url:
        remote, scores = Remote(url), Remote(url, scorers=["critic"], batch=batch)(images, prompts)
        both = remote(images, prompts)
    expected = local(images, prompts)
    assert remote.card.has_map
    assert torch.equal(scores.regions.nan_to_num(7), expected.regions.nan_to_num(7))
    assert torch.equal(both.regions.nan_to_num(7), expected.regions.nan_to_num(7))
    for field in ("critiques", "boxes", "requests", "replies", "failures"):
        assert getattr(scores, field) == getattr(expected, field), field
    assert any(scores.requests)
    assert any(scores.boxes)
    assert both.boxes == expected.boxes


def test_a_caller_that_does_not_ask_gets_no_details():
    images, prompts = drawings(1)
    body = {"images": [png(picture) for picture in to_pil(images)], "prompts": [{"text": prompts[0].text}]}
    with running({"critic": load("shapes_critic")}) as url:
        plain, whole = (httpx.post(f"{url}/score", json=body | more).json() for more in ({}, {"details": True}))
    assert "details" not in plain
    assert plain == {key: value for key, value in whole.items() if key != "details"}
    assert len(whole["details"]) == 1


DETAILS = {
    "no grid": {"map": [[0.5, 0.5], [0.5]]},
    "an empty grid": {"map": []},
    "outside the range": {"map": [[1.5]]},
    "an empty box": {"boxes": [{"box": [3, 0, 3, 1], "credit": 0}]},
    "credit above 1": {"boxes": [{"box": [0, 0, 3, 1], "credit": 2}]},
    "an unknown field": {"code": "import os"},
}


@pytest.mark.parametrize("kind", DETAILS)
def test_details_that_make_no_sense_are_no_score(faulty, kind):
    faulty.info = json.loads(json.dumps(INFO)) | {"details": True}
    faulty.info["scorers"]["clip"]["card"]["has_map"] = True
    faulty.reply = lambda sent: (
        200,
        {},
        json.dumps(faulty.answer(sent) | {"details": [{"clip": DETAILS[kind]}]}).encode(),
    )
    scores = Remote(faulty.url, **QUICK)(plain([0.1]), FINE[:1])
    assert scores.values.isnan().all()
    assert scores.failures[0].startswith("the answer makes no sense: ")
    faulty.reply = lambda sent: (
        200,
        {},
        json.dumps(faulty.answer(sent) | {"details": [{"clip": {"map": [[0.5]]}}]}).encode(),
    )
    assert Remote(faulty.url, **QUICK)(plain([0.1]), FINE[:1]).regions.tolist() == [[[0.5]]]


def test_maps_of_different_shapes_fail_those_after_the_first(faulty):
    faulty.info = json.loads(json.dumps(INFO)) | {"details": True}
    faulty.info["scorers"]["clip"]["card"]["has_map"] = True
    sizes = iter([[[0.5]], [[0.5, 0.5]]])
    faulty.reply = lambda sent: (
        200, {}, json.dumps(faulty.answer(sent) | {"details": [{"clip": {"map": next(sizes)}}]}).encode()
    )  # fmt: skip
    scores = Remote(faulty.url, batch=1, workers=1, **QUICK)(plain([0.1, 0.2]), FINE[:2])
    assert scores.failures == {1: "its map has 1 x 2 cells, that of others 1 x 1"}
    assert scores.values.isnan().any(1).tolist() == [False, True]


def test_the_contract_holds_from_afar():
    """Order, no neighbours, broken images, no images: as any other scorer."""
    images, prompts = drawings(7)
    with running({"shapes": load("shapes"), "mean": Mean()}) as url:
        remote = Remote(url, batch=3)
        whole = remote(images, prompts).values
        order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        assert torch.equal(remote(images[order], [prompts[i] for i in order]).values, whole[order])
        images[2, 0, 0, 0], images[4] = torch.nan, -1
        scores = remote(images, prompts)
        assert scores.failures == {2: "a pixel is not finite", 4: "pixels from -1 to -1; an image lies in [0, 1]"}
        rest = [0, 1, 3, 5, 6]
        assert torch.equal(scores.values[rest], whole[rest])
        assert remote(images[:0], []).values.shape == (0, 3)
        with pytest.raises(ValueError, match="7 images but 6 prompts"):
            remote(images, prompts[:6])


def test_the_card_changes_with_the_service():
    with running({"jpeg_size": load("jpeg_size"), "mean": Mean()}) as url:
        both, one = Remote(url), Remote(url, scorers=["mean"])
    with running({"jpeg_size": load("jpeg_size", quality=50), "mean": Mean()}) as url:
        rough = Remote(url)
    assert both.card.settings["jpeg_size"] == load("jpeg_size").card.version
    assert len({both.card.version, one.card.version, rough.card.version}) == 3
    assert one.names == ("mean.mean",)
    assert (one.card.low, both.card.high) == (0, torch.inf)


def test_prompts_and_pixels_arrive_as_they_are(faulty):
    images, prompts = drawings(5)
    prompts[4] = Prompt("é 猫 \n", {"a": [1, 2.5, None, {"b": True}]}, -(2**63))
    Remote(faulty.url, batch=2, workers=1)(images, prompts)
    sent = [(prompt, png) for ask in faulty.asks for prompt, png in zip(ask["prompts"], ask["images"], strict=True)]
    assert [prompt for prompt, _ in sent] == [{"text": p.text, "wants": dict(p.wants), "id": p.id} for p in prompts]
    pictures = from_pil([Image.open(BytesIO(b64decode(png))) for _, png in sent])
    assert torch.equal(to_uint8(pictures), to_uint8(images))


def test_the_images_of_a_prompt_stay_in_one_request():
    prompts = [Prompt("ab"[i % 2], {}, i % 2) for i in range(8)]
    with running({"crowd": Crowd()}, wait=0) as url:
        scores = Remote(url, batch=3, workers=2)(plain([0.1] * 8), prompts)
    assert scores.column("crowd.siblings").tolist() == [4] * 8
    assert packed([[0, 1], [2, 3, 4, 5], [6]], 3) == [[0, 1], [2, 3, 4, 5], [6]]
    assert packed([[0], [1], [2]], 2) == [[0, 1], [2]]


# ------------------------------------------------------------------------------------------------------- faults


def lies(**changed):
    return lambda faulty, sent: json.dumps(faulty.answer(sent) | changed).encode()


def edited(old, new):
    return lambda faulty, sent: json.dumps(faulty.answer(sent)).encode().replace(old, new, 1)


BODIES = {
    "garbage": lambda faulty, sent: b"\x00\xffgarbage",
    "nothing": lambda faulty, sent: b"",
    "another shape": lambda faulty, sent: b"[]",
    "a wrong count": lies(scores=[{"clip.cosine": 0.5}]),
    "no failures": lies(failures=[]),
    "other names": lies(names={"clip": ["logit"]}),
    "another scorer": edited(b'"clip.cosine"', b'"clip.other"'),
    "NaN": edited(b"0.5", b"NaN"),
    "infinity": edited(b"0.5", b"Infinity"),
    "too large for a float": edited(b"0.5", b"1e999"),
    "large": edited(b"0.5", b"1e300"),
    "a string": edited(b"0.5", b'"0.5"'),
    "true": edited(b"0.5", b"true"),
    "a missing key": edited(b'"critiques"', b'"comments"'),
    "too deep": lambda faulty, sent: b"[" * 100_000,
    "cut off": lambda faulty, sent: json.dumps(faulty.answer(sent)).encode()[:-9],
}


@pytest.mark.parametrize("kind", BODIES)
def test_an_answer_that_makes_no_sense_is_no_score(faulty, kind):
    faulty.reply = lambda sent: (200, {}, BODIES[kind](faulty, sent))
    scores = Remote(faulty.url, **QUICK)(plain([0.1, 0.2, 0.3]), FINE[:3])
    assert scores.values.isnan().all()
    assert len(scores.failures) == 3
    assert all(reason.startswith("the answer makes no sense: ") for reason in scores.failures.values())
    assert len(faulty.asks) == 1  # asking again would bring the same


@pytest.mark.parametrize(
    ("status", "asks", "says"),
    [
        (500, 1, "the service answered 500: oops"),
        (404, 1, "the service answered 404: oops"),
        (413, 1, "the service answered 413: oops"),
        (401, 1, "the service answered 401: oops"),
        (503, 3, "the service answered 503: oops"),
        (429, 3, "the service answered 429: oops"),
    ],
)
def test_a_refusal_is_no_score_and_only_a_busy_service_is_asked_again(faulty, status, asks, says):
    faulty.reply = lambda sent: (status, {}, b"oops")
    scores = Remote(faulty.url, timeout=5, retries=2)(plain([0.1]), FINE[:1])
    assert scores.values.isnan().all()
    assert scores.failures == {0: says}
    assert len(faulty.asks) == asks


def test_a_busy_service_is_waited_for_as_long_as_it_asks(faulty):
    numbers, began = count(), time.monotonic()
    faulty.reply = lambda sent: (503, {"Retry-After": "1"}, b"") if next(numbers) < 1 else faulty.well(sent)
    scores = Remote(faulty.url, timeout=5, retries=2)(plain([0.1]), FINE[:1])
    assert time.monotonic() - began >= 1
    assert scores.values.tolist() == [[0.5]]
    assert not scores.failures


def test_a_service_that_asks_for_more_time_than_there_is_is_not_asked_again(faulty):
    faulty.reply = lambda sent: (503, {"Retry-After": "3600"}, b"")
    scores = Remote(faulty.url, **QUICK)(plain([0.1]), FINE[:1])
    assert scores.failures == {0: "the service answered 503"}
    assert len(faulty.asks) == 1


def test_an_answer_without_an_end_is_cut(faulty, monkeypatch):
    monkeypatch.setattr(limits, "ANSWER", 10_000)
    faulty.reply = lambda sent: (200, {}, repeat(b" " * 1000))
    scores = Remote(faulty.url, **QUICK)(plain([0.1]), FINE[:1])
    assert scores.failures == {0: "the answer is larger than 10000 bytes"}
    faulty.reply = lambda sent: (200, {}, (time.sleep(0.05) or b" " for _ in repeat(0)))
    scores = Remote(faulty.url, **QUICK)(plain([0.1]), FINE[:1])
    assert scores.failures == {0: "no complete answer within 0.4 s"}


def test_a_service_that_hangs_or_hangs_up_is_a_reason(faulty):
    release = threading.Event()
    faulty.reply = lambda sent: release.wait(60) and None
    scores = Remote(faulty.url, **QUICK)(plain([0.1]), FINE[:1])
    assert scores.failures == {0: "no answer within 0.4 s"}
    release.set()
    faulty.reply = lambda sent: None
    scores = Remote(faulty.url, **QUICK)(plain([0.1]), FINE[:1])
    assert scores.failures[0].startswith("cannot be reached: ")
    assert scores.values.isnan().all()


def test_one_request_that_fails_costs_the_others_nothing(faulty):
    faulty.reply = lambda sent: (500, {}, b"") if sent["prompts"][0]["id"] == 2 else faulty.well(sent)
    scores = Remote(faulty.url, batch=2, workers=1)(plain([0.1] * 6), FINE[:6])
    assert scores.values[:, 0].isnan().tolist() == [False, False, True, True, False, False]
    assert list(scores.failures) == [2, 3]


def test_what_failed_over_there_keeps_its_reason_and_has_no_number(faulty):
    """Even if a number is sent with it: a 0 that stands for a fault is not believed."""

    def reply(sent):
        failures = [{"clip": "out of memory"}, {}, {"image": "cannot be read"}]
        return 200, {}, json.dumps(faulty.answer(sent) | {"failures": failures}).encode()

    faulty.reply = reply
    scores = Remote(faulty.url)(plain([0.1] * 3), FINE[:3])
    assert scores.values[:, 0].isnan().tolist() == [True, False, True]
    assert scores.failures == {0: "out of memory", 2: "cannot be read"}


@pytest.fixture
def clock(monkeypatch):
    """The clock of the circuit breakers, in seconds; it stands still unless a test advances it."""
    now = [0.0]
    monkeypatch.setattr(link, "clock", lambda: now[0])
    return now


def test_the_breaker_spares_a_service_that_is_down_and_tries_again_later(faulty, clock):
    faulty.reply = lambda sent: (500, {}, b"")
    remote = Remote(faulty.url, batch=1, workers=1, retries=0, faults=3, rest=0.3)
    scores = remote(plain([0.1] * 8), FINE)
    assert len(faulty.asks) == 3
    assert scores.values.isnan().all()
    assert scores.failures[7] == "not sent, because 3 requests in a row failed; the last: the service answered 500"
    clock[0] = 0.35
    remote(plain([0.1] * 4), FINE[:4])
    assert len(faulty.asks) == 4  # one trial
    clock[0] = 0.7
    faulty.reply = faulty.well
    assert remote(plain([0.1] * 8), FINE).values.tolist() == [[0.5]] * 8


def test_one_request_tries_a_broken_service_however_long_it_takes(clock):
    breaker = link.Breaker(1, rest=0.05)
    with pytest.raises(link.Fault, match="down"), breaker:
        raise link.Fault("down")
    clock[0] = 0.06
    with breaker:
        clock[0] = 0.12
        with pytest.raises(link.Fault, match="the last: down"), breaker:
            pass
    with breaker:  # it went well
        pass


def test_a_refusal_does_not_break_the_circuit(faulty):
    faulty.reply = lambda sent: (422, {}, b"")
    remote = Remote(faulty.url, batch=1, workers=1, faults=2)
    remote(plain([0.1] * 6), FINE[:6])
    assert len(faulty.asks) == 6


def test_a_process_that_hangs_and_one_killed_in_the_middle_are_reasons():
    process, url = start(seconds=0.1, batch=1)

    def reach(images):
        while float(re.search(r"^reward_images_total (.*)", httpx.get(f"{url}/metrics").text, re.M)[1]) < images:
            time.sleep(0.01)

    def kill():
        reach(4)
        process.kill()

    try:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ValueError, match=r"no answer within 0\.4 s"):
            Remote(url, **QUICK)
        process.send_signal(signal.SIGCONT)
        remote = Remote(url, batch=1, workers=1, timeout=1, retries=1, faults=2)
        process.send_signal(signal.SIGSTOP)
        assert remote(plain([0.5]), FINE[:1]).failures == {0: "no answer within 1 s"}
        process.send_signal(signal.SIGCONT)
        reach(2)  # both tries have been scored, for nobody
        killer = threading.Thread(target=kill)
        killer.start()
        scores = remote(plain([i / 10 for i in range(8)]), FINE)
        killer.join()
    finally:
        process.kill()
        process.wait()
    scored = ~scores.values[:, 0].isnan()
    assert scored[0]
    assert not scored[-1]
    torch.testing.assert_close(scores.values[scored, 0], torch.arange(8)[scored] / 10, atol=3e-3, rtol=0)
    assert list(scores.failures) == (~scored).nonzero()[:, 0].tolist()


def test_sixty_four_callers_get_their_own_scores():
    mean = Mean(0.02)
    with running({"mean": mean}, wait=0.02, queue=512) as url, ThreadPoolExecutor(64) as pool:
        remote = Remote(url)
        levels = torch.arange(64) / 255
        scores = list(pool.map(lambda level: remote(plain([level, 1 - level]), FINE[:2]), levels.tolist()))
    values = torch.stack([item.values[:, 0] for item in scores])
    torch.testing.assert_close(values, torch.stack([levels, 1 - levels], 1), atol=1e-6, rtol=0)
    assert len(mean.calls) < 64


def test_a_full_queue_is_waited_for():
    mean = Mean(0.05)
    with running({"mean": mean}, batch=2, queue=4, wait=0) as url:
        remote = Remote(url, batch=2, workers=6, retries=9)
        scores = remote(plain([i / 20 for i in range(16)]), [Prompt("", {}, i) for i in range(16)])
    assert not scores.failures
    torch.testing.assert_close(scores.values[:, 0], torch.arange(16) / 20, atol=3e-3, rtol=0)


# --------------------------------------------------------------------------------------------- who may and where


def test_the_token_comes_from_the_environment_and_is_never_shown(monkeypatch, faulty):
    with running({"mean": Mean()}, token="secret") as url:
        for token in (None, "wrong"):
            with pytest.raises(ValueError, match="answered 401") as error:
                Remote(url, token=token)
            assert "wrong" not in str(error.value)
        monkeypatch.setenv("MMALIGN_TOKEN", "secret")
        remote = Remote(url)
        assert not remote(plain([0.5]), FINE[:1]).failures
        assert "secret" not in f"{remote.card} {remote.card.settings} {remote!r} {vars(remote)}"
    faulty.reply = lambda sent: (400, {}, f"you sent {sent['authorization']}".encode())
    scores = Remote(faulty.url, token="hush")(plain([0.5]), FINE[:1])
    assert scores.failures == {0: "the service answered 400: you sent Bearer ..."}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(url="http://127.0.0.1:9"), "http://127.0.0.1:9: cannot be reached"),
        (dict(url="nonsense"), "remote: nonsense"),
        (dict(url="http://user:password@127.0.0.1"), "a URL with a password in it"),
        (dict(batch=0), "batch, workers, faults and timeout must be above 0"),
        (dict(scorers=["clap"]), "it has clip; requested: clap"),
    ],
)
def test_a_service_that_is_not_there_is_reported_in_one_line(faulty, settings, says):
    with pytest.raises(ValueError, match=says) as error:
        Remote(**{"url": faulty.url} | settings)
    assert "\n" not in str(error.value)


def test_something_else_that_answers_is_no_service(faulty, monkeypatch):
    monkeypatch.setitem(INFO, "limits", "none")
    with pytest.raises(ValueError, match="this is not a reward service"):
        Remote(faulty.url)


def test_prompts_that_are_no_json_fail_alone(faulty):
    prompts = [FINE[0], Prompt("half \ud800"), Prompt("x", {"a": object()}), FINE[3]]
    scores = Remote(faulty.url)(plain([0.1] * 4), prompts)
    assert scores.values[:, 0].isnan().tolist() == [False, True, True, False]
    assert all(reason.startswith("the prompt has no JSON form") for reason in scores.failures.values())
