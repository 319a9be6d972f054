"""A stock Stable Diffusion 3 pipeline of a few thousand random weights, saved to disk once per run."""

import json
import os
import signal

import pytest
import torch
from tiny_pipelines import sd3

THREADS = int(os.environ.get("MMALIGN_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in a shell's background ignore it, as do their children
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # of processes that tests start, which share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub cannot be reached, and trying takes minutes


@pytest.fixture(autouse=True, scope="session")
def allowed():
    """Modules of tests/support may be named in configs; a test's own it allows itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMALIGN_ALLOW", "careless,faulty_scorers,odd_scorers,own_policy,slow_judge,smooth,tests")
        yield


@pytest.fixture(autouse=True)
def as_it_was():
    """The command line, tried in this process, changes how the smallest numbers are treated; scripts set threads."""
    torch.set_flush_denormal(False)
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("random_sd3")
    sd3(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory) -> dict[str, str]:
    """Two small disjoint files of prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    texts = ["a red circle", "a blue square", "two green crosses", "a circle above a square", "a cross", "a triangle"]
    for name, prompts in (("train", texts[:4]), ("held_out", texts[4:])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": t, "id": i}) + "\n" for i, t in enumerate(prompts))
        )
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "held_out")}


@pytest.fixture
def settings(random_model, prompt_files, tmp_path):
    return dict(
        model=random_model,
        prompts=prompt_files["train"],
        held_out=prompt_files["held_out"],
        rewards={"jpeg_size.kilobytes": 1.0},
        out=str(tmp_path / "run"),
        iterations=4,
        prompts_per_iteration=2,
        seeds=2,
        steps=4,
        plan={"type": "branch", "steps": [0, 1], "children": 2},
        lora_rank=2,
        eval_seeds=2,
        eval_steps=2,
        eval_every=2,
        checkpoint_every=2,
    )
