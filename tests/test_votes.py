"""Votes on pairs of held-out images: which pairs, who may vote, what is written, and that `mmalign score` reads it."""

import base64
import contextlib
import json
import os
import re
import resource
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import pytest
import torch
import yaml
from command_line import mmalign
from run_config import rows, run
from starlette.testclient import TestClient
from torchvision.utils import save_image

from mmalign.reporting import live, votes
from reward_models import files

SESSION = "0123456789abcdef"
SITE = {"Origin": "http://127.0.0.1", "Content-Type": "application/json"}
PROMPTS = {4: "a red circle", 9: "two crosses"}
WANTS = {"tag": "counting"}
FLAT, NOISY = "images/before/00004-0.png", "images/after/00004-0.png"  # the flat one is the smaller JPEG
VOTE = {"left": FLAT, "right": NOISY, "choice": "left"}


@pytest.fixture
def finished(tmp_path):
    """A run with two prompts of two seeds each, flat before training and noisy after it."""
    out = tmp_path / "run"
    generator = torch.Generator().manual_seed(0)
    for side in ("before", "after"):
        (out / "images" / side).mkdir(parents=True)
        for number, prompt in PROMPTS.items():
            for seed in range(2):
                noise = torch.rand(3, 16, 16, generator=generator)
                image = noise if side == "after" else torch.full((3, 16, 16), 0.1 * number / 9 + 0.2 * seed)
                save_image(image, out / "images" / side / f"{number:05d}-{seed}.png")
                row = WANTS | {"image": f"{number:05d}-{seed}.png", "prompt": prompt, "id": number, "noise_seed": seed}
                with (out / "images" / side / "scores.jsonl").open("a") as file:
                    file.write(json.dumps(row | {"scores": {"taste.good": 0.5}, "places": {}}) + "\n")
    config = {"iterations": 1, "plan": "sde", "credit": "terminal", "seeds": 2}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    evaluations = [
        {"iteration": k, "name": side, "images": 4, "seconds": 1.0} for k, side in enumerate(live.reader.SIDES)
    ]
    (out / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    return out


def page_of(run, **settings) -> TestClient:
    return TestClient(live.app(run, votes=True, **settings), base_url="http://127.0.0.1")


def voted(client, vote=VOTE, **headers):
    return client.post("/votes", content=json.dumps(vote), headers=SITE | headers)


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_the_same_seed_before_and_after_and_two_seeds_after(finished):
    scores = live.reader.read(finished).scores
    pairs = votes.pairs(finished, scores)
    names = [f"{number:05d}-{seed}.png" for number in PROMPTS for seed in range(2)]
    expected = [(f"images/before/{name}", f"images/after/{name}") for name in names]
    expected += [(f"images/after/{number:05d}-0.png", f"images/after/{number:05d}-1.png") for number in PROMPTS]
    assert [(pair.left, pair.right) for pair in pairs] == expected
    assert pairs[0].about == {"tag": "counting", "id": 4, "prompt": "a red circle"}
    (finished / NOISY).unlink()
    left = votes.pairs(finished, scores)
    assert [pair.images for pair in left] == [pair.images for pair in pairs if NOISY not in pair.images]
    assert len(left) == 4


def test_pairs_have_one_prompt(finished):
    file = finished / "images/after/scores.jsonl"
    file.write_text(file.read_text().replace('"two crosses"', '"three crosses"', 1))
    pairs = {pair.images for pair in votes.pairs(finished, live.reader.read(finished).scores)}
    assert len(pairs) == 4  # neither with the image before, nor with the other seed
    assert not [pair for pair in pairs if "images/after/00009-0.png" in pair]


def test_a_session_gets_all_pairs_before_one_comes_again_and_sides_at_random(finished):
    pairs = votes.pairs(finished, live.reader.read(finished).scores)
    laps = [[votes.turn(pairs, SESSION, number) for number in range(6 * lap, 6 * lap + 6)] for lap in range(100)]
    for lap in laps:
        assert {pair.images for pair in lap} == {pair.images for pair in pairs}
    assert len({tuple(pair.images for pair in lap) for lap in laps}) > 80  # of 720 orders
    left = Counter(pair.left for lap in laps for pair in lap if pair.images == {FLAT, NOISY})
    assert 35 < left[FLAT] < 65  # 50 expected, standard deviation 5
    again = [votes.turn(pairs, SESSION, number) for number in range(6)]
    assert again == laps[0]
    assert again != [votes.turn(pairs, SESSION[::-1], number) for number in range(6)]


def test_the_page_gets_pairs_and_their_images(finished):
    client = page_of(finished)
    shown = [client.get("/votes/next", params={"session": SESSION, "number": k}).json() for k in range(6)]
    assert {frozenset((one["left"], one["right"])) for one in shown} == {
        pair.images for pair in votes.pairs(finished, live.reader.read(finished).scores)
    }
    assert {one["pairs"] for one in shown} == {6}
    for one in shown:
        assert one["prompt"] in PROMPTS.values()
        for side in ("left", "right"):
            assert client.get(f"/{one[f'{side}_source']}").content == (finished / one[side]).read_bytes()
    (finished / "images/after/scores.jsonl").unlink()
    (finished / "evaluations.jsonl").write_text("")
    assert client.get("/votes/next", params={"session": SESSION, "number": 0}).json() == {"pairs": 0}


# ------------------------------------------------------------------------------------------------------ what is written


def test_votes_are_read_by_score(finished):
    """Against the smaller JPEG: two choices agree and one does not; a tie is not among them."""
    client = page_of(finished)
    assert not (finished / "votes.jsonl").exists()
    other = {"left": "images/after/00009-1.png", "right": "images/before/00009-1.png"}
    seeds = {"left": "images/after/00009-0.png", "right": "images/after/00009-1.png"}
    for vote in (VOTE, other | {"choice": "right"}, VOTE | {"choice": "right"}, seeds | {"choice": "tie"}):
        assert voted(client, vote).status_code == 204
    about = {number: WANTS | {"id": number, "prompt": prompt} for number, prompt in PROMPTS.items()}
    assert rows(finished / "votes.jsonl") == [
        about[4] | {"image_a": FLAT, "image_b": NOISY, "chosen": "a"},
        about[9] | {"image_a": other["left"], "image_b": other["right"], "chosen": "b"},
        about[4] | {"image_a": FLAT, "image_b": NOISY, "chosen": "b"},
        about[9] | {"image_a": seeds["left"], "image_b": seeds["right"], "chosen": "tie"},
    ]
    out = finished.parent / "scores.jsonl"
    scored = mmalign("score", finished / "votes.jsonl", "--rewards", "jpeg_size,clip", "--out", out, "--json")
    assert scored.returncode == 0, scored.stderr
    summary = json.loads(scored.stdout)
    assert (summary["images"], summary["failed"], summary["ties"]) == (5, 0, 1)
    size, clip = summary["scores"]["jpeg_size.kilobytes"], summary["scores"]["clip.cosine"]
    assert (size["choices"], size["agrees"]) == (3, pytest.approx(2 / 3))
    value = {row["image"]: row["scores"]["clip.cosine"] for row in rows(out)}
    flat_is_better = value[FLAT] > value[NOISY]
    agreements = [flat_is_better, value[other["right"]] > value[other["left"]], not flat_is_better]
    assert (clip["choices"], clip["agrees"]) == (3, pytest.approx(sum(agreements) / 3))
    assert "ties, which `agrees` leaves out: 1" in " ".join(
        mmalign("score", finished / "votes.jsonl", "--rewards", "jpeg_size,clip", "--out", out).stdout.split()
    )


def test_voters_at_once_do_not_mix_their_rows(finished):
    for file in (finished / "images").glob("*/scores.jsonl"):
        file.write_text(file.read_text().replace("a red circle", "a red circle " * 2000))
    clients = [page_of(finished) for _ in range(2)]
    start = threading.Barrier(8)

    def visitor(number: int) -> set[int]:
        start.wait()
        return {
            voted(clients[number % 2], VOTE | {"choice": ("left", "right")[number % 2]}).status_code for _ in range(5)
        }

    with ThreadPoolExecutor(8) as visitors:
        assert set().union(*visitors.map(visitor, range(8))) == {204}
    assert Counter(row["chosen"] for row in rows(finished / "votes.jsonl")) == {"a": 20, "b": 20}


@contextlib.contextmanager
def files_of_at_most(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_vote_that_cannot_be_written_is_reported_and_leaves_nothing(finished):
    client, file = page_of(finished), finished / "votes.jsonl"
    assert voted(client).status_code == 204
    data = file.read_bytes()
    with files_of_at_most(len(data) + 20):  # in the middle of the next row
        answer = voted(client)
    assert answer.status_code == 500
    assert answer.json() == {"detail": "the vote is not recorded: votes.jsonl: File too large"}
    assert file.read_bytes() == data
    assert voted(client).status_code == 204
    assert file.read_bytes() == data * 2
    file.unlink()
    file.mkdir()
    assert voted(client).json() == {"detail": "the vote is not recorded: votes.jsonl: Is a directory"}


# ----------------------------------------------------------------------------------------------------- hostile requests

HOSTILE = {
    "no origin": (VOTE, {"Origin": ""}, 403, "Origin"),
    "another site": (VOTE, {"Origin": "http://evil.example"}, 403, "Origin"),
    "another port": (VOTE, {"Origin": "http://127.0.0.1:8000"}, 403, "Origin"),
    "a sandboxed page": (VOTE, {"Origin": "null"}, 403, "Origin"),
    "our name as its user": (VOTE, {"Origin": "http://127.0.0.1@evil.example"}, 403, "Origin"),
    "our name before its own": (VOTE, {"Origin": "http://127.0.0.1.evil.example"}, 403, "Origin"),
    "another scheme": (VOTE, {"Origin": "file://127.0.0.1"}, 403, "Origin"),
    "another host": (VOTE, {"Host": "evil.example", "Origin": "http://evil.example"}, 400, "Host"),
    "a form": (VOTE, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "JSON is needed"),
    "plain text": (VOTE, {"Content-Type": "text/plain; application/json"}, 415, "JSON is needed"),
    "no type": (VOTE, {"Content-Type": ""}, 415, "JSON is needed"),
    "a large body": (VOTE | {"choice": "x" * 2**14}, {}, 413, "at most 16384 bytes"),
    "no JSON": (b"{", {}, 422, "Expecting"),
    "not UTF-8": (b"\xff{}", {}, 422, "not UTF-8"),
    "deep JSON": (b"[" * 16000, {}, 422, ""),
    "a key twice": (json.dumps(VOTE)[:-1].encode() + b', "left": "x"}', {}, 422, "twice"),
    "a list": ([VOTE], {}, 422, ""),
    "another answer": (VOTE | {"choice": "both"}, {}, 422, "choice"),
    "no answer": ({"left": FLAT, "right": NOISY}, {}, 422, "choice"),
    "more than a vote": (VOTE | {"voter": "me"}, {}, 422, "voter"),
    "a number": (VOTE | {"left": 1}, {}, 422, "left"),
    "another file": (VOTE | {"left": "config.yaml"}, {}, 422, "not among those"),
    "a file outside": (VOTE | {"left": "../../etc/passwd"}, {}, 422, "not among those"),
    "one image twice": (VOTE | {"left": NOISY}, {}, 422, "not among those"),
    "images of two prompts": (VOTE | {"right": "images/after/00009-0.png"}, {}, 422, "not among those"),
    "two images before": (VOTE | {"right": "images/before/00004-1.png"}, {}, 422, "not among those"),
    "a line end in a name": (VOTE | {"left": FLAT + "\n{}"}, {}, 422, "not among those"),
    "half a character": (b'{"left": "\\ud800", "right": "x", "choice": "tie"}', {}, 422, "surrogate"),
}


def test_only_votes_on_offered_pairs_from_the_page_itself_are_taken(finished):
    client = page_of(finished)
    for number, (name, (vote, headers, status, says)) in enumerate(HOSTILE.items(), 1):
        content = vote if isinstance(vote, bytes) else json.dumps(vote)
        answer = client.post("/votes", content=content, headers=SITE | headers)
        assert (answer.status_code, name) == (status, name)
        assert says in answer.json()["detail"], name
        assert voted(client).status_code == 204, name
        assert len(rows(finished / "votes.jsonl")) == number
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, "/votes").status_code == 405
    for query in ("session=x&number=0", f"session={SESSION}&number=-1", f"session={SESSION}&number=1e3", ""):
        assert client.get(f"/votes/next?{query}").status_code == 422


def test_without_the_option_there_is_nothing_to_vote_on(finished):
    client = TestClient(live.app(finished), base_url="http://127.0.0.1")
    assert client.get("/votes").status_code == client.get("/votes/next").status_code == 404
    assert voted(client).status_code in (404, 405)
    assert "votes" not in client.get("/").text
    assert '<a href="votes">' in page_of(finished).get("/").text
    assert not (finished / "votes.jsonl").exists()


def test_an_image_outside_the_folder_is_not_offered(finished):
    file = finished / "images/after/scores.jsonl"
    file.write_text(file.read_text().replace("00009-1.png", "../../../secret.png"))
    answer = page_of(finished).get("/votes/next", params={"session": SESSION, "number": 0})
    assert answer.status_code == 409
    assert "leads out of that folder" in answer.json()["detail"]
    assert voted(page_of(finished)).status_code == 409


# ---------------------------------------------------------------------------------------------------------------- token


def basic(text: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_votes_where_others_reach_them_need_a_token(finished, host, monkeypatch):
    monkeypatch.delenv("MMALIGN_TOKEN", raising=False)
    ended = mmalign("report", finished, "--serve", "--votes", "--host", host)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"other machines can reach host {host}: votes need a --token (or MMALIGN_TOKEN)" in ended.stderr


def test_nothing_is_served_without_the_token(finished):
    token = "gehéim:1"
    client = page_of(finished, host="0.0.0.0", token=token)
    good = [basic(f"anyone:{token}"), basic(f":{token}"), {"Authorization": f"bearer {token}".encode()}]
    bad = [{}, basic("anyone:other"), basic(token), basic("anyone:"), {"Authorization": "Basic %%%"},
           {"Authorization": "Basic " + base64.b64encode(b"a:\xff").decode()}, {"Authorization": "Bearer"},
           {"Authorization": "Digest x"}, basic(f"anyone:{token} ")]  # fmt: skip
    for path in (
        "/",
        "/main",
        "/state",
        "/votes",
        f"/votes/next?session={SESSION}&number=0",
        f"/files/{FLAT}",
        "/nowhere",
    ):
        for headers in bad:
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Basic ")
            assert token not in answer.text
        for headers in good[:2]:
            answer = client.get(path, headers=headers)
            assert answer.status_code == (404 if path == "/nowhere" else 200)
            assert token not in answer.text
    assert client.get(f"/?token={token}").status_code == 401
    assert voted(client).status_code == 401
    assert voted(client, **good[0]).status_code == 204
    assert len(rows(finished / "votes.jsonl")) == 1


def test_a_program_sends_the_token_as_for_the_reward_service(finished):
    client = page_of(finished, token="secret")
    assert client.get("/state", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/state", headers={"Authorization": "Bearer secre"}).status_code == 401


def test_the_token_of_the_environment_is_for_hosts_that_others_reach(finished, monkeypatch):
    monkeypatch.setenv("MMALIGN_TOKEN", "secret")
    served = []
    monkeypatch.setattr(live, "listen", lambda service, *_, **__: served.append(service))
    for host in ("127.0.0.1", "0.0.0.0"):
        live.serve(finished, host, votes=True)
    status = [TestClient(service, base_url="http://127.0.0.1").get("/state").status_code for service in served]
    assert status == [200, 401]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--votes"], "--votes acts only with --serve"), (["--token", "x"], "--token acts only with --serve"),
     (["--serve", "--votes", "--token", ""], "--token is empty")],
)  # fmt: skip
def test_options_that_would_do_nothing_are_refused(finished, arguments, says):
    ended = mmalign("report", finished, *arguments)
    assert (ended.returncode, ended.stderr) == (2, f"mmalign: {says}\n")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ('{"image_a": "a", "image_b": "b", "chosen": "a"}\n{"image_a": "a"', "line 2: not a vote"),
        ('{"image_a": "a", "image_b": "b", "chosen": "a"}', "the last line has no end"),
        ('{"image": "a"}\n', "line 1: not a vote"),
        ("\x00\n", "line 1: not a vote"),
        (None, "Is a directory"),
    ],
)
def test_a_file_of_votes_that_cannot_be_continued_is_refused(finished, data, says):
    file = finished / "votes.jsonl"
    file.mkdir() if data is None else file.write_text(data)
    ended = mmalign("report", finished, "--serve", "--votes")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"{file}" in ended.stderr
    assert says in ended.stderr
    assert data is None or file.read_text() == data


# ------------------------------------------------------------------------------------------------- what browsers may do


class Scripts(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.nonces, self.handlers = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.nonces += [dict(attrs).get("nonce")] if tag == "script" else []
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_only_the_scripts_of_the_pages_run(finished):
    (finished / "evil.html").write_text("<script>fetch('../votes', {method: 'POST'})</script>")
    client, nonces = page_of(finished), []
    for path in ("/", "/votes", "/"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        (allowed,) = re.findall(r"script-src 'nonce-([\w-]{20,})';", policy)
        assert Scripts(answer.text).nonces == [allowed]
        assert Scripts(answer.text).handlers == []
        nonces.append(allowed)
    assert len({*nonces}) == 3
    for path in ("/main", "/state", "/files/evil.html", f"/files/{FLAT}", "/nowhere"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'; script-src 'none';" in policy
        assert "form-action 'none'; frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_a_run_begins_in_no_folder_with_votes_of_another(finished, settings):
    """The images that they name would be others."""
    out = finished.parent / "another"
    out.mkdir()
    os.replace(finished / "images/before/scores.jsonl", out / "votes.jsonl")
    config = finished.parent / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"out": str(out)}))
    ended = mmalign("train", config)
    assert ended.returncode == 2
    assert f"{out / 'votes.jsonl'} exists already" in ended.stderr


def test_votes_become_a_reward_that_trains_a_model(finished, settings):
    """The three commands of the README, but for the model and the number of iterations."""
    client, pairs = page_of(finished), len(PROMPTS)
    for number in PROMPTS:
        for seed in range(2):
            before, after = (f"images/{side}/{number:05d}-{seed}.png" for side in ("before", "after"))
            assert voted(client, {"left": before, "right": after, "choice": "left"}).status_code == 204
    more = rows(finished / "votes.jsonl")
    texts = [
        "a circle",
        "a square",
        "a green cross",
        "a blue star",
    ]  # more people's prompts, with the same two pictures
    files.append(finished / "votes.jsonl", *(more[0] | {"prompt": text, "id": 20 + i} for i, text in enumerate(texts)))
    folder, out = finished.parent / "liked", finished.parent / "better"
    fitted = mmalign("reward", "fit", finished / "votes.jsonl", "--out", folder, "--set", "epochs=3", "--json")
    assert fitted.returncode == 0, fitted.stderr
    card = json.loads(fitted.stdout)
    assert (card["pairs"], sum(card["prompts"].values())) == (2 * pairs + len(texts), pairs + len(texts))
    rewards = {"rewards": {"fitted.score": 1.0}, "scorers": {"fitted": {"folder": str(folder)}}}
    run(settings, **rewards, iterations=1, out=str(out))
    assert rows(out / "metrics.jsonl")[0]["part/fitted.score"] == pytest.approx(
        rows(out / "metrics.jsonl")[0]["reward"]
    )
