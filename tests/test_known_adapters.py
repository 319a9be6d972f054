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
CASES = {
    "branch": {"plan": {"type": "branch", "steps": [0, 1], "children": 2}},
    "branch, prompt baseline": {
        "plan": {"type": "branch", "steps": [0, 1], "children": 1},
        "credit": {"type": "branch", "baseline": "prompt"},
    },
    "branch, weighed by noise": {
        "plan": {"type": "branch", "steps": [0, 1], "children": 2},
        "objective": {"type": "grpo", "weighting": "noise"},
    },
    "branch, terminal credit": {"plan": {"type": "branch", "steps": [0, 1], "children": 2}, "credit": "terminal"},
    "sde": {"plan": "sde", "seeds": 4, "credit": "terminal"},
    "sde, cps": {"plan": "sde", "seeds": 4, "credit": "terminal", "kernel": "cps"},
    "sde, ddim": {"plan": "sde", "seeds": 4, "credit": "terminal", "kernel": "ddim"},
    "sde, dance_sde": {"plan": "sde", "seeds": 4, "credit": "terminal", "kernel": {"type": "dance_sde", "noise": 0.3}},
    "sde, scheduled": {
        "plan": "sde",
        "seeds": 4,
        "credit": "terminal",
        "kernel": {"type": "scheduled", "noise": [0.5, 0.4, 0.3, 0.0]},
    },
    "window": {"plan": {"type": "window", "steps": [1, 3]}, "seeds": 4, "credit": "terminal"},
    "window, children": {"plan": {"type": "window", "steps": [1, 2], "children": 3}, "seeds": 1, "credit": "terminal"},
    "window, progressive": {
        "plan": {"type": "window", "steps": [0, 1], "moves": "progressive", "every": 1},
        "seeds": 4,
        "credit": "terminal",
    },
    "window, random": {
        "plan": {"type": "window", "steps": [0, 1], "moves": "random"},
        "seeds": 4,
        "credit": "terminal",
    },
    "gain": {"plan": "sde", "seeds": 3, "credit": {"type": "gain", "states": "all"}},
    "gain, all steps, fitted": {
        "plan": "sde",
        "seeds": 3,
        "credit": {"type": "gain", "states": "all", "compare": "trajectory", "control": "fit"},
    },
    "gain, chosen states": {
        "plan": "sde",
        "seeds": 3,
        "credit": {"type": "gain", "states": [0, 2], "completion": 2, "control": 0.5},
    },
    "gain on branches": {
        "plan": {"type": "branch", "steps": [0, 1], "children": 2},
        "credit": {"type": "gain", "states": [0, 1, 2], "completion": [2, 1, 1]},
    },
    "gain, budget": {"plan": "sde", "seeds": 3, "credit": {"type": "gain", "states": "all"}, "max_forwards": 70},
    "guard": {"plan": "sde", "seeds": 4, "credit": "terminal", "loss": "guard"},
    "masked": {"plan": "sde", "seeds": 4, "credit": "terminal", "loss": "masked", "epochs": 2},
    "beta": {"plan": "sde", "seeds": 4, "credit": "terminal", "objective": {"type": "grpo", "beta": 0.1}},
    "batch scale": {
        "plan": "sde",
        "seeds": 4,
        "credit": "terminal",
        "advantage": {"scale": "batch", "floor": 0.01, "clip": 1.0},
    },
    "no scale": {"plan": "sde", "seeds": 4, "credit": "terminal", "advantage": {"scale": "none"}},
    "saturated": {"plan": "sde", "seeds": 4, "credit": "terminal", "advantage": {"saturated": -0.107}},
    "product": {
        "plan": "sde",
        "seeds": 4,
        "credit": "terminal",
        "combine": "product",
        "rewards": {"smooth:Positive.red": 0.5, "smooth:Positive.even": 0.5},
    },
    "gate": {
        "plan": "sde",
        "seeds": 4,
        "credit": "terminal",
        "combine": {"type": "gate", "by": "smooth:Positive.even"},
        "rewards": {"smooth:Positive.even": 1.0, "smooth:Positive.red": 0.5},
    },
    "mrn": {"plan": "sde", "seeds": 4, "credit": "terminal", "combine": "mrn", "advantage": {"scale": "none"}},
    "gdpo": {"plan": "sde", "seeds": 4, "credit": "terminal", "combine": "gdpo", "advantage": {"scale": "batch"}},
    "constraint": {
        "plan": "sde",
        "seeds": 4,
        "credit": "terminal",
        "at_least": {"smooth:Smooth.even": {"bound": 0.5, "rate": 1.0}},
    },
    "ramp": {
        "plan": "sde",
        "seeds": 4,
        "credit": "terminal",
        "rewards": {"smooth:Smooth.red": {"start": 1.0, "end": 0.5}, "smooth:Smooth.even": 1.0},
    },
    "regions": {
        "plan": "sde",
        "seeds": 4,
        "credit": "terminal",
        "region": "smooth:Smooth",
        "advantage": {"whole": 0.5, "regional": 2.0},
    },
    "regions, grid": {
        "plan": "sde",
        "seeds": 4,
        "credit": "terminal",
        "region": "smooth:Smooth",
        "region_grid": [2, 2],
        "objective": {"type": "grpo", "ratio": "credit"},
    },
    "regions, gain": {
        "plan": "sde",
        "seeds": 3,
        "credit": {"type": "gain", "states": "all"},
        "region": "smooth:Smooth",
    },
    "map mask": {"plan": "sde", "seeds": 4, "credit": "terminal", "region": "smooth:Smooth", "mask": "map"},
    "prompt mask": {"plan": "sde", "seeds": 4, "credit": "terminal", "mask": {"type": "prompt", "share": 0.25}},
    "srum": {
        "plan": "ode",
        "seeds": 4,
        "region": "smooth:Smooth",
        "objective": {"type": "srum", "draws": 2, "alpha": [-1, 1], "background": 0.1, "anchor": 0.5, "margin": 1.0},
    },
    "rgdpo": {
        "plan": "ode",
        "seeds": 4,
        "region": "shapes",
        "prompts_per_iteration": 12,
        "rewards": {"shapes.partial": 1.0},
        "objective": {"type": "rgdpo", "draws": 2, "scale": 10.0, "intra": 1.0},
    },
    "nft": {"plan": "ode", "seeds": 4, "objective": "nft"},
    "nft, lagging and pulled": {
        "plan": "ode",
        "seeds": 4,
        "objective": {"type": "nft", "lag": {"most": 0.5, "rate": 0.3}, "pull": 0.1, "shared": False},
    },
    "awm": {"plan": "ode", "seeds": 4, "objective": {"type": "awm", "weight": "huber"}, "epochs": 2},
    "awm, regions": {
        "plan": "ode",
        "seeds": 4,
        "objective": {"type": "awm", "weight": "error"},
        "region": "smooth:Smooth",
        "region_grid": [2, 2],
    },
    "advantage_flow": {"plan": "ode", "seeds": 4, "objective": {"type": "advantage_flow", "span": [0.0, 0.5]}},
    "dpo": {"plan": "ode", "seeds": 4, "objective": "dpo"},
    "online_dpo": {"plan": "ode", "seeds": 4, "objective": {"type": "online_dpo", "lag": {"most": 0.5, "rate": 0.5}}},
    "rft": {"plan": "ode", "seeds": 4, "objective": "rft"},
    "srum on branches": {
        "plan": {"type": "branch", "steps": [0, 1], "children": 2},
        "region": "smooth:Smooth",
        "objective": {"type": "srum", "draws": 1, "alpha": [-1, 1], "background": 0.0, "anchor": 0.5, "margin": 0.0},
    },
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
