"""The adapter after two iterations of every plan, kernel, credit, objective, loss and rule, held to recorded values.

Bits depend on the processor and on the versions of torch and its libraries. Where all of these are those of the
recording, the hash of the adapter must be the recorded one; elsewhere the first iteration's numbers must agree.
"""

import hashlib
import json
import platform
from pathlib import Path

import pytest
import torch
from run_config import rows, run

from mmalign.runs import checkpoint

RECORD = Path(__file__).parent / "corpus" / "known_adapters.json"
BASE = dict(
    held_out=None, rewards={"smooth:Smooth.red": 1.0, "smooth:Smooth.even": 0.5}, iterations=2, prompts_per_iteration=2,
    seeds=2, steps=4, lora_rank=2, minibatches=2, checkpoint_every=2,
)  # fmt: skip
BRANCH = {"plan": "branch", "branch_steps": [0, 1], "children": 2}
SDE = {"plan": "sde", "seeds": 4, "credit": "terminal"}
GAIN = {"plan": "sde", "seeds": 3, "credit": "gain", "score_states": "all"}
PLACES = {"region": "smooth:Smooth"}
IMAGES = {"plan": "ode", "seeds": 4, **PLACES}
CASES = {
    "branch": BRANCH,
    "branch, prompt baseline": BRANCH | {"baseline": "prompt", "children": 1},
    "branch, weighed by noise": BRANCH | {"weighting": "noise"},
    "branch, terminal credit": BRANCH | {"credit": "terminal"},
    "sde": SDE,
    "sde, cps": SDE | {"kernel": "cps"},
    "sde, ddim": SDE | {"kernel": "ddim"},
    "sde, dance_sde": SDE | {"kernel": "dance_sde", "noise": 0.3},
    "sde, scheduled": SDE | {"kernel": "scheduled", "noise": [0.5, 0.4, 0.3, 0.0]},
    "window": SDE | {"plan": "window", "window": [1, 3]},
    "window, children": SDE | {"plan": "window", "window": [1, 2], "children": 3, "seeds": 1},
    "window, progressive": SDE | {"plan": "window", "window": [0, 1], "window_moves": "progressive", "window_every": 1},
    "window, random": SDE | {"plan": "window", "window": [0, 1], "window_moves": "random"},
    "gain": GAIN,
    "gain, all steps, fitted": GAIN | {"compare": "walk", "control": "fit"},
    "gain, chosen states": GAIN | {"score_states": [0, 2], "completion": 2, "control": 0.5},
    "gain on branches": BRANCH | {"credit": "gain", "score_states": [0, 1, 2], "completion": [2, 1, 1]},
    "gain, budget": GAIN | {"max_forwards": 70},
    "guard": SDE | {"loss": "guard"},
    "masked": SDE | {"loss": "masked", "epochs": 2},
    "beta": SDE | {"beta": 0.1},
    "batch scale": SDE | {"advantage_scale": "batch", "advantage_floor": 0.01, "advantage_clip": 1.0},
    "no scale": SDE | {"advantage_scale": "none"},
    "saturated": SDE | {"saturated": -0.107},
    "product": SDE | {"combine": "product", "rewards": {"smooth:Positive.red": 0.5, "smooth:Positive.even": 0.5}},
    "gate": SDE
    | {
        "combine": "gate",
        "gate": "smooth:Positive.even",
        "rewards": {"smooth:Positive.even": 1.0, "smooth:Positive.red": 0.5},
    },
    "mrn": SDE | {"combine": "mrn", "advantage_scale": "none"},
    "gdpo": SDE | {"combine": "gdpo", "advantage_scale": "batch"},
    "constraint": SDE | {"at_least": {"smooth:Smooth.even": {"bound": 0.5, "rate": 1.0}}},
    "ramp": SDE | {"rewards": {"smooth:Smooth.red": {"start": 1.0, "end": 0.5}, "smooth:Smooth.even": 1.0}},
    "regions": SDE | PLACES | {"region_weight": 2.0, "whole_weight": 0.5},
    "regions, grid": SDE | PLACES | {"region_grid": [2, 2], "ratio_over": "credit"},
    "regions, gain": GAIN | PLACES,
    "map mask": SDE | PLACES | {"focus": "map"},
    "prompt mask": SDE | {"focus": "prompt", "focus_share": 0.25},
    "srum": IMAGES
    | {"objective": "srum", "draws": 2, "alpha_range": [-1, 1], "background": 0.1, "anchor": 0.5, "margin": 1.0},
    "rgdpo": IMAGES
    | {
        "region": "shapes",
        "prompts_per_iteration": 12,
        "rewards": {"shapes.partial": 1.0},
        "objective": "rgdpo",
        "draws": 2,
        "preference_scale": 10.0,
        "intra_weight": 1.0,
    },
    "srum on branches": BRANCH
    | PLACES
    | {"objective": "srum", "draws": 1, "alpha_range": [-1, 1], "background": 0.0, "anchor": 0.5, "margin": 0.0},
}


def environment() -> dict[str, str]:
    """What decides how sums are rounded."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": platform.machine(),
        "model": next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""),
    }


def adapter_hash(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over sorted names and raw bytes, its first 16 digits: how the recorded values were computed."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def result(case: dict, folder: Path) -> dict:
    """The adapter's hash, and the numbers of the first iteration."""
    out = run(BASE | {"out": str(folder / "run")} | case)
    row = {k: v for k, v in rows(out / "metrics.jsonl")[0].items() if "second" not in k}
    tensors, _ = checkpoint.read(checkpoint.latest(out / "checkpoints"))
    return {"adapter": adapter_hash(tensors["adapter"]), "first": row}


@pytest.mark.parametrize("name", CASES)
def test_the_adapter_is_the_recorded_one(tmp_path, name):
    record = json.loads(RECORD.read_text())
    got, expected = result(CASES[name], tmp_path), record["cases"][name]
    assert got["first"] == pytest.approx(expected["first"], rel=0.02, abs=1e-4, nan_ok=True)
    if record["environment"] == environment() and torch.get_num_threads() == 1:
        assert got["adapter"] == expected["adapter"]
