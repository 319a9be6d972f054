"""DeepSpeed's ZeRO stage 2 in real processes on this machine, joined by gloo, against plain AdamW in one."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from ranks_in_processes import launch, learn
from run_config import cut_off, rows, run
from safetensors.torch import load_file

from mmalign.distributed import deepspeed as zero, processes as ranks
from mmalign.errors import BadInput

SETTINGS = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}, "gradient_clipping": "auto"}
ZERO2 = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="2")


def test_deepspeed_or_a_launcher_that_is_missing_is_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(ranks, "is_deepspeed_available", lambda: False)
    with pytest.raises(BadInput, match=r"^DeepSpeed 0.19.8 or newer is not installed; pip install 'mmalign\[zero\]'$"):
        ranks.join(1.0)
    monkeypatch.setattr(ranks, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(ranks, "compare_versions", lambda *_: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(BadInput, match=r"^ACCELERATE_USE_DEEPSPEED is set without a launcher"):
        ranks.join(1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_stage: 3 in"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer_device: cpu"),
        ({"bf16": {"enabled": True}}, "bf16 in DeepSpeed's settings"),
        ({"gradient_clipping": 1.0}, "gradient_clipping: 1.0 in"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4 in"),
        ({"train_batch_size": 8}, "train_batch_size: 8 in"),
        ({"optimizer": {"type": "Adam"}}, "optimizer in DeepSpeed's settings"),
    ],
)
def test_settings_that_would_do_something_else_are_refused(changed, message):
    with pytest.raises(BadInput, match=f"^{message}"):
        zero._settings(SETTINGS | changed, [], 2)


def test_settings_left_open_are_the_runs():
    adapter = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))]
    settings_ = SETTINGS | {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}}
    tensors = zero._settings(settings_ | {"bf16": {"enabled": "auto"}}, adapter, 3)
    assert tensors["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 17, "overlap_comm": True}
    assert (tensors["train_batch_size"], tensors["gradient_clipping"], tensors["bf16"]) == (3, 0.0, {"enabled": False})
    assert tensors["gradient_allreduce_op"] == "sum"


@pytest.fixture(scope="module")
def base(random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    lines = [json.dumps({"prompt": f"train {i}", "id": i}) for i in range(7)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return dict(
        model=random_model, prompts=str(folder / "train.jsonl"), held_out=None, rewards={"smooth:Smooth.red": 1.0},
        iterations=3, prompts_per_iteration=3, seeds=2, steps=4,
        plan={"type": "branch", "steps": [0, 1], "children": 2}, lora_rank=2, minibatches=2,
        checkpoint_every=2, batch=1, decode_batch=1,
    )  # fmt: skip


LEARNT = {
    "uneven": dict(objective={"type": "grpo", "weighting": "noise"}, prompts_per_iteration=5, epochs=2),
    "one-sided": dict(prompts_per_iteration=2, minibatches=20),  # of most minibatches one process has no row
    "micro": dict(objective={"type": "grpo", "beta": 0.01}, micro_batch=3, minibatches=3, max_grad_norm=1e-3),
}


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """Everything that two processes are asked, in one start of them, and what one gives alone."""
    pytest.importorskip("deepspeed", reason="pip install 'mmalign[zero]'")
    folder = tmp_path_factory.mktemp("two")
    whole = base | dict(iterations=4)
    alone = run(whole, out=str(folder / "alone"))
    with cut_off(2):
        run(whole, out=str(folder / "resumed"))
    spoilt = base | dict(
        model="own_policy:Spoilt", iterations=4, minibatches=1, micro_batch=999, checkpoint_every=1, keep_checkpoints=9,
        max_skips=1,
    )  # fmt: skip
    runs = {
        "whole": (whole | {"out": str(folder / "whole")}, False),
        "resumed": (whole | {"out": str(folder / "resumed")}, True),
        "spoilt": (spoilt | {"out": str(folder / "spoilt")}, False),
        "broken": (spoilt | {"out": str(folder / "broken"), "model": "own_policy:Broken", "patience": 20.0}, False),
        "eight": (base | {"out": str(folder / "eight"), "optimizer": "adamw8bit"}, False),
    }
    env = ZERO2 | {"MODEL": base["model"]}
    tensors, ended, message, _ = launch(folder, 2, {name: base | job for name, job in LEARNT.items()}, runs, **env)
    return SimpleNamespace(
        folder=folder, alone=alone, whole=whole, spoilt=spoilt, tensors=tensors, ended=ended, message=message
    )


def saved(out, iteration, file):
    return load_file(out / f"checkpoints/{iteration:06d}/{file}.safetensors")


def alike(one, other, bound=1e-5):
    assert set(one) == set(other)
    for key, value in one.items():
        assert torch.allclose(other[key], value, rtol=1e-5, atol=bound, equal_nan=True), key


def same_checkpoints(one, other, iteration):
    for file in ("adapter", "ema"):
        alike(saved(one, iteration, file), saved(other, iteration, file))
    plain, shared = saved(one, iteration, "optimizer"), saved(other, iteration, "optimizer")
    alike(plain, {key: shared[key] for key in plain})
    assert not any(shared[key].any() for key in set(shared) - set(plain) if not key.endswith("step"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNT)
def test_two_learn_what_one_does(base, two, name):
    """Losses, norms of gradients, statistics, matrices; the second with gradients that are clipped."""
    settings = base | LEARNT[name]
    one, many = ({k: v for k, v in job.items() if "gradient/" not in k} for job in (learn(settings), two.found[name]))
    assert {"row/0/loss", "row/2/grad_norm"} < set(one)
    alike(one, many)


@pytest.mark.slow
def test_checkpoints_are_those_of_one_process_and_go_on_in_either(two):
    """A matrix that has had no gradient has no moments in one process, and zeros here."""
    for name in ("whole", "resumed"):
        assert [job[name][0] for job in two.ended] == ["done", "done"]
        same_runs(two, name)
    shutil.rmtree(two.folder / "whole/checkpoints/000004")
    run(two.whole, True, out=str(two.folder / "whole"))
    same_runs(two, "whole")


def same_runs(two, name):
    same_checkpoints(two.alone, two.folder / name, 4)
    for one, other in zip(*(rows(two.folder / n / "metrics.jsonl") for n in ("alone", name)), strict=True):
        for key in ("loss", "grad_norm", "reward", "transitions", "replay_forwards"):
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), (name, key)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out(base, two, monkeypatch):
    """In one process's share alone; nothing moves in that iteration, and the next continues as in one process."""
    assert [job["spoilt"][0] for job in two.ended] == ["done", "done"]
    out = two.folder / "spoilt"
    assert [row["skipped"] for row in rows(out / "metrics.jsonl")] == [0, 1, 0, 0]
    for file in ("adapter", "ema", "optimizer"):
        before, after = saved(out, 1, file), saved(out, 2, file)
        assert all(torch.equal(before[key], after[key]) for key in before | after)
    monkeypatch.setitem(os.environ, "MODEL", base["model"])
    run(two.spoilt, out=str(two.folder / "spoilt-alone"))
    same_checkpoints(two.folder / "spoilt-alone", out, 4)
    moved = saved(out, 2, "adapter"), saved(out, 3, "adapter")
    assert not all(torch.equal(moved[0][key], moved[1][key]) for key in moved[0])


@pytest.mark.slow
def test_what_deepspeed_cannot_do_is_refused(two):
    assert all(job["eight"][0] == "BadInput: optimizer: adamw8bit does not go with DeepSpeed" for job in two.ended)


@pytest.mark.slow
def test_what_breaks_one_replay_ends_both_with_the_reason(two):
    """Without a sum of gradients that the other would wait in."""
    first, second = (job["broken"] for job in two.ended)
    assert second[0] == "ArithmeticError: the replay broke"
    assert first[0] == "Lost: rank 1 failed: ArithmeticError: the replay broke"
    assert max(first[1], second[1]) < 20
