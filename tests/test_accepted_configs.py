"""Whatever `build` accepts runs, or is refused in one line before anything is written: configs drawn at random, of all
families of models, are trained for one iteration with its evaluations."""

import copy
import json
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
from corpus import configs as drawn_configs
from PIL import Image
from rich.console import Console
from run_config import rows, run
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES

from mmalign import policy as policies, run as runs
from mmalign.config import load as configs
from mmalign.config.checks import component, first_without_weight
from mmalign.data.judged_images import read as read_records
from mmalign.errors import BadInput
from mmalign.policy.sd3 import SD3Policy
from mmalign.training import setup
from reward_models import load as load_scorer
from reward_models.combine import Ramp

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
    scorers = {name: dict(item) for name, item in drawn_configs.SCORERS.items()}
    owners = {component(name)[0] for name in names}
    versions = {name: load_scorer(name, **scorers.get(name, {})).card.version for name in owners}
    parts = {name: {"mean": 0.1, "std": 0.5, "images": 500} for name in names}
    whole = {"model": policies.load(model).fingerprint(), "scorers": versions, "components": parts}
    kinds = {
        "whole": whole, "lacking": whole | {"components": {}}, "flat": whole | {
            "components": {name: item | {"std": 0.0} for name, item in parts.items()}
        }, "text": whole | {"components": {name: item | {"std": "wide"} for name, item in parts.items()}},
        "list": [whole],
    }  # fmt: skip
    for name, item in kinds.items():
        (folder / f"reference_{name}.json").write_text(json.dumps(item))
    return [str(folder / f"reference_{name}.json") for name in kinds]


def calibrations(folder: Path, model: str) -> list[str]:
    """Of other steps, of text, of nothing."""
    times = [round(float(t), 6) for t in policies.load(model).times(4)]
    item = {"times": times, "guidance": 1.0, "model": model, "rewards": {}, "noise": [0.5] * 4}
    kinds = {"own": item, "short": item | {"noise": [0.5]}, "text": item | {"noise": "loud"}, "empty": {}}
    for name, record in kinds.items():
        (folder / f"noise_{name}.json").write_text(json.dumps(record))
    return [str(folder / f"noise_{name}.json") for name in kinds]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accepted")

    def model(name: str) -> str:
        item = folder / name.replace(" ", "_").replace(",", "")
        if not item.exists():
            torch.manual_seed(0)
            FAMILIES[name].build(item)
        return str(item)

    return folder, model


@pytest.fixture(scope="module")
def files(saved):
    """What configs name, with the models of some families."""
    folder, model = saved
    train_rows = [{"prompt": text, "id": i} for i, text in enumerate(["a red circle", "a cross", "two green squares"])]
    held_out = [{"prompt": text, "id": i} for i, text in enumerate(["a blue square", "a triangle"])]
    long = {"prompt": "a circle " * 60, "id": 9}
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

    def copied(model, *, guidance=1.0, size=None, **settings):
        key = repr((model, settings))
        if settings.get("offload"):
            return load(model, guidance=guidance, size=size, **settings)
        if key not in read:
            read[key] = load(model, guidance=guidance, size=size, **settings)
        first = read[key]
        fixed = {id(part): part for name, part in first.pipe.components.items() if name.startswith(("text", "token"))}
        return type(first)(copy.deepcopy(first.pipe, fixed), guidance, size)

    patch.setattr(setup.policies, "load", copied)
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
        assert all(bool(value.isfinite().all()) for item in adapters for value in item.values())
        return tallied("ran", "")

    def tallied(kind: str, reason) -> str:
        assert "\n" not in str(reason)
        tally[kind] += 1
        return kind

    yield answer, tally
    patch.undo()


ONE = {"smooth:Smooth.red": 1.0}
TWO = {"smooth:Smooth.red": 0.0, "smooth:Smooth.even": 0.0}
RISING, FALLING, CROSSING = {"start": 0, "end": 1}, {"start": 1, "end": 0, "over": "cosine"}, {"start": -1, "end": 1}
MRN, GDPO = ({"combine": name, "advantage": {"scale": unit}} for name, unit in (("mrn", "none"), ("gdpo", "batch")))
GATE = {"type": "gate", "by": "shapes.partial"}
SDE = dict(plan="sde", credit="terminal")
MAPPED = {"region": "smooth:Smooth", "rewards": ONE}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (MRN | {"rewards": TWO}, "rewards: all weights are 0 in iteration 1"),
        (GDPO | {"rewards": TWO}, "rewards: all weights are 0 in iteration 1"),
        ({"rewards": TWO}, "rewards: all weights are 0 in iteration 1"),
        ({"rewards": {"smooth:Smooth.red": RISING}}, "rewards: all weights are 0 in iteration 1"),
        (MRN | {"rewards": {"smooth:Smooth.red": FALLING}}, "rewards: all weights are 0 in iteration 5"),
        ({"rewards": {"smooth:Smooth.red": CROSSING, "smooth:Smooth.even": 0}}, "all weights are 0 in iteration 3"),
        ({"combine": "product", "rewards": {"shapes.partial": -1.0}}, "a weight below 0 under combine: product"),
        (
            {"combine": "product", "rewards": {"shapes.partial": CROSSING | {"end": 2}}},
            "a weight below 0 under combine: product",
        ),
        ({"kernel": {"type": "cps", "noise": 3.0}}, "kernel: noise: Input should be less than or equal to 1"),
        ({"kernel": {"type": "ddim", "noise": [0.5, 1.5, 1.0, 1.0]}}, "noise: .* should be less than or equal to 1"),
        ({"plan": {"type": "branch", "steps": []}}, "plan: steps: .* at least 1 item"),
        ({"plan": {"type": "branch", "steps": [0, 1, 0]}}, r"plan: steps: \[0, 1, 0\]; a step is there twice"),
        (SDE | {"credit": {"type": "gain", "states": [1, 1]}}, r"credit: states: \[1, 1\]; a state is there twice"),
        (SDE | {"credit": {"type": "gain", "states": []}}, "credit: states: .* at least 1 item"),
        ({"lora_targets": []}, "lora_targets: List should have at least 1 item"),
        ({"out": ""}, "out: String should have at least 1 character"),
    ],
)
def test_a_config_that_cannot_run_is_not_built(settings, changed, says):
    with pytest.raises(BadInput, match=says):
        configs.build(settings | {"rewards": ONE, "iterations": 5} | changed, "test")


@pytest.mark.parametrize(
    "rewards",
    [
        {"smooth:Smooth.red": RISING, "smooth:Smooth.even": 0.5},
        {"smooth:Smooth.red": RISING, "smooth:Smooth.even": FALLING},
        {"smooth:Smooth.red": CROSSING, "smooth:Smooth.even": RISING | {"start": 0.5}},
    ],
)
def test_ramps_that_pass_0_apart_are_built(settings, rewards):
    configs.build(settings | MRN | {"rewards": rewards, "iterations": 5}, "test")


@pytest.mark.parametrize(("iterations", "idle"), [(5, 2), (6, None), (2, None), (1, None), (10**9 + 1, 5 * 10**8)])
def test_the_iteration_in_which_a_ramp_is_0_is_found_however_many_there_are(iterations, idle):
    assert first_without_weight({"a.b": Ramp(-1, 1), "a.c": Ramp(2, -2)}, iterations) == idle


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "run"


def beside_rows(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").write_text('{"iteration": 1}')
    return tmp_path / "full"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (MAPPED | {"region_grid": [3, 3]}, "region_grid: 3x3 does not divide the latent's 8x8 positions"),
        (MAPPED | {"region_grid": [8, 16]}, "region_grid: 8x16 does not divide the latent's 8x8 positions"),
        ({"size": [64, 128]}, "size 64x128: the model has positions for 64 pixels a side"),
        ({"size": [264, 64]}, "size 264x64: the model has positions for 64 pixels a side"),
        (
            {"combine": "product", "rewards": {"smooth:Smooth.even": 1.0}},
            "product needs scores of at least 0; smooth",
        ),
        (
            {"combine": {"type": "gate", "by": "smooth:Smooth.red"}},
            "gate needs scores of at least 0; smooth:Smooth.red",
        ),
        (
            {
                "combine": {"type": "gate", "by": "shapes.partial"},
                "rewards": {"shapes.partial": 1, "shapes.strict": -2},
            },
            r"1 \+ the weighted sum of the others may be as low as -1",
        ),
        (SDE | {"kernel": {"type": "dance_sde", "noise": 1e-6}}, "step 0, .* would draw noise of standard deviation"),
        (SDE | {"kernel": {"type": "flow_sde", "noise": 1e3}}, "step 0, .* times the noise that belongs there"),
        ({"keep_best": "smooth:Smooth.blue"}, "keep_best: no component 'blue'; smooth:Smooth gives red, even"),
        ({"at_least": {"smooth:Smooth.blue": {"bound": 1}}}, "at_least: no component 'blue'"),
        ({"watch": ["no_such_scorer"]}, "no scorer called 'no_such_scorer'"),
        ({"prompts_per_iteration": 5}, "prompts_per_iteration: 5 requested, the file has 4"),
        ({"out": "x" * 300}, "out: cannot write in x+: File name too long"),
        ({"out": below_a_file}, "out: cannot write in .*: Not a directory"),
        ({"out": beside_rows}, "out: .*metrics.jsonl exists already and belongs to no run"),
    ],
)
def test_what_does_not_suit_the_model_the_scorers_or_the_folder_is_refused_first(settings, tmp_path, changed, says):
    changed = {key: str(value(tmp_path)) if callable(value) else value for key, value in changed.items()}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=says) as refusal:
        run(settings | {"rewards": ONE}, **changed)
    assert "\n" not in str(refusal.value)
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before


@pytest.mark.parametrize("name", ["Stable Diffusion 3", "Z-Image"])
def test_the_largest_size_that_a_table_of_positions_has_is_drawn(saved, name):
    """8 x 8 patches of 2 x 2 positions, or 128 x 128, each 4 pixels."""
    most = {"Stable Diffusion 3": 64, "Z-Image": 1024}[name]
    policy = policies.load(saved[1](name), size=(most, 16))
    x, cond, index = torch.zeros(1, *policy.latent_shape), policy.encode(["a cross"]), torch.zeros(1, dtype=torch.long)
    assert policy.velocity(x, torch.ones(1), cond, index).isfinite().all()
    with pytest.raises(ValueError, match=f"size {most + 8}x16: the model has positions for {most} pixels a side"):
        policies.load(saved[1](name), size=(most + 8, 16))


def test_steps_of_an_evaluation_whose_times_do_not_fall_are_refused(settings, monkeypatch):
    times = SD3Policy.times
    monkeypatch.setattr(SD3Policy, "times", lambda self, n: times(self, n) * (torch.nan if n == 1 else 1.0))
    with pytest.raises(BadInput, match="times must fall from noise to image"):
        run(settings, eval_steps=1)
    run(settings, eval_steps=1, held_out=None, iterations=1)


def test_constraints_alone_learn_once_one_is_broken(settings):
    """All weights are 0 until the first multiplier rises, also where scores are normalised in groups."""
    limit = {"smooth:Smooth.red": {"bound": 5.0, "rate": 0.5}}
    out = run(settings | MRN, rewards=dict.fromkeys(ONE, 0.0), at_least=limit, iterations=2, held_out=None)
    first, second = rows(out / "metrics.jsonl")
    assert first["reward"] == 0
    assert first["dead_groups"] == 1
    assert second["dead_groups"] == 0


def test_a_picture_that_ends_too_soon_is_no_record(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:-30])
    lines = [{"image": name, "prompt": "a", "score": 1.0} for name in ("whole.png", "cut.png")]
    result = read_records(jsonl(tmp_path / "records.jsonl", lines), (32, 32))
    assert [record.image.name for record in result.records] == ["whole.png"]
    assert [text.partition("cut.png")[0] for text in result.refused] == ["record 2: "]


def test_what_is_accepted_runs_or_is_refused_before_anything_is_written(answered, files):
    answer, tally = answered
    numbers = count()
    while tally["ran"] + tally["refused"] < 30:
        number = next(numbers)
        answer(number, drawn_configs.drawn(number, files(FAST)))
    assert tally["ran"] >= 12


@pytest.mark.slow
def test_five_hundred_of_all_families(answered, files):
    answer, tally = answered
    before, numbers = tally.copy(), count(1000)
    while (tally - before)["ran"] + (tally - before)["refused"] < 500:
        number = next(numbers)
        answer(number, drawn_configs.drawn(number, files(FAMILIES)))
    assert (tally - before)["ran"] >= 200
