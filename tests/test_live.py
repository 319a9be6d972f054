"""The served page of a run: its state at each stage, and that it serves the run's folder and nothing else."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading

import httpx
import pytest
import yaml
from command_line import mmalign
from starlette.testclient import TestClient
from torch import rand
from torchvision.utils import save_image

from mmalign.cli import app as cli
from mmalign.reporting import live, report

ROW = {"reward": 0.25, "forwards": 4, "replay_forwards": 2, "decodes": 1, "rewards": 1}
ROW |= {"seconds/rollout": 0.5, "seconds/learn": 0.25, "seconds/total": 1.0}


@pytest.fixture
def begun(tmp_path):
    """The folder of a run of three iterations that has written only its config."""
    (tmp_path / "outside.txt").write_text("somebody else's")
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"iterations": 3, "plan": "sde", "credit": "terminal", "seeds": 2})
    )
    return folder


def append(path, row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def evaluated(run, name: str | None, iteration: int) -> None:
    (run / "images").mkdir(exist_ok=True)
    save_image(rand(3, 8, 8), run / "images" / f"{name or f'{iteration:06d}'}.png")
    row = {"iteration": iteration, "name": name, "images": 1, "seconds": 0.5, "taste.good": 0.75}
    append(run / "evaluations.jsonl", row)


def page_of(run) -> TestClient:
    return TestClient(live.app(run), base_url="http://127.0.0.1")


def test_the_page_follows_the_run(begun):
    client = page_of(begun)
    shell = client.get("/").text
    assert "<h1>a run</h1>" in shell
    assert "fetch('state'" in shell
    states = [client.get("/state").json()]
    assert (states[0]["iterations"], states[0]["status"]) == (0, "begun")
    assert "No iterations yet" in client.get("/main").text

    evaluated(begun, "before", 0)
    main = client.get("/main").text
    assert "Held-out prompts at iteration 0" in main
    (image,) = [part.split('"')[0] for part in main.split('src="')[1:]]
    assert client.get(image).content == (begun / "images" / "before.png").read_bytes()
    states.append(client.get("/state").json())

    append(begun / "metrics.jsonl", {"iteration": 1} | ROW)
    states.append(client.get("/state").json())
    assert (states[2]["iterations"], states[2]["status"]) == (1, "running")
    assert states[2]["message"].startswith("iteration 1 of 3, reward 0.250; last written 0 s ago")
    one = client.get("/main").text
    assert "All metrics of iteration 1" in one
    assert "<svg" in one
    assert client.get("/main").text == one

    with (begun / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "rew')
    assert client.get("/state").json()["iterations"] == 1
    assert "All metrics of iteration 1" in client.get("/main").text
    with (begun / "metrics.jsonl").open("a") as file:
        file.write('ard": 0.5, ' + json.dumps(ROW | {"reward": 0.5})[1:] + "\n")
    evaluated(begun, None, 2)
    states.append(client.get("/state").json())
    main = client.get("/main").text
    assert "All metrics of iteration 2" in main
    assert "Held-out prompts at iteration 2" in main
    assert "000002.png" in main

    append(begun / "metrics.jsonl", {"iteration": 3} | ROW)
    assert client.get("/state").json()["status"] == "running"  # the evaluation after is still to come
    evaluated(begun, "after", 3)
    states.append(client.get("/state").json())
    assert (states[-1]["status"], states[-1]["message"]) == ("finished", "finished: 3 iterations")
    assert len({state["version"] for state in states}) == len(states)


def test_a_run_that_went_quiet_is_stale(begun):
    append(begun / "metrics.jsonl", {"iteration": 1} | ROW | {"seconds/total": 100})
    written = (begun / "metrics.jsonl").stat().st_mtime
    assert live.state(begun, written + 199).status == "running"  # two iterations as long as the longest
    quiet = live.state(begun, written + 201)
    assert (quiet.status, quiet.quiet) == ("stale", pytest.approx(201))
    assert "stopped, or slower than ever before" in quiet.message
    assert "last written 201 s ago" in quiet.message
    os.utime(begun / "metrics.jsonl", (0, 0))
    assert page_of(begun).get("/state").json()["status"] == "running"  # the config was written just now
    os.utime(begun / "config.yaml", (0, 0))
    assert page_of(begun).get("/state").json()["status"] == "stale"


@pytest.mark.parametrize(
    "path",
    ["/files/../outside.txt", "/files/%2e%2e/outside.txt", "/files/..%2foutside.txt", "/outside.txt", "/files/link",
     "/files//etc/passwd", "/files/", "/docs", "/openapi.json"],
)  # fmt: skip
def test_only_the_files_of_the_run_are_served(begun, path):
    (begun / "link").symlink_to(begun.parent / "outside.txt")
    client = page_of(begun)
    assert client.get("/files/config.yaml").text == (begun / "config.yaml").read_text()
    answer = client.get(path)
    assert answer.status_code == 404
    assert "somebody else" not in answer.text
    assert client.post("/main").status_code == 405


def test_only_loopback_names_are_answered(begun):
    assert page_of(begun).get("/state", headers={"Host": "elsewhere.example"}).status_code == 400
    assert page_of(begun).get("/state", headers={"Host": "localhost:8001"}).status_code == 200


def test_the_page_of_a_finished_run_is_its_report(begun):
    """The same text except for the addresses of the images."""
    for name, iteration in (("before", 0), ("after", 3)):
        evaluated(begun, name, iteration)
        (begun / "images" / name).mkdir()
        for i in (1, 2):
            save_image(rand(3, 8, 8), begun / "images" / name / f"{i}.png")
            row = {"image": f"{i}.png", "prompt": "a <b>", "id": i, "scores": {"taste.good": i * iteration / 4}}
            append(begun / "images" / name / "scores.jsonl", row)
    served = page_of(begun).get("/main").text
    for path in (begun / "images").glob("*/*.png"):
        address = f"files/{path.relative_to(begun)}?{path.stat().st_mtime_ns:x}"
        assert address in served
        served = served.replace(address, report.embedded(path))
    assert served in report.write(begun).read_text()
    assert "a &lt;b&gt;" in served


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(begun, number, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers, over = [], threading.Event()

    def visit() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None) as client:  # the connection stays open
            while not answers and not over.wait(0.02):
                with contextlib.suppress(httpx.ConnectError):
                    answers.append(client.get("/state").json()["status"])
            if answers:
                os.kill(os.getpid(), number)

    visitor = threading.Thread(target=visit)
    visitor.start()
    monkeypatch.setattr(sys, "argv", ["mmalign", "report", str(begun), "--serve", "--port", str(port)])
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        over.set()
        visitor.join()
    assert end.value.code == 0
    assert answers == ["begun"]
    assert not (begun / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "module", "message"),
    [
        (["elsewhere", "--serve"], None, "elsewhere: no run there (config.yaml is missing)"),
        (["a run", "--port", "0"], None, "--port acts only with --serve"),
        (["a run", "--serve"], "fastapi", "serving a page needs fastapi: pip install 'mmalign[serve]'"),
        (["a run", "--serve"], "uvicorn", "needs uvicorn: pip install 'mmalign[serve]'"),
    ],
)
def test_a_page_that_cannot_be_served_is_refused_in_one_line(begun, arguments, module, message, monkeypatch, capsys):
    monkeypatch.chdir(begun.parent)
    monkeypatch.setattr(sys, "argv", ["mmalign", "report", *arguments])
    if module:
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delattr("mmalign.reporting.live")
        for name in ("mmalign.reporting.live", "reward_models.service.server"):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"iteration": 10**18}, {"iteration": -1}, {"iteration": 10**400}, {"reward": 1e308}, {"forwards": 10**400},
        {"grad_norm": -1e200},
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_drawn_is_left_out_of_the_page(begun, wrong):
    for row in ({"iteration": 1} | ROW, {"iteration": 2} | ROW | wrong):
        append(begun / "metrics.jsonl", row)
    page = report.write(begun).read_text()
    assert "metrics.jsonl: line 2: " in page
    assert "; left out" in page
    assert "All metrics of iteration 1" in page


@pytest.mark.parametrize("host", ["nope.invalid", "256.1.1.1", "a b", "192.0.2.1", "a" * 100])
def test_an_invalid_host_is_refused_in_one_line(begun, host):
    ended = mmalign("report", begun, "--serve", "--host", host)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert f"--host {host!r} --port 8001: " in ended.stderr


def test_a_port_in_use_is_refused_in_one_line(begun):
    with socket.create_server(("127.0.0.1", 0)) as other:
        ended = mmalign("report", begun, "--serve", "--port", other.getsockname()[1])
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "Address already in use" in ended.stderr
