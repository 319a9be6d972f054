"""Whatever `build` accepts runs, or is refused in one line before anything is written: configs drawn at random, of all
families of models, are trained for one iteration with its evaluations."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from corpus import configs as drawn_configs
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES

from mmalign import config as configs, policy as policies, run as runs, session
from mmalign.config import BadInput
from reward_models import load as load_scorer

WHY = []
FAST = [name for name in FAMILIES if "klein" not in name]  # FLUX.2's text encoder takes seconds to load


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def records(folder: Path) -> list[str]:
    """Of two prompts, with and without regions; one that names a file that is not there."""
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 90, 200 - 40 * i)).save(folder / f"{i}.png")
    boxes = [{"box": [0, 0, 16, 32], "score": 1, "label": "a"}, {"box": [16, 0, 32, 32], "score": -1, "label": "b"}]
    rows = [{"image": f"{i}.png", "prompt": f"record {i // 2}", "score": 0.2 * i} for i in range(4)]
    marked = [row | {"regions": boxes[:: 1 if row["score"] else -1]} for row in rows]
    return [
        jsonl(folder / "marked.jsonl", marked), jsonl(folder / "plain.jsonl", rows),
        jsonl(folder / "single.jsonl", marked[::2]), jsonl(folder / "absent.jsonl", [rows[0] | {"image": "9.png"}]),
        str(folder / "no_such_file.jsonl"),
    ]  # fmt: skip


def references(folder: Path, model: str) -> list[str]:
    """One of all parts for one model; others lack a part, do not vary, or are something else."""
    names = drawn_configs.PARTS
    scorers = {name: dict(own) for name, own in drawn_configs.SCORERS.items()}
    owners = {configs.component(name)[0] for name in names}
    versions = {name: load_scorer(name, **scorers.get(name, {})).card.version for name in owners}
    parts = {name: {"mean": 0.1, "std": 0.5, "images": 500} for name in names}
    whole = {"model": policies.load(model).fingerprint(), "scorers": versions, "components": parts}
    kinds = {
        "whole": whole, "lacking": whole | {"components": {}}, "flat": whole | {
            "components": {name: own | {"std": 0.0} for name, own in parts.items()}
        }, "text": whole | {"components": {name: own | {"std": "wide"} for name, own in parts.items()}},
        "list": [whole],
    }  # fmt: skip
    for name, own in kinds.items():
        (folder / f"reference_{name}.json").write_text(json.dumps(own))
    return [str(folder / f"reference_{name}.json") for name in kinds]


def calibrations(folder: Path, model: str) -> list[str]:
    """Of other steps, of text, of nothing."""
    times = [round(float(t), 6) for t in policies.load(model).times(4)]
    own = {"times": times, "guidance": 1.0, "model": model, "rewards": {}, "noise": [0.5] * 4}
    kinds = {"own": own, "short": own | {"noise": [0.5]}, "text": own | {"noise": "loud"}, "empty": {}}
    for name, record in kinds.items():
        (folder / f"noise_{name}.json").write_text(json.dumps(record))
    return [str(folder / f"noise_{name}.json") for name in kinds]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accepted")

    def model(name: str) -> str:
        own = folder / name.replace(" ", "_").replace(",", "")
        if not own.exists():
            torch.manual_seed(0)
            FAMILIES[name].build(own)
        return str(own)

    return folder, model


@pytest.fixture(scope="module")
def files(saved):
    """What configs name, with the models of some families."""
    folder, model = saved
    train_rows = [{"prompt": text, "id": i} for i, text in enumerate(["a red circle", "a cross", "two green squares"])]
    held_out = [{"prompt": text, "id": i} for i, text in enumerate(["a blue square", "a triangle"])]
    long = {"prompt": "a circle " * 400, "id": 9}
    prompts = [jsonl(folder / "train.jsonl", train_rows), jsonl(folder / "long.jsonl", [*train_rows, long])]
    prompts += [jsonl(folder / "none.jsonl", []), str(folder / "no_such_file.jsonl")]
    shown = [jsonl(folder / "held_out.jsonl", held_out), prompts[0], jsonl(folder / "twice.jsonl", held_out[:1] * 2)]
    sd3 = model("Stable Diffusion 3")
    common = (prompts, shown, records(folder), references(folder, sd3), calibrations(folder, sd3))
    return lambda names: drawn_configs.Files({name: model(name) for name in names}, *common)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """What becomes of a config: models are read from disk once and copied, without the texts' encoders, which nothing
    changes; the run is stopped after its first iteration."""
    patch, folder, read = pytest.MonkeyPatch(), tmp_path_factory.mktemp("runs"), {}
    load, tally = policies.load, Counter()

    def copied(model, *, guidance, size, **settings):
        key = repr((model, settings))
        if settings["offload"] or settings["quantize"]:
            return load(model, guidance=guidance, size=size, **settings)
        if key not in read:
            read[key] = load(model, guidance=guidance, size=size, **settings)
        first = read[key]
        fixed = {id(part): part for name, part in first.pipe.components.items() if name.startswith(("text", "token"))}
        return type(first)(copy.deepcopy(first.pipe, fixed), guidance, size)

    patch.setattr(session.policies, "load", copied)
    patch.setenv("MMALIGN_ALLOW", "smooth")

    def answer(number: int, settings: dict) -> str:
        out = folder / f"{number}"
        values = settings | {"out": str(out)}
        try:
            c = configs.build(values, "drawn")
        except BadInput as error:
            return tallied("rejected", error)
        refusal = None
        try:
            runs.train(c, console=Console(quiet=True))
        except BadInput as error:
            refusal = error
        except Exception as error:
            error.add_note(f"config {number}: {settings}")
            raise
        if refusal:
            assert not out.exists() or not [*out.iterdir()], (number, settings, refusal)
            return tallied("refused", refusal)
        adapters = [load_file(path) for path in out.glob("checkpoints/*/adapter.safetensors")]
        assert adapters
        assert all(bool(value.isfinite().all()) for own in adapters for value in own.values())
        return tallied("ran", "")

    def tallied(kind: str, why) -> str:
        WHY.append(f"{kind} {why}")
        assert "\n" not in str(why)
        tally[kind] += 1
        return kind

    yield answer, tally
    patch.undo()


def test_what_is_accepted_runs_or_is_refused_before_anything_is_written(answered, files):
    answer, tally = answered
    for number in range(30):
        answer(number, drawn_configs.drawn(number, files(FAST)))
    assert tally["ran"] >= 10
    assert tally["refused"] >= 2


@pytest.mark.slow
def test_five_hundred_of_all_families(answered, files):
    answer, tally = answered
    for number in range(1000, 1900):
        answer(number, drawn_configs.drawn(number, files(FAMILIES)))
    assert tally["ran"] + tally["refused"] >= 500
    print(dict(tally))
