"""Tests of the HTTP client against misbehaving servers: every request ends in time, with a reason."""

import base64
import html
import json
import re
import socket
import ssl
import urllib.parse

import pytest
import torch
from chats import chatting, completion
from hostile import ANSWERS, SELF_SIGNED, sending
from hypothesis import given, settings, strategies as st

from reward_models import Prompt, limits, load
from reward_models.service import http as link
from reward_models.service.http import Fault, Link, redacted, redactor

KEY = 'sk-"hush/+ &<é>\\'.replace("é", "e")


def judged(url: str, **more) -> str:
    """Why a judge behind a server has no score."""
    judge = load("rational", model="m", url=url, **{"timeout": 0.4, "retries": 0} | more)
    scores = judge(torch.zeros(1, 3, 8, 8), [Prompt("a red circle")])
    assert scores.values.isnan().all()
    return scores.failures[0]


def linked(url: str) -> str:
    with pytest.raises(Fault) as error:
        Link(url, "hush", 0.4, 0).post("/score", b"{}", lambda answer: answer)
    return str(error.value)


@pytest.mark.parametrize("ask", [judged, linked])
@pytest.mark.parametrize("kind", ANSWERS)
def test_whatever_a_server_sends_there_is_a_reason_in_time(kind, ask):
    """Most of them never end: without a deadline neither would this test."""
    parts, pause, says = ANSWERS[kind]
    with sending(parts, pause) as url:
        reason = ask(url)
    assert re.search(says, reason)
    assert reason.startswith(f"{url}: ") == (ask is judged)
    assert "\n" not in reason
    assert len(reason) < 700


def test_a_request_that_nobody_takes_ends_in_time():
    with sending(*ANSWERS["nothing"][:2]) as url, pytest.raises(Fault, match="no answer within"):
        Link(url, "hush", 0.4, 0).post("/score", b" " * 10**8, lambda answer: answer)


def test_no_more_of_an_answer_is_held_than_the_bound(monkeypatch):
    monkeypatch.setattr(limits, "ANSWER", 100)
    for length, fits in ((100, True), (101, False)):
        body = b'"' + b"a" * (length - 2) + b'"'
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length
        with sending(lambda head=head, body=body: iter([head + body])) as url:
            if fits:
                assert Link(url, "", 9, 0).get("/info") == "a" * 98
            else:
                with pytest.raises(Fault, match="larger than 100 bytes"):
                    Link(url, "", 9, 0).get("/info")


def test_an_untrusted_certificate_is_reported(tmp_path):
    (tmp_path / "both.pem").write_text(SELF_SIGNED)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    with sending(lambda: iter([b""]), context=context) as url:
        assert re.search(rf"^{url}: cannot be reached: .*self-signed certificate", judged(url, timeout=9))
    with sending(lambda: iter([b"HTTP/1.1 200 OK\r\n\r\n"])) as url:
        secure = url.replace("http", "https")
        assert re.search(rf"^{secure}: cannot be reached: .*(SSL|TLS)", judged(secure, timeout=9))


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [("ALL_PROXY", "socks5://127.0.0.1:9", "socksio"), ("HTTP_PROXY", "gopher://127.0.0.1:9", "gopher")],
)
def test_a_proxy_that_cannot_be_used_is_reported_in_one_line(monkeypatch, variable, value, says):
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    for opened in (
        lambda: load("rational", model="m", url="http://127.0.0.1:8/v1"),
        lambda: load("remote", url="http://127.0.0.1:8"),
    ):
        with pytest.raises(ValueError, match=rf"http://127\.0\.0\.1:8.*ALL_PROXY.*{says}") as error:
            opened()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("token", ["a\nb", "é", " ab", "ab ", "\0"])
def test_a_token_that_no_header_can_hold_is_refused(token):
    with pytest.raises(ValueError, match="not allowed in an HTTP header"):
        Link("http://127.0.0.1:8", token, 1, 0)


@pytest.mark.parametrize("url", ["http://me:pass@host/v1", "http://host/v1?key=1", "http://host/#v1"])
def test_a_url_that_would_tell_or_lose_something_is_refused(url):
    with pytest.raises(ValueError, match=r"password|without"):
        Link(url, "", 1, 0)


# ------------------------------------------------------------------------------------------------------------- secrets

FORMS = {
    "plain": lambda key: key,
    "in JSON": lambda key: json.dumps(key)[1:-1],
    "in JSON in JSON": lambda key: json.dumps(json.dumps(key))[3:-3],
    "as JSON numbers": lambda key: "".join(f"\\u{ord(letter):04X}" for letter in key),
    "in a URL": lambda key: urllib.parse.quote(key, safe=""),
    "in a path": urllib.parse.quote,
    "in a form": urllib.parse.quote_plus,
    "in a URL twice": lambda key: urllib.parse.quote(urllib.parse.quote(key, safe="")),
    "all of it in a URL": lambda key: "".join(f"%{ord(letter):02x}" for letter in key),
    "in HTML": html.escape,
    "as HTML numbers": lambda key: "".join(f"&#{ord(letter)};" for letter in key),
    "in base64": lambda key: base64.b64encode(key.encode()).decode(),
    "the header, in base64": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
}
VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=4, max_size=60)


@given(VISIBLE, st.sampled_from([*FORMS]), st.text(max_size=20), st.text(max_size=20))
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_a_secret_is_struck_out_in_any_form(key, form, before, after):
    written = FORMS[form](key)
    redacted = redactor(key)(f"{before}|{written}|{after}")
    assert written not in redacted.replace("...", "")
    assert "..." in redacted


@given(VISIBLE, st.text(max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_a_text_without_the_secret_is_left_as_it_is(key, text):
    strike = redactor(f"{key}é"[:-1] + "~~~~")
    assert strike(text) == text or "~" in text


def test_what_strikes_takes_time_in_proportion_to_the_text():
    """Runs of what a form may begin with: a search that goes back over them would not end."""
    strike = redactor(KEY)
    for run in ("\\", "%25", "&#0", "&#x0", KEY[:-1], "s", "\\u00"):
        assert strike(run * (10**6 // len(run)) + KEY).endswith("...")


@pytest.mark.parametrize("form", FORMS)
def test_a_key_that_a_judge_repeats_reaches_nobody(form):
    written = FORMS[form](KEY)
    reply = f"1. Text Faithfulness: 3\nJustification: {written}\n2. Image Quality: 3\n3. Physical Quality: N/A\n"
    bodies = [
        completion(reply),
        completion(None, message={"content": None, "refusal": written}),
        completion(None, message={"content": {written: written}}),
        {written: written},
        (401, {}, {"error": {"message": f"Incorrect API key: {written}"}}),
        (307, {"Location": f"https://elsewhere.example/{written}".replace("\n", "")}, {}),
        (200, {"Content-Type": f"text/{form.replace(' ', '')}"}, f"<html>{written}"),
    ]
    answers = iter(bodies)
    with chatting(lambda request: next(answers)) as (url, _):
        judge = load("rational", model="m", url=url, key=KEY, timeout=9, retries=0)
        for _ in bodies:
            scores = judge(torch.zeros(1, 3, 8, 8), [Prompt("a red circle")])
            texts = [*scores.failures.values(), *scores.critiques, *scores.requests, *scores.replies, str(judge.card)]
            assert "..." in "".join(texts)
            assert written not in "".join(texts)
            assert KEY not in repr(judge.judge)


def test_words_of_an_answer_are_struck_wherever_they_stand():
    value = {"a hush": ["hush", 1, None, {"b": "say hush"}], "c": 2.5}
    assert redacted(value, redactor("hush")) == {"a ...": ["...", 1, None, {"b": "say ..."}], "c": 2.5}


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(Fault, match=r"cannot be reached: .*Connect call failed"):
        Link(url, "", 9, 0).get("/info")
    assert link.running_loop() is link.running_loop()
