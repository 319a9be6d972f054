"""A stranger's pipeline runs nothing; a damaged one, or one with weights of another model, is reported in one line."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import mmalign
from corpus import folders as corpus
from safetensors.torch import load_file, save_file
from tiny_pipelines import SOME

from mmalign import policy as policies
from mmalign.policy import meta

ROOT = Path(__file__).parents[2]
QUICK = ["Stable Diffusion 3", "Z-Image"]


@pytest.fixture
def copy(folders, tmp_path):
    """A family's folder, copied."""
    return lambda name, to="model": Path(shutil.copytree(folders(name), tmp_path / to))


def refused(folder: Path) -> str:
    """The line with which a folder is refused."""
    with pytest.raises(ValueError, match=r"^model '") as error:
        policies.load(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ------------------------------------------------------------------------------------------------------- nothing runs


@pytest.mark.parametrize("name", SOME)
def test_python_files_in_a_pipeline_are_never_imported(copy, tmp_path, monkeypatch, name):
    folder = copy(name)
    corpus.plant(folder, tmp_path / "ran")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MMALIGN_ALLOW")
    for place in ("transformers.py", "diffusers.py"):  # diffusers looks for a part's module in its folder
        for path in folder.rglob(place):
            path.unlink()
    policies.load(str(folder))
    for key in corpus.CODE:
        folder = copy(name, key)
        corpus.plant(folder, tmp_path / "ran")
        corpus.order(folder, key)
        monkeypatch.chdir(folder)
        assert key.split()[0] in refused(folder)
    with pytest.raises(ValueError, match=key.split()[0]):
        meta.load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler", "transformer"])
@pytest.mark.parametrize("entry", [["pipeline", "Mine"], ["mine", "Mine"], ["os", "system"], ["..mine", "Mine"]])
def test_a_part_is_no_module_of_the_folder(copy, tmp_path, monkeypatch, part, entry):
    folder = copy("Stable Diffusion 3")
    corpus.plant(folder, tmp_path / "ran")
    change(folder / "model_index.json", **{part: entry})
    monkeypatch.chdir(folder)
    assert "which is not allowed" in refused(folder)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------ weights


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("name", SOME)
def test_a_part_that_lacks_weights_is_refused(copy, name):
    """transformers would make them up, and train on."""
    for number in range(len(modules(copy(name)))):
        folder = copy(name, f"model{number}")
        path = modules(folder)[number]
        weights = load_file(path)
        lost = sorted(n for n in weights if weights[n].ndim > 1)[len(weights) // 3 % 5]
        save_file({n: w for n, w in weights.items() if n != lost}, path, {"format": "pt"})
        line = refused(folder)
        assert path.parent.name in line
        assert "lacks 1 weights" in line or lost in line


@pytest.mark.parametrize("name", QUICK)
def test_a_part_with_weights_of_other_shapes_is_refused(copy, name):
    for number in range(len(modules(copy(name)))):
        folder = copy(name, f"model{number}")
        path = modules(folder)[number]
        weights = load_file(path)
        other = next(n for n in sorted(weights) if weights[n].ndim > 1)
        save_file(weights | {other: torch.zeros(3, 5)}, path, {"format": "pt"})
        assert path.parent.name in refused(folder)


def test_a_text_encoder_whose_weights_have_other_names_is_refused(copy):
    path = copy("Stable Diffusion 3") / "text_encoder_2/model.safetensors"
    save_file({f"old.{n}": w for n, w in load_file(path).items()}, path, {"format": "pt"})
    assert "its text_encoder_2 could not be loaded: the checkpoint lacks" in refused(path.parents[1])


def test_a_text_encoder_that_is_not_finite_is_refused(copy):
    path = copy("Stable Diffusion 3") / "text_encoder/model.safetensors"
    weights = load_file(path)
    save_file({n: torch.full_like(w, torch.nan) for n, w in weights.items()}, path, {"format": "pt"})
    assert "of a text are not finite" in refused(path.parents[1])


def test_a_text_encoder_of_another_width_is_refused(copy, tmp_path):
    """Each part is complete; they do not fit each other."""
    folder, other = copy("Stable Diffusion 3"), copy("FLUX.1-dev", "other")
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(other / "text_encoder_2", folder / "text_encoder_2")
    change(folder / "model_index.json", text_encoder_2=["transformers", "T5EncoderModel"])
    refused(folder)


@pytest.mark.parametrize("damage", corpus.WEIGHTS)
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_damaged_weights_are_one_line(copy, part, damage):
    folder = copy("Stable Diffusion 3")
    corpus.WEIGHTS[damage](next((folder / part).glob("*.safetensors")))
    assert part in refused(folder)


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("damage", corpus.DAMAGE)
@pytest.mark.parametrize("part", ["model_index.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_damaged_settings_are_one_line(copy, part, damage):
    folder = copy("Stable Diffusion 3")
    corpus.DAMAGE[damage](folder / part)
    refused(folder)


BROKEN = [
    ("Stable Diffusion 3", "model_index.json", {"vae": "AutoencoderKL"}, "vae: 'AutoencoderKL' is not the library"),
    ("Stable Diffusion 3", "model_index.json", {"transformer": ["diffusers"]}, "transformer"),
    ("Stable Diffusion 3", "model_index.json", {"transformer": {"diffusers": "X"}}, "transformer"),
    ("Stable Diffusion 3", "model_index.json", {"transformer": ["diffusers", "Nobody"]}, "Nobody"),
    ("Stable Diffusion 3", "model_index.json", {"vae": ["diffusers", "logging"]}, "is not the class of a part"),
    ("Stable Diffusion 3", "model_index.json", {"text_encoder": None}, "could not be loaded"),
    ("Stable Diffusion 3", "model_index.json", {"_class_name": None}, "names no pipeline"),
    ("Stable Diffusion 3", "scheduler/scheduler_config.json", {"shift": 0}, "times do not fall"),
    ("Stable Diffusion 3", "scheduler/scheduler_config.json", {"shift": -2}, "times do not fall"),
    ("Stable Diffusion 3", "scheduler/scheduler_config.json", {"shift": "2"}, "could not be loaded"),
    ("Stable Diffusion 3", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
    ("Stable Diffusion 3", "scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps"),
    ("Stable Diffusion 3", "vae/config.json", {"scaling_factor": 0}, "shift and scale are 0.1"),
    ("Stable Diffusion 3", "vae/config.json", {"scaling_factor": None}, "could not be loaded"),
    ("Stable Diffusion 3", "vae/config.json", {"scaling_factor": "1.3"}, "could not be loaded"),
    ("Stable Diffusion 3", "vae/config.json", {"scaling_factor": 10**30}, "shift and scale are"),
    ("Stable Diffusion 3", "vae/config.json", {"scaling_factor": 1e308}, "shift and scale are"),
    ("Stable Diffusion 3", "vae/config.json", {"block_out_channels": [16]}, "could not be loaded"),
    ("Stable Diffusion 3", "vae/config.json", {"latent_channels": 8}, "could not be loaded"),
    ("Stable Diffusion 3", "transformer/config.json", {"sample_size": "8"}, "could not be loaded"),
    ("Stable Diffusion 3", "transformer/config.json", {"sample_size": 10**9}, "sample_size 1000000000"),
    ("Stable Diffusion 3", "transformer/config.json", {"num_layers": 10**7}, "is more than 200 layers"),
    ("Stable Diffusion 3", "transformer/config.json", {"num_layers": 30}, "could not be loaded|describes"),
    ("Stable Diffusion 3", "transformer/config.json", {"patch_size": 0}, "could not be loaded"),
    ("Stable Diffusion 3", "text_encoder/config.json", {"vocab_size": 2**30}, "describes"),
    ("Stable Diffusion 3", "tokenizer/tokenizer_config.json", {"model_max_length": "77"}, "its tokenizer reads '77'"),
    ("FLUX.1-dev", "tokenizer_2/tokenizer_config.json", {"model_max_length": -1}, "its tokenizer_2 reads '-1'"),
    ("FLUX.1-dev", "transformer/config.json", {"axes_dims_rope": [4, 6, 8]}, "could not be loaded"),
    ("Qwen-Image", "vae/config.json", {"latents_std": [1.0, 1.0]}, "could not be loaded"),
    ("Qwen-Image", "vae/config.json", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "shift and scale are"),
    ("Qwen-Image", "vae/config.json", {"latents_mean": None}, "could not be loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "values", "reason"), BROKEN)
def test_settings_that_nothing_can_be_drawn_with_are_one_line(copy, name, path, values, reason):
    folder = copy(name)
    change(folder / path, **values)
    with pytest.raises(ValueError, match=reason) as error:
        policies.load(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["tokenizer", "vae", "scheduler", "transformer", "text_encoder"])
def test_a_part_that_is_missing_is_one_line(copy, part):
    folder = copy("Stable Diffusion 3")
    shutil.rmtree(folder / part)
    assert part in refused(folder)


def test_the_command_line_says_it_in_one_line(copy, tmp_path):
    folder = copy("Stable Diffusion 3")
    change(folder / "vae/config.json", scaling_factor=0)
    change(folder / "scheduler/scheduler_config.json", shift=0)  # numpy would warn
    result = mmalign("sample", "a circle", "--model", folder, "--out", tmp_path / "out")
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert not (tmp_path / "out").exists()


def spoiled(folder: Path, part: int, of: int):
    """Each of a folder's settings changed in turn; every `of`-th of the changes, from number `part` on."""
    number = 0
    for path in corpus.settings_of(folder):
        whole = path.read_text()
        for what, value in corpus.mutations(json.loads(whole)):
            if number % of == part:
                path.write_text(json.dumps(value))
                yield f"{path.relative_to(folder)}: {what}"
            number += 1
        path.write_text(whole)


def draws_or_is_refused(folder: Path) -> None:
    """Refused in one line, or images of numbers in [0, 1]."""
    line, policy = "", None
    try:
        policy = policies.load(str(folder), size=(32, 32))
    except ValueError as error:
        line = str(error)
    assert "\n" not in line
    if policy is None:
        return
    images = policy.decode(torch.zeros(1, *policy.latent_shape))
    assert all(map(math.isfinite, images.flatten().tolist()))


def test_a_changed_setting_is_one_line_or_images(copy):
    folder = copy("Stable Diffusion 3")
    for _ in spoiled(folder, 5, 97):
        draws_or_is_refused(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Stable Diffusion 3", "FLUX.1-dev", "Qwen-Image", "Z-Image"])
def test_every_changed_setting_is_one_line_or_images(copy, name):
    folder = copy(name)
    for _ in spoiled(folder, 0, 1 if name == "Stable Diffusion 3" else 5):
        draws_or_is_refused(folder)


# -------------------------------------------------------------------------------------------------------------- hub ids


def cached(folder: Path, hub: Path, name: str) -> None:
    """A folder as the hub's cache holds the repository `name`."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)


FROM_HUB = """
import sys
from mmalign import policy as policies
from mmalign.policy import meta
policies.quiet()
from reward_models import load
for name in ("good", "bad"):
    for what, opened in (
        ("policy", lambda: policies.load(f"org/{name}-pipe")), ("meta", lambda: meta.load(f"org/{name}-pipe")),
        ("clip", lambda: load("clip", model=f"hf-hub:org/{name}-clip")),
        ("pick", lambda: load("pickscore", model=f"org/{name}-pick", processor=f"org/{name}-pick")),
        ("vqa", lambda: load("vqa", model=f"org/{name}-vqa")),
        ("nowhere", lambda: policies.load("org/nowhere")),
    ):
        try:
            opened()
            print(name, what, "loaded")
        except ValueError as error:
            print(name, what, str(error))
"""


def test_what_the_hub_has_is_looked_at_too(folders, tmp_path):
    import tiny_scorers
    import tiny_vlm

    made = {"pipe": Path(folders("Stable Diffusion 3"))}
    for name, build in (
        ("clip", tiny_scorers.open_clip_folder), ("pick", tiny_scorers.transformers_clip), ("vqa", tiny_vlm.folder_of),
    ):  # fmt: skip
        made[name] = tmp_path / name
        made[name].mkdir()
        build(made[name])
    for name, folder in made.items():
        cached(folder, tmp_path / "hub", f"org/good-{name}")
        bad = Path(shutil.copytree(folder, tmp_path / f"bad-{name}"))
        corpus.plant(bad, tmp_path / "ran")
        corpus.order(bad, "auto_map")
        cached(bad, tmp_path / "hub", f"org/bad-{name}")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FROM_HUB], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 12, done.stderr
    for line in lines:
        name, what, result = line.split(" ", 2)
        if what == "nowhere":
            assert "is neither a folder here nor a model the hub knows" in result
        elif name == "good":
            assert result == "loaded", line
        else:
            assert "auto_map" in result, line
    assert not (tmp_path / "ran").exists()
