"""Real processes on this machine, joined by gloo, against one: the same advantages, gradients, adapters and means; one
end for all."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import mmalign
from PIL import Image
from ranks_in_processes import launch, learn
from run_config import rows, run
from safetensors.torch import load_file

from mmalign.config.schema import Config

BETA = {"type": "grpo", "beta": 0.01}
LAST = {"type": "backprop", "way": {"type": "last", "steps": 2}}
SDE = dict(plan="sde", seeds=3)
ODE = dict(plan="ode", seeds=4, region="smooth:Smooth")
PLAIN = dict(plan="ode", seeds=4)
GRADED = dict(plan="ode", seeds=2)
BRIGHT = {"scorers": {"smooth:Smooth": {"limit": 0.52}}, "max_failed": 1.0}  # some images are not scored
FEW = {
    "terminal": SDE | dict(credit="terminal", prompts_per_iteration=3),
    "gain": SDE
    | dict(credit={"type": "gain", "control": "fit"}, objective=BETA, prompts_per_iteration=4),
    "branch": dict(objective={"type": "grpo", "weighting": "noise"}, prompts_per_iteration=5, epochs=2),
    "spending": SDE
    | dict(
        credit="terminal", seeds=4, select={"type": "extremes", "keep": 3}, scouts={"ratio": 2, "steps": 2},
        draw={"type": "pass_rate", "low": 0.4, "high": 0.6},
    ),
    "credits": SDE
    | dict(
        credit=["gain", {"type": "terminal", "weight": {"start": 0.5, "end": 1.0}}, {"type": "prl", "weight": 0.5}],
        rewards={"smooth:Smooth.red": 1.0, "smooth:Again.even": {"weight": 0.5, "density": "end"}},
        seeds=4, select={"type": "prof", "keep": 2},
    ),
    "region": BRIGHT
    | dict(region="smooth:Smooth", region_grid=[2, 2], advantage={"scale": "batch", "regional": 1.0}),
    "nft": PLAIN | dict(objective={"type": "nft", "lag": {"most": 0.5, "rate": 0.2}, "pull": 0.1}),
    "gdpo": dict(
        rewards={"smooth:Smooth.red": 1.0, "smooth:Smooth.even": 0.5}, combine="gdpo", advantage={"scale": "batch"},
        at_least={"smooth:Smooth.even": {"bound": 0.1}},
    ),
}  # fmt: skip
MORE = FEW | {
    "window": dict(
        plan={"type": "window", "steps": [0, 1], "children": 2, "moves": "random"}, credit="terminal", steps=6,
        rollout_parts=2,
    ),
    "value": SDE | dict(credit={"type": "value", "warmup": 1, "floor": 0.0}, prompts_per_iteration=4),
    "implicit": SDE
    | dict(credit={"type": "implicit", "grid": [2, 2], "scale": 1000.0, "updates": 2}, objective=BETA),
    "directed": SDE
    | dict(
        credit="terminal", rewards={"smooth:Smooth.red": 1.0, "smooth:Smooth.even": 0.5},
        combine={"type": "directed", "suffix": " {smooth:Smooth.red}"},
    ),
    "outcome": PLAIN | dict(objective={"type": "outcome", "scale": 100.0}),
    "awm": PLAIN | dict(objective={"type": "awm", "weight": "error"}, prompts_per_iteration=4),
    "online_dpo": PLAIN | dict(objective="online_dpo"),
    "srum": ODE | dict(objective={"type": "srum", "draws": 2, "alpha": [0, 1], "anchor": 0.5, "margin": 1.0}),
    "sparse": GRADED | dict(objective={"type": "backprop", "way": {"type": "sparse", "steps": 2}}),
    "low_variance": GRADED | dict(objective={"type": "backprop", "way": {"type": "low_variance", "least": 0.3}}),
    "nft and sparse": GRADED | dict(objective={"type": "sum", "parts": ["nft", "backprop"], "weights": [1.0, 0.5]}),
    "grpo and last": SDE | dict(credit="terminal", objective={"type": "sum", "parts": [BETA, LAST]}),
    "rgdpo": ODE | dict(objective={"type": "rgdpo", "draws": 2, "scale": 10.0, "intra": 1.0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    for name, count, first in (("train", 7, 2**40), ("held_out", 3, 2**53 + 1)):
        lines = [json.dumps({"prompt": f"{name} {i}", "id": first + i}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return dict(
        model=random_model, prompts=str(folder / "train.jsonl"), held_out=None, rewards={"smooth:Smooth.red": 1.0},
        iterations=3, prompts_per_iteration=3, seeds=2, steps=4,
        plan={"type": "branch", "steps": [0, 1], "children": 2}, lora_rank=2, minibatches=2,
        eval_every=2, eval_seeds=2, eval_steps=2, checkpoint_every=2,
        batch=1, decode_batch=1, micro_batch=1,  # a forward rounds by the rows it has, which differ
    )  # fmt: skip


BOUND = 1e-5
UNITS = 3  # an advantage is the rounding of rewards over their spread, some 1e-3 of their size: a digit more is lost
TOO_FEW = "BadInput: prompts_per_iteration: 1 for 2 processes; each needs one"


def apart(one, many):
    """All differences by kind: of advantages, gradients, rows, matrices; of advantages and logged numbers, beyond a
    hundred-thousandth of each."""
    assert set(one) == set(many)
    tensors = defaultdict(list)
    for key, value in one.items():
        kind = key.partition("/")[0]
        assert torch.equal(many[key].isnan(), value.isnan()), key
        away = (many[key] - value).abs() - (BOUND * value.abs() if kind in ("advantage", "row") else 0.0)
        away = away / UNITS if kind == "advantage" else away
        tensors[kind].append(away.nan_to_num(0.0).flatten())
    return {kind: torch.cat(parts) for kind, parts in tensors.items()}


def same(one, many):
    most = {kind: float(away.max()) for kind, away in apart(one, many).items()}
    assert max(most.values()) < BOUND, most


def test_two_processes_are_one(base, tmp_path):
    """The shortest of these: three prompts in unequal shares, two iterations, and a prompt too few for both."""
    settings = base | dict(iterations=2)
    runs = {"few": (settings | {"prompts_per_iteration": 1, "out": str(tmp_path / "few")}, False)}
    tensors, ended, *_ = launch(tmp_path, 2, {"learnt": settings}, runs)
    same(learn(settings), tensors["learnt"])
    assert [job["few"][0] for job in ended] == [TOO_FEW] * 2
    assert not (tmp_path / "few").exists()


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """Everything that two processes are asked, in one start of them; the last run kills the second."""
    folder = tmp_path_factory.mktemp("two")
    whole = base | dict(iterations=4, held_out=base["prompts"].replace("train", "held_out"), eval_seeds=2)
    alone = run(whole, out=str(folder / "alone"))
    shutil.copytree(alone, folder / "resumed")
    shutil.rmtree(folder / "resumed/checkpoints/000004")
    breaking = {"prompts_per_iteration": 7, "scorers": {"smooth:Smooth": {"fatal": 2**40 + 3}}, "patience": 8.0}
    killing = breaking | {"scorers": {"smooth:Smooth": {"fatal": 2**40 + 3, "kill": True}}}
    runs = {
        "whole": (whole | {"out": str(folder / "whole")}, False),
        "resumed": (whole | {"out": str(folder / "resumed")}, True),
        "again": (whole | {"out": str(folder / "whole")}, False),
        "few": (base | {"out": str(folder / "few"), "prompts_per_iteration": 1}, False),
        "breaking": (base | breaking | {"out": str(folder / "breaking")}, False),
        "killing": (base | killing | {"out": str(folder / "killing")}, False),
    }
    return folder, *launch(folder, 2, {name: base | job for name, job in FEW.items()}, runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_two_learn_what_one_does(base, two, name):
    same(learn(base | FEW[name]), two[1][name])


@pytest.mark.slow
def test_a_whole_run_of_two_is_that_of_one(two):
    """Three held-out prompts, shared by two ranks; files are written once."""
    folder = two[0]
    for name in ("whole", "resumed"):
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            tensors, expected = rows(folder / name / file), rows(folder / "alone" / file)
            assert [row["iteration"] for row in tensors] == [row["iteration"] for row in expected]
            for one, other in zip(tensors, expected, strict=True):
                names, known = ({key for key in row if "second" not in key} for row in (one, other))
                assert names == known
                for key in names - {"name", "texts"}:
                    assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5, nan_ok=True), key
        for file in ("adapter", "ema"):
            tensors, expected = (
                load_file(folder / n / f"checkpoints/000004/{file}.safetensors") for n in (name, "alone")
            )
            assert all(torch.allclose(tensors[key], expected[key], rtol=0, atol=1e-5) for key in expected)
    pictures = [
        sorted(p.relative_to(folder / n) for p in (folder / n / "images").rglob("*")) for n in ("whole", "alone")
    ]
    assert pictures[0] == pictures[1]
    shown = [[row["prompt"] for row in rows(folder / n / "credit.jsonl")] for n in ("whole", "alone")]
    assert shown[0] == shown[1]
    ids = [[row["id"] for row in rows(folder / n / "images/after/scores.jsonl")] for n in ("whole", "alone")]
    assert ids[0] == ids[1] == [2**53 + 1 + i for i in range(3) for _ in range(2)]


@pytest.mark.slow
def test_what_one_refuses_ends_both(two):
    _, _, ended, message, _ = two
    assert "already holds a run" in ended[0]["again"][0]
    assert ended[1]["again"][0] == f"Lost: rank 0 failed: {ended[0]['again'][0]}"
    for job in ended:
        assert job["few"][0] == TOO_FEW
    assert not message[1].strip()  # the second is silent
    assert "before: 3 held-out prompts" in message[0]


@pytest.mark.slow
def test_what_breaks_one_ends_both_with_the_reason(two):
    tensors = sorted(job["breaking"][0] for job in two[2])
    assert tensors[0] == "Failed: smooth:Smooth: the scorer broke"
    assert tensors[1].endswith("failed: Failed: smooth:Smooth: the scorer broke")
    assert all(job["breaking"][1] < 60 for job in two[2])


@pytest.mark.slow
def test_a_killed_process_is_missed_and_named(two):
    _, _, ended, _, codes = two
    dead = next(rank for rank, code in enumerate(codes) if code == -9)
    how, seconds = ended[1 - dead]["killing"]
    if dead == 1:
        assert how.startswith("Lost: waited 8 s for ")
        assert "missing: rank 1 (last at " in how
    else:
        assert how.startswith("Lost: the process that holds the store is gone")
    assert seconds < 60


FSDP2 = dict(
    ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_RESHARD_AFTER_FORWARD="true", FSDP_CPU_RAM_EFFICIENT_LOADING="false",
)  # fmt: skip


def drawn(out: Path, *of) -> np.ndarray:
    """What a user draws with a run's adapter or a model: 8-bit levels of two prompts and two seeds each."""
    made = mmalign("sample", "a cross", "a circle", *of, "--seeds", "0,1", "--out", out)
    assert made.returncode == 0, made.stderr
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]).astype(int)


@pytest.mark.slow
def test_a_sharded_network_learns_what_a_whole_one_does(base, tmp_path):
    """And saves the same matrices, which draw the same images. The shorter share of a minibatch is replayed to the
    length of the longer."""
    settings = base | dict(
        prompts_per_iteration=4, objective=BETA, micro_batch=3, minibatches=3, checkpoint_every=3
    )  # fmt: skip
    held_out = base["prompts"].replace("train", "held_out")
    runs = {
        "whole": (settings | {"held_out": held_out, "out": str(tmp_path / "run")}, False),
        "odd": (settings | {"prompts_per_iteration": 3, "out": str(tmp_path / "odd")}, False),
    }
    tensors, ended, *_ = launch(tmp_path, 2, {"learnt": settings}, runs, **FSDP2)
    one, many = ({k: v for k, v in job.items() if "forwards" not in k} for job in (learn(settings), tensors["learnt"]))
    same(one, many)
    assert [job["whole"][0] for job in ended] == ["done", "done"]
    assert all("does not divide among 2 processes" in job["odd"][0] for job in ended)
    alone = run(settings, held_out=held_out, out=str(tmp_path / "alone"))
    images = drawn(tmp_path / "images", "--adapter", tmp_path / "run")
    from_alone = abs(images - drawn(tmp_path / "of one", "--adapter", alone)).max()
    from_base = abs(images - drawn(tmp_path / "of none", "--model", settings["model"])).max()
    assert from_alone <= 1 < 3 < from_base, (from_alone, from_base)
    saved = load_file(tmp_path / "run/checkpoints/000003/adapter.safetensors")
    same({f"adapter/{k}": v for k, v in saved.items()}, {k: v for k, v in one.items() if k.startswith("adapter")})


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_credit_and_objective(base, tmp_path, size):
    """For numbers of groups that divide and that do not. Adam moves an element whose gradient is 0 but for rounding by
    a part of its rate, and others follow: one matrix element in a hundred may be further off, by less than the rate."""
    jobs = {f"{name}-{p}": base | job | {"prompts_per_iteration": p} for name, job in MORE.items() for p in (4, 5)}
    tensors, *_ = launch(tmp_path, size, jobs, {})
    for name, settings in jobs.items():
        away = apart(learn(settings), tensors[name])
        most = {kind: float(job.max()) for kind, job in away.items()}
        matrices = {kind: most.pop(kind) for kind in ("adapter", "ema")}
        assert max(most.values()) < BOUND, (name, most)
        assert max(matrices.values()) < Config.model_fields["learning_rate"].default, (name, matrices)
        assert all(float((away[kind] > BOUND).float().mean()) < 0.01 for kind in matrices), (name, matrices)
