"""Tests of judges behind a server: real HTTP, its failures, and one real server with a real model."""

import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny_vlm
import torch
from chats import CUT, HANG, Busy, chatting, completion, picture
from judge_texts import FULL

from reward_models import Prompt, load
from reward_models.images import to_uint8
from reward_models.vlm import ask, templates

IMAGES = torch.rand(8, 3, 32, 48, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
PROMPTS = [Prompt("a red circle", {}, 1)] * 8
TOP = [{"token": "Yes", "logprob": math.log(0.6)}, {"token": " no", "logprob": math.log(0.2)}]


def of(url, scorer="rational", **settings):
    return load(scorer, model="m", url=url, **{"timeout": 5, "retries": 0} | settings)


def test_pictures_arrive_as_they_are_after_the_rules():
    with chatting(lambda request: completion(FULL)) as (url, requests):
        scorer = of(url, concurrency=1)
        scores = scorer(IMAGES, PROMPTS)
    assert scores.column("overall").tolist() == pytest.approx([0.75] * 8)
    for request, image in zip(requests, IMAGES, strict=True):
        assert np.array_equal(np.asarray(picture(request)).transpose(2, 0, 1), to_uint8(image[None])[0].numpy())
        assert [message["role"] for message in request["messages"]] == ["system", "user"]
        assert request["messages"][0] == requests[0]["messages"][0]
        assert [part["type"] for part in request["messages"][1]["content"]] == ["image_url", "text"]
        assert request["temperature"] == 0
    assert scorer.judge.usage == {"calls": 8, "prompt_tokens": 56, "reply_tokens": 24}


FAULTS = {
    "hang": (HANG, r"^http://127\.0\.0\.1:\d+/v1: no answer within 3 s$"),
    "500": ((500, {}, {"error": {"message": "out of memory"}}), "the server answered 500: .*out of memory"),
    "429": ((429, {}, {"error": {"message": "slow down"}}), "the server answered 429"),
    "401": ((401, {}, {"error": {"message": "wrong key"}}), "the server answered 401: .*wrong key"),
    "404": ((404, {}, {"error": {"message": "no model m"}}), "the server answered 404: .*no model m"),
    "cut": (CUT, "cannot be reached: peer closed connection"),
    "no choices": (completion("x") | {"choices": []}, "no choices"),
    "null choices": (completion("x") | {"choices": None}, "no choices"),
    "refusal": (
        completion(None, message={"content": None, "refusal": "I will not"}),
        "refused: I will not",
    ),
    "empty": (completion(""), "the reply is empty"),
    "filtered": (completion("x", finish_reason="content_filter"), "filter withheld"),
    "no score": (completion("I like it"), "no aspect has a score; .*; the reply begins 'I like it'"),
    "cut off": (completion("1. Text Faith", finish_reason="length"), "ran out of tokens"),
    "no JSON": ((200, {}, "<html>busy</html>"), "the answer makes no sense"),
    "other JSON": ((200, {}, [1, 2]), "no choices"),
    "odd choices": (completion("x") | {"choices": "abc"}, "the answer makes no sense"),
    "no message": (completion("x", message=None), "no message"),
    "odd content": (completion("x", message={"role": "assistant", "content": 7}), "the reply is not text but 7"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_its_own_image_and_is_never_nought(name):
    fault, says = FAULTS[name]
    bright = float(IMAGES[3].mean())

    def answer(request):
        return fault if abs(np.asarray(picture(request)).mean() / 255 - bright) < 1e-6 else completion(FULL)

    with chatting(answer) as (url, _):
        scores = of(url, timeout=3)(IMAGES, PROMPTS)
    assert list(scores.failures) == [3]
    assert re.search(says, scores.failures[3])
    assert "\n" not in scores.failures[3]
    assert scores.values[3].isnan().all()
    assert scores.column("overall")[[0, 1, 2, 4, 5, 6, 7]].tolist() == pytest.approx([0.75] * 7)


@pytest.mark.parametrize("first", [(429, {"Retry-After": "1"}, {}), (500, {}, {}), (503, {}, {}), CUT, HANG])
def test_what_passes_is_tried_again(first):
    answers = iter([first])
    with chatting(lambda request: next(answers, completion(FULL))) as (url, requests):
        began = time.perf_counter()
        scores = of(url, timeout=1, retries=2)(IMAGES[:1], PROMPTS[:1])
    assert not scores.failures
    assert len(requests) == 2
    if isinstance(first, tuple) and first[0] == 429:
        assert time.perf_counter() - began >= 1


def test_what_does_not_pass_is_not_tried_again():
    with chatting(lambda request: (401, {}, {})) as (url, requests):
        assert of(url, retries=5)(IMAGES[:1], PROMPTS[:1]).failures
    assert len(requests) == 1


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    (reason,) = set(of(url)(IMAGES, PROMPTS).failures.values())
    assert reason.startswith(f"{url}: cannot be reached: ")
    assert "Connect call failed" in reason


def test_no_more_requests_at_once_than_asked_for():
    busy = Busy()

    def answer(request):
        with busy.one(0.05):
            return completion(FULL)

    with chatting(answer) as (url, _):
        of(url, concurrency=3)(IMAGES, PROMPTS)
    assert busy.most == 3


def test_calls_have_a_budget():
    with chatting(lambda request: completion(FULL)) as (url, requests):
        scorer = of(url, max_calls=5, concurrency=1)
        scores = scorer(IMAGES, PROMPTS)
        assert sorted(scores.failures) == [5, 6, 7]
        assert "budget of 5 calls" in scores.failures[5]
        assert len(requests) == 5
        assert len(scorer(IMAGES, PROMPTS).failures) == 8
    assert scorer.judge.usage["refused"] == 3 + 8


def test_a_schema_is_offered_and_no_longer_where_it_is_not_taken():
    def answer(request):
        return (400, {}, {"error": {"message": "no such form"}}) if "response_format" in request else completion(FULL)

    with chatting(answer) as (url, requests):
        scorer = of(url, form="json", concurrency=1)
        assert not scorer(IMAGES[:3], PROMPTS[:3]).failures
    assert ["response_format" in request for request in requests] == [True, False, False, False]
    assert requests[0]["response_format"]["json_schema"]["schema"]["required"][-1] == "refined_request"


def test_odds_from_the_likeliest_words():
    def answer(request):
        assert request["top_logprobs"] == 20
        listed = TOP if "content" not in request["messages"][0]["content"][1]["text"] else TOP[:1]
        return completion("Yes", logprobs={"content": [TOP[0] | {"top_logprobs": listed}]})

    with chatting(answer) as (url, _):
        scores = of(url, "vlm_yes_no", questions={"one": "Is it?", "two": "Is its content?"})(IMAGES[:1], PROMPTS[:1])
    assert scores.values[0, 0] == pytest.approx(math.log(3))
    assert scores.values[0, 1].isnan()
    assert "not both of 'Yes' and 'No'" in scores.failures[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`transformers serve` in a process of its own, and the folder of a tiny random Qwen2-VL."""
    folder = tiny_vlm.folder_of(tmp_path_factory.mktemp("vlm"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            break
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.5)
    yield folder, f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait(20)


def test_a_real_server_sees_what_a_model_here_sees(served):
    """The same model, here and there, writes the same about each picture: it was asked the same, pictures and all."""
    folder, url = served
    template = templates.Template("You judge.\n---\n{image} The request: {prompt}")
    questions = [template.fill(image=image, prompt=templates.quoted("a <cat>")) for image in IMAGES[:4]]
    here = ask.judge("t", str(folder), None, {}).ask(questions, 16)
    judge = ask.judge("t", str(folder), url, {"retries": 1})
    there = judge.ask(questions, 16)
    assert len({reply.text for reply in here}) == 4
    for one, two in zip(here, there, strict=True):
        assert not two.failure
        assert re.sub(r"<\|\w+\|>", "", two.text) == one.text
        assert two.cut
        assert one.cut
    assert judge.usage["reply_tokens"] == 64


def test_a_real_server_of_a_babbling_model_scores_nothing(served):
    folder, url = served
    scores = load("rational", model=str(folder), url=url, tokens=12, retries=1)(IMAGES[:3], PROMPTS[:3])
    assert sorted(scores.failures) == [0, 1, 2]
    assert all("no aspect has a score" in reason for reason in scores.failures.values())
    assert scores.values.isnan().all()
    assert all(scores.replies)
    odds = load("vlm_yes_no", model=str(folder), url=url, retries=1)(IMAGES[:1], PROMPTS[:1])
    assert "gives no token probabilities" in odds.failures[0]


# ---------------------------------------------------------------------------------------- differences between servers

PARTS = [
    {"type": "thinking", "thinking": "hm"},
    {"type": "text", "text": FULL[:20]},
    {"type": "text", "text": FULL[20:]},
]


@pytest.mark.parametrize("content", [PARTS, [FULL], [{"type": "output_text", "text": FULL}]])
def test_a_reply_in_parts_is_one_text(content):
    with chatting(lambda request: completion(None, message={"content": content})) as (url, _):
        scores = of(url)(IMAGES[:1], PROMPTS[:1])
    assert scores.column("overall").tolist() == pytest.approx([0.75])
    assert scores.replies == (FULL,)


WITHOUT = {
    "reasoning of one server": (
        completion(None, message={"content": None, "reasoning_content": "hm, 3"}),
        "only reasoning",
    ),
    "reasoning of another": (
        completion(None, message={"content": "", "reasoning": "hm, 3"}, finish_reason="length"),
        "only reasoning because it ran out of tokens",
    ),
    "reasoning in parts": (
        completion(None, message={"content": [{"type": "thinking", "thinking": "3"}]}),
        "only reasoning",
    ),
    "no parts": (completion(None, message={"content": []}), "the reply is empty"),
    "a picture": (completion(None, message={"content": [{"type": "image_url"}]}), "not text but {'type': 'image_url'}"),
    "a refusal in parts": (
        completion(None, message={"content": [{"type": "refusal", "refusal": "I will not"}]}), "refused: I will not",
    ),
    "a number in parts": (completion(None, message={"content": [7]}), "not text but 7"),
    "a web page": ((200, {"Content-Type": "text/html"}, "<html>log in</html>"), "200 with no JSON: '<html>log in"),
    "an event stream": (
        (200, {"Content-Type": "text/event-stream"}, 'data: {"choices": []}'),
        "status 200 with an event stream instead of one answer: 'data: ",
    ),
    "an error with 200": (completion("x") | {"choices": None, "error": {"message": "no GPU"}}, "begins .*no GPU"),
    "a redirect": ((308, {"Location": "https://elsewhere.example/v1"}, ""), "answered 308 .it points to https://elsewhere"),
    "an unknown path": ((404, {}, {"detail": "Not Found"}), "the server answered 404: .*Not Found"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT)
def test_a_reason_names_url_status_and_what_came(name):
    answer, says = WITHOUT[name]
    with chatting(lambda request: answer) as (url, _):
        scores = of(url)(IMAGES[:1], PROMPTS[:1])
    assert scores.values.isnan().all()
    assert scores.failures[0].startswith(f"{url}: ")
    assert re.search(says, scores.failures[0])
    assert re.search(r"status 200|answered \d{3}", scores.failures[0])
    assert "\n" not in scores.failures[0]


@pytest.mark.parametrize(("path", "hinted"), [("", True), ("/v1", False), ("/v1/", False), ("/api", True)])
def test_an_address_without_v1_is_reported(path, hinted):
    with chatting(lambda request: (404, {}, {"detail": "Not Found"})) as (url, _):
        reason = of(url.removesuffix("/v1") + path)(IMAGES[:1], PROMPTS[:1]).failures[0]
    assert ("(perhaps it is " in reason) == hinted
    if hinted:
        assert reason.endswith(f"(perhaps it is {url.removesuffix('/v1')}{path}/v1)")


def refusing(*names: str, status: int = 400):
    """A server that takes none of these fields, and says of the first it meets that it does not."""

    def answer(request):
        for name in names:
            if name in request:
                return status, {}, {"error": {"message": f"Unsupported parameter: '{name}' is not supported"}}
        return completion(FULL)

    return answer


@pytest.mark.parametrize("status", [400, 422])
def test_another_name_for_the_bound_on_tokens_is_tried_and_remembered(status):
    with chatting(refusing("max_tokens", status=status)) as (url, requests):
        scorer = of(url, concurrency=1, tokens=321)
        assert not scorer(IMAGES[:3], PROMPTS[:3]).failures
    assert [request.get("max_tokens") for request in requests] == [321, None, None, None]
    assert [request.get("max_completion_tokens") for request in requests] == [None, 321, 321, 321]


def test_a_bound_that_is_too_large_is_no_other_name():
    """The refusal names the field too; what helped nobody is not remembered."""
    refusal = (400, {}, {"error": {"message": "max_tokens is too large: 5000"}})
    with chatting(lambda request: refusal) as (url, requests):
        scorer = of(url, concurrency=1)
        assert "max_tokens is too large" in scorer(IMAGES[:1], PROMPTS[:1]).failures[0]
        assert "max_tokens is too large" in scorer(IMAGES[:1], PROMPTS[:1]).failures[0]
    assert ["max_tokens" in request for request in requests] == [True, False] * 2


def test_a_server_without_temperatures_is_asked_without_and_that_is_said():
    with chatting(refusing("temperature", "max_tokens", "response_format")) as (url, requests):
        scorer = of(url, concurrency=1, form="json")
        with pytest.warns(UserWarning, match="the server rejects a temperature; it samples with its own"):
            assert not scorer(IMAGES[:2], PROMPTS[:2]).failures
    assert [sorted({"temperature", "max_tokens", "response_format"} & set(request)) for request in requests] == [
        ["max_tokens", "response_format", "temperature"],
        ["max_tokens", "response_format"],
        ["response_format"],
        [],
        [],
    ]


def test_a_server_that_fails_on_a_schema_is_tried_once_without():
    def answer(request):
        return (500, {}, {"error": {"message": "grammar"}}) if "response_format" in request else completion(FULL)

    with chatting(answer) as (url, requests):
        scorer = of(url, form="json", concurrency=1, retries=3)
        assert not scorer(IMAGES[:2], PROMPTS[:2]).failures
    assert ["response_format" in request for request in requests] == [True, False, False]


def test_what_the_server_may_list_of_odds_is_checked():
    bad = [
        [{"token": "Yes", "logprob": "x"}, {"token": "No", "logprob": 0}], [{"token": 1, "logprob": 0}], [{}], [7], "x",
        [{"token": "Yes", "logprob": 1e308}, {"token": "No", "logprob": 0}], {"a": 1},
    ]  # fmt: skip
    answers = iter(bad)
    with chatting(lambda request: completion("Yes", logprobs={"content": [{"top_logprobs": next(answers)}]})) as (
        url,
        _,
    ):
        scorer = of(url, "vlm_yes_no", questions={"one": "Is it?"})
        for _ in bad:
            assert "the answer makes no sense" in scorer(IMAGES[:1], PROMPTS[:1]).failures[0]
