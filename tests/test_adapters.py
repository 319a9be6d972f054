"""`--adapter`: a run and all that can be exported of it draw the same images; what is no adapter is refused in one
line."""

import json
import math
import os
import shutil
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import mmalign
from corpus import checkpoints as corpus
from hypothesis import HealthCheck, given, settings as effort, strategies as st
from PIL import Image
from run_config import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmalign import policy as policies
from mmalign.errors import BadInput
from mmalign.policy import lora
from mmalign.runs import adapters, lora_file, tensors as safe
from reward_models import limits

FILES = dict(zip(("diffusers", "comfyui", "peft"), adapters.NAMES, strict=True))


@pytest.fixture(scope="module")
def made(random_model, prompt_files, tmp_path_factory):
    """A finished run, whose alpha is not its rank and whose average has moved, and a folder of each export of it."""
    place = tmp_path_factory.mktemp("made")
    out = run(
        dict(
            model=random_model, prompts=prompt_files["train"], held_out=None, rewards={"jpeg_size.kilobytes": 1.0},
            iterations=2, prompts_per_iteration=2, seeds=2, steps=2, plan="sde", credit="terminal", lora_rank=2,
            lora_alpha=12.0, learning_rate=0.05, ema=0.5, guidance=2.0, size=[32, 48],
        ),
        out=str(place / "run"),
    )  # fmt: skip
    for form in FILES:
        ended = mmalign("export", out, "--out", place / form, "--format", form)
        assert (ended.returncode, ended.stderr) == (0, "")
    return place


def images(folder: Path, *more) -> np.ndarray:
    ended = mmalign("sample", "a red circle", "--seeds", "0,1", "--steps", "3", "--out", folder, *more)
    assert (ended.returncode, ended.stderr) == (0, "")
    return np.stack([np.asarray(Image.open(file), dtype=float) for file in sorted(folder.glob("*.png"))])


def test_several_adapters_act_as_a_mixture(made, random_model, tmp_path):
    run_of, other = made / "run", made / "peft"
    alone = images(tmp_path / "alone", "--adapter", run_of)
    both = ["--adapter", f"{run_of}=1.0", "--adapter", f"{other}=0"]
    assert np.array_equal(images(tmp_path / "both", *both), alone)
    base = images(tmp_path / "base", "--adapter", run_of, "--strength", "0")
    none = ["--adapter", f"{run_of}=0", "--adapter", f"{other}=0"]
    assert np.array_equal(images(tmp_path / "none", *none), base)
    less = images(tmp_path / "less", "--adapter", run_of, "--strength", "0.5")
    assert np.array_equal(images(tmp_path / "half", "--adapter", f"{run_of}=0.5"), less)
    halves = images(tmp_path / "halves", "--adapter", f"{run_of}=0.25", "--adapter", f"{made / 'comfyui'}=0.25")
    assert np.abs(halves - less).max() <= 1  # the same adapter twice
    refused = {"weight": ["--adapter", run_of, "--adapter", other], "twice": both[:2] * 2}
    for word, options in refused.items():
        ended = mmalign("sample", "a", "--out", tmp_path / "no", *options)
        assert ended.returncode == 2
        assert word in ended.stderr


def test_a_sum_of_adapters_is_exported_as_one(made, random_model, tmp_path):
    """Weights of 1 and 0 are the one adapter's export to the bit. A sum has the changes of weights of both."""
    run_of, files = made / "run", {form: made / form / FILES[form] for form in FILES}
    twice = ["--adapter", f"{run_of}=0.75", "--adapter", f"{files['peft']}=-0.5"]
    for form in ("diffusers", "comfyui"):
        out = tmp_path / form
        same = ["--adapter", f"{run_of}=1", "--adapter", f"{files['comfyui']}=0.0"]
        ended = mmalign("export", *same, "--out", out, "--format", form)
        assert (ended.returncode, ended.stderr) == (0, "")
        before, after = load_file(files[form]), load_file(out / FILES[form])
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    ended = mmalign("export", *twice, "--out", tmp_path / "less")
    assert (ended.returncode, ended.stderr) == (0, "")
    less, _ = lora_file.read(tmp_path / "less" / FILES["diffusers"])
    whole, _ = lora_file.read(files["diffusers"])
    assert {len(a) for a, _ in less.values()} == {4}  # the ranks add up
    for layer, (a, b) in whole.items():
        torch.testing.assert_close(less[layer][1] @ less[layer][0], 0.25 * b @ a)
    with safe_open(tmp_path / "less" / FILES["diffusers"], "pt") as file:
        assert json.loads(file.metadata()["mmalign.sum"]) == [["run", 0.75], [FILES["peft"], -0.5]]
    assert images(tmp_path / "drawn", "--adapter", tmp_path / "less", "--model", random_model).shape == (2, 32, 48, 3)
    refused = {
        "a run or --adapter": [run_of, *twice], "leave no adapter": ["--adapter", f"{run_of}=0"],
        "needs its weight": ["--adapter", run_of], "--model acts only": [run_of, "--model", random_model],
        "model card": [*twice, "--push", "a/b"],
    }  # fmt: skip
    for word, options in refused.items():
        ended = mmalign("export", *options, "--out", tmp_path / "no")
        assert ended.returncode == 2
        assert word in ended.stderr, word


def test_each_way_to_name_an_adapter_draws_the_same_images(made, random_model, tmp_path):
    expected = images(tmp_path / "run", "--adapter", made / "run")
    assert expected.shape == (2, 32, 48, 3)
    base = images(tmp_path / "base", "--model", random_model)
    ways = {"checkpoint": [made / "run/checkpoints/000002"]}
    for form, name in FILES.items():
        ways[f"{form} folder"] = [made / form, "--model", random_model]
        ways[f"{form} file"] = [made / form / name, "--model", random_model]
    for way, named in ways.items():
        result = images(tmp_path / way, "--adapter", *named)
        assert result.shape == expected.shape, way
        assert np.abs(result - expected).max() <= 1, way
    assert base.shape != expected.shape
    half = images(tmp_path / "half", "--adapter", *ways["peft file"], "--strength", "0.5")
    assert np.abs(half - expected).max() > 3


@pytest.mark.parametrize("form", FILES)
def test_a_file_without_a_header_gives_the_same_velocity(made, random_model, form, tmp_path):
    """Read by its tensors alone: the header has the guidance and the size that are drawn with by default, no matrix."""
    bare = tmp_path / FILES[form]
    save_file(load_file(made / form / FILES[form]), bare)
    with safe_open(bare, "pt") as file:
        assert file.metadata() is None
    of_run, of_file = adapters.read(made / "run"), adapters.read(bare)
    assert (of_run.guidance, of_run.size) == (2.0, (32, 48))
    assert (of_file.model, of_file.precision, of_file.guidance, of_file.size) == (None, "float32", 1.0, None)
    result = []
    for item in (of_run, of_file):
        policy = policies.load(random_model)
        item.attach(policy)
        cond, x = policy.encode(["a cross"]), torch.ones(1, *policy.latent_shape)
        with torch.no_grad():
            result.append(policy.velocity(x, torch.tensor([0.4]), cond, torch.tensor([0])))
            with policy.reference():
                plain = policy.velocity(x, torch.tensor([0.4]), cond, torch.tensor([0]))
    assert (result[0] - result[1]).abs().max() < 1e-5
    assert (result[0] - plain).abs().max() > 1e-2


def test_evaluate_and_refine_take_a_file_too(made, random_model, prompt_files, tmp_path):
    means = []
    for named in ([made / "run"], [made / "comfyui", "--model", random_model]):
        ended = mmalign(
            "evaluate", "--adapter", *named, "--rewards", "smooth:Smooth", "--prompts", prompt_files["held_out"],
            "--steps", "2", "--seeds", "1", "--json",
        )  # fmt: skip
        assert (ended.returncode, ended.stderr) == (0, "")
        means.append(json.loads(ended.stdout)["means"]["all"])
    assert means[0] == pytest.approx(means[1], abs=1e-5)
    first = []
    for place, named in enumerate(([made / "run"], [made / "peft", "--model", random_model])):
        ended = mmalign(
            "refine", "a red circle", "--adapter", *named, "--critic", "smooth:Smooth", "--rounds", "1", "--steps", "2",
            "--out", tmp_path / str(place), "--json",
        )  # fmt: skip
        assert ended.returncode == 0
        first.append(json.loads(ended.stdout)["first"])
    assert first[0] == pytest.approx(first[1], abs=1e-5)


def refused(path: Path, says: str, random_model: str, names: Path | None = None) -> None:
    ended = mmalign("sample", "a cross", "--adapter", path, "--model", random_model, "--steps", "1")
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert ended.stderr.count("\n") == 1
    assert says in ended.stderr
    assert str(names or path) in ended.stderr


@pytest.mark.parametrize(("name", "form"), zip(corpus.ADAPTERS, cycle(FILES), strict=False))
def test_a_forged_file_is_refused(made, random_model, name, form, tmp_path):
    forged = corpus.ADAPTERS[name]
    tensors = load_file(made / form / FILES[form])
    prefix = next(item for item in lora_file.PREFIXES if next(iter(tensors)).startswith(item))
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    forged.change(bare)
    file = tmp_path / FILES[form]
    save_file({prefix + key: value for key, value in bare.items()}, file)
    refused(file, forged.says, random_model)


def written(data: bytes):
    return lambda file: file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (written(b""), "not safetensors: 0 bytes"),
        (written(b"\0" * 8), "is damaged"),
        (written(b"\2\0\0\0\0\0\0\0{}" + b"\0" * 8), "is damaged"),
        (written(b"\xff" * 64), "a header of 18446744073709551615 bytes; 16777216 are allowed"),
        (written((10**5).to_bytes(8, "little") + b"[" * 10**5), "JSON nested too deeply"),
        (written((12).to_bytes(8, "little") + b'{"x": [NaN]}'), "NaN is not a JSON number"),
        (written((22).to_bytes(8, "little") + b'{"__metadata__": "aa"}'), "its header is not a JSON object of texts"),
        (lambda file: os.mkfifo(file), "not a regular file"),
        (lambda file: file.symlink_to(file.name), "Too many levels of symbolic links"),
        (lambda file: file.symlink_to("/dev/zero"), "not a regular file"),
    ],
)
def test_what_is_no_file_of_tensors_is_refused(random_model, damage, says, tmp_path):
    file = tmp_path / FILES["diffusers"]
    damage(file)
    refused(file, says, random_model)
    refused(tmp_path, says, random_model, file)


def test_a_file_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    save_file({"transformer.x.lora_A.weight": torch.ones(100, 100)}, tmp_path / "long.safetensors")
    assert safe.read(tmp_path / "long.safetensors")[0]["transformer.x.lora_A.weight"].shape == (100, 100)
    monkeypatch.setattr(limits, "TENSORS", 30000)
    with pytest.raises(ValueError, match=r"long\.safetensors is damaged: longer than 30000 bytes"):
        safe.read(tmp_path / "long.safetensors")


def test_folders_that_are_no_adapter_are_refused(made, random_model, tmp_path):
    refused(tmp_path / "nowhere", "no run there", random_model)
    refused(tmp_path, "no adapter (pytorch_lora_weights.safetensors, comfyui_lora.safetensors, adapter_", random_model)
    refused(Path(random_model), f"is a complete pipeline; load it by --model {random_model}", random_model)
    for form, name in FILES.items():
        shutil.copy(made / form / name, tmp_path / name)
    refused(tmp_path, f"found {' and '.join(adapters.NAMES)}; name one of the files", random_model)


def test_names_that_begin_in_two_ways_are_refused(made, random_model, tmp_path):
    file = tmp_path / FILES["diffusers"]
    sound = load_file(made / "diffusers" / file.name)
    for more, says in (
        ("text_encoder.q.lora_A.weight", "'text_encoder.q.lora_A.weight' begins with none of transformer., "),
        ("diffusion_model.q.lora_A.weight", "does not begin with 'diffusion_model.'"),
        ("unet.q.lora_A.weight", "'unet.q.lora_A.weight' does not begin with 'transformer.'"),
    ):
        save_file(sound | {more: torch.ones(2, 2)}, file)
        refused(file, says, random_model)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"guidance": "nan"}, "its header's guidance"), ({"guidance": "1e9"}, "its header's guidance"),
        ({"precision": "int8"}, "its header's precision"), ({"size": "[99999, 99999]"}, "its header's size"),
        ({"size": "["}, "its header's size"), ({"base_hash": "../x"}, "its header's base_hash"),
        ({"size": "[33, 33]"}, "must be a multiple of"),
    ],
)  # fmt: skip
def test_a_header_that_says_the_impossible_is_refused(made, random_model, about, says, tmp_path):
    file = tmp_path / FILES["diffusers"]
    save_file(load_file(made / "diffusers" / file.name), file, {f"mmalign.{key}": item for key, item in about.items()})
    ended = mmalign("sample", "a cross", "--adapter", file, "--model", random_model, "--steps", "1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_another_base_is_said(made, random_model, tmp_path):
    """And no more: the header of a file proves nothing."""
    file = tmp_path / FILES["diffusers"]
    save_file(load_file(made / "diffusers" / file.name), file, {"mmalign.base_hash": "0" * 16})
    ended = mmalign("sample", "a cross", "--adapter", file, "--model", random_model, "--steps", "1", "--out", tmp_path)
    assert ended.returncode == 0
    weights = policies.load(random_model).fingerprint()
    assert (
        ended.stderr == f"mmalign: {file} was made for other weights, {'0' * 16}; those of this model are {weights}\n"
    )


def test_a_strength_in_diffusers_header_alone_is_refused(made, random_model, tmp_path):
    """diffusers would multiply by it, ComfyUI would not."""
    file = tmp_path / FILES["diffusers"]
    tensors = load_file(made / "diffusers" / file.name)
    for alpha, good in ((2.0, True), (12.0, False)):
        settings = {"transformer.r": 2, "transformer.lora_alpha": alpha}
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(settings)})
        if good:
            assert adapters.read(file).size is None
        else:
            refused(file, "its header gives", random_model)
    save_file(tensors, file, {"lora_adapter_metadata": "[1]"})
    refused(file, "its header's lora_adapter_metadata is not a JSON object", random_model)


# peft's settings


def strengths(folder: Path, **changed) -> dict[str, float]:
    """How much stronger each layer is than its tensors alone are, with peft's settings changed."""
    file = folder / lora_file.PEFT_CONFIG
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (settings | changed).items() if value != "gone"}))
    try:
        item = lora.matrices(lora_file.split_prefix(load_file(folder / FILES["peft"]))[1])
        result = {}

        class Taking:
            def insert_lora(self, matrices):
                for layer, (_, b) in matrices.items():
                    if item[layer][1].any():
                        result[layer] = float((b / item[layer][1])[item[layer][1] != 0].mean())

            def fingerprint(self):
                with safe_open(folder / FILES["peft"], "pt") as opened:
                    return opened.metadata()["mmalign.base_hash"]

        adapters.read(folder).attach(Taking())
        return result
    finally:
        file.write_text(json.dumps(settings))


def test_pefts_settings_say_how_strong_an_adapter_is(made, tmp_path):
    folder = Path(shutil.copytree(made / "peft", tmp_path / "peft"))
    assert set(strengths(folder).values()) == {1.0}
    assert strengths(folder, lora_alpha=6)["transformer_blocks.0.attn.to_q"] == pytest.approx(3)
    scaled = strengths(folder, lora_alpha=6, use_rslora=True)
    assert scaled["transformer_blocks.0.attn.to_q"] == pytest.approx(6 / math.sqrt(2))
    item = strengths(folder, alpha_pattern={"^transformer_blocks\\.0\\.attn\\.to_q": 1.0, "to_k": 8})
    assert item["transformer_blocks.0.attn.to_q"] == pytest.approx(0.5)
    assert item["transformer_blocks.1.attn.to_k"] == pytest.approx(4)
    assert item["transformer_blocks.1.attn.to_q"] == pytest.approx(1)
    (folder / lora_file.PEFT_CONFIG).unlink()
    assert len(adapters.read(folder / FILES["peft"]).precision) == 7  # the tensors alone


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"r": 4}, "has rank 4 in adapter_config.json, and matrices of 2"),
        ({"rank_pattern": {"to_q": 3}}, "has rank 3"),
        ({"r": "2"}, "r: Input should be a valid integer"),
        ({"r": "gone"}, "r: Field required"),
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number"),
        ({"peft_type": "IA3"}, "peft_type: Input should be 'LORA'"),
        ({"peft_type": "gone"}, "peft_type: Field required"),
        ({"use_dora": True}, "use_dora True is more than a plain LoRA"),
        ({"bias": "all"}, "bias 'all' is more than a plain LoRA"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save ['proj_out'] is more"),
        ({"lora_bias": True}, "lora_bias True is more"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True is more"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the model's own weights"),
        ({"something_new": 3}, "something_new 3 is more"),
        ({"alpha_pattern": {"(a+)+$": 1.0}}, "the pattern '(a+)+$' is not the name of a layer"),
        ({"alpha_pattern": {"to_q": "1"}}, "alpha_pattern.to_q: Input should be a valid number"),
    ],
)
def test_settings_that_are_not_read_are_refused(made, changed, says, tmp_path):
    folder = Path(shutil.copytree(made / "peft", tmp_path / "peft"))
    with pytest.raises(BadInput) as caught:
        strengths(folder, **changed)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", ["FIFO", "circle", "folder"])
def test_settings_that_are_no_file_are_refused(made, random_model, damage, tmp_path):
    folder = Path(shutil.copytree(made / "peft", tmp_path / "peft"))
    corpus.replaced(folder / lora_file.PEFT_CONFIG, damage)
    refused(folder, lora_file.PEFT_CONFIG, random_model)


# any file


@pytest.fixture(scope="module")
def small():
    """A sound adapter of two layers of different rank, and a network that it fits."""
    network = torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False), torch.nn.Linear(4, 3, bias=False))
    ranks = {"0": 2, "1": 1}
    matrices = {
        layer: (torch.randn(rank, network[int(layer)].in_features), torch.randn(network[int(layer)].out_features, rank))
        for layer, rank in ranks.items()
    }
    return network, matrices


@effort(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(alphas=st.dictionaries(st.sampled_from(["0", "1"]), st.floats(-1e3, 1e3, width=32)), half=st.booleans())
def test_alphas_ranks_and_types_are_honoured(small, tmp_path, alphas, half):
    """W + alpha / rank B A for each layer, whatever its rank; without an alpha, W + B A."""
    _, matrices = small
    tensors = lora.named(matrices, "transformer.")
    tensors = {key: value.half() if half else value for key, value in tensors.items()}
    tensors |= {f"transformer.{layer}.alpha": torch.tensor(alpha) for layer, alpha in alphas.items()}
    save_file(tensors, tmp_path / "any.safetensors")
    result = lora.changes(lora.matrices(lora_file.split_prefix(safe.read(tmp_path / "any.safetensors")[0])[1]))
    for layer, (a, b) in matrices.items():
        a, b = (value.half().float() if half else value for value in (a, b))
        expected = alphas.get(layer, len(a)) / len(a) * (b @ a)
        torch.testing.assert_close(result[layer], expected, rtol=1e-4, atol=1e-4)


@effort(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_of_any_kind_are_tensors_or_one_line(small, tmp_path, data):
    file = tmp_path / "any.safetensors"
    save_file(lora.named(small[1], "transformer."), file)
    content = bytearray(file.read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
    ):
        content[place] = value
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message = ""
    try:
        adapters.read(file)
    except BadInput as error:
        message = str(error)
    assert message == "" or (str(file) in message and "\n" not in message)
