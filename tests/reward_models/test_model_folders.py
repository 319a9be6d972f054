"""Tests of untrusted model folders: no scorer runs code from them, and damage is reported in one line."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import tiny_scorers
import torch
from corpus import folders
from safetensors.torch import load_file, save_file

from reward_models import Prompt, limits, load, model_folders

LOADERS = (
    "clip", "pickscore", "hpsv2", "aesthetic", "image_reward", "hpsv3", "grounded", "geneval", "vqa", "vlm_yes_no",
    "rational", "context",
)  # fmt: skip
PROMPTS = [Prompt("a cross", {"include": [{"class": "cross", "count": 1}]})] * 2


def built(name: str, folder: Path) -> dict:
    """A scorer's folder, and the settings that read it."""
    folder.mkdir()
    if name == "clip":
        return {"model": str(tiny_scorers.open_clip_folder(folder))}
    return tiny_scorers.settings(name, folder)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of each scorer, built once; a copy of it with its settings."""
    made = {}

    def copy(name: str, to: Path) -> dict:
        if name not in made:
            place = tmp_path_factory.mktemp(name) / "model"
            made[name] = place, built(name, place)
        place, settings = made[name]
        shutil.copytree(place, to, symlinks=True)
        return {
            key: value.replace(str(place), str(to)) if isinstance(value, str) else value
            for key, value in settings.items()
        }

    return copy


def values(name: str, settings: dict) -> torch.Tensor:
    images = torch.linspace(0, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    return load(name, **settings)(images, PROMPTS).values


# ------------------------------------------------------------------------------------------------------- nothing runs


@pytest.mark.parametrize("name", LOADERS)
def test_python_files_in_a_folder_are_never_imported(good, tmp_path, monkeypatch, name):
    """With the settings that would have a library import them, and without, where the scores are as before."""
    settings = good(name, tmp_path / "model")
    before = values(name, settings)
    folders.plant(tmp_path / "model", tmp_path / "ran")
    monkeypatch.chdir(tmp_path / "model")
    assert (
        torch.equal(
            values(name, settings),
            before,
        )
        or before.isnan().any()
    )
    for key in folders.CODE:
        settings = good(name, tmp_path / key)
        folders.plant(tmp_path / key, tmp_path / "ran")
        folders.order(tmp_path / key, key)
        monkeypatch.chdir(tmp_path / key)
        if folders.settings_of(tmp_path / key):
            with pytest.raises(ValueError, match=key.split()[0]) as refused:
                load(name, **settings)
            assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_the_tokenizer_of_a_clip_folder_runs_no_code(good, tmp_path):
    """Settings for open_clip beside a tokenizer that names a module."""
    settings = good("clip", tmp_path / "model")
    folders.plant(tmp_path / "model", tmp_path / "ran")
    path = tmp_path / "model/open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "any", "tokenizer_kwargs": {"trust_remote_code": True}}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer_kwargs|trust_remote_code"):
        load("clip", **settings)
    del config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]
    path.write_text(json.dumps(config))
    (tmp_path / "model/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}})
    )
    with pytest.raises(ValueError, match=r"tokenizer_config.json: auto_map: .* stands for code"):
        load("clip", **settings)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("other", ["text", "/etc", "./text", "../text", ".", "~/text"])
def test_a_text_tower_is_not_read_from_a_place_beside(good, tmp_path, monkeypatch, other):
    settings = good("clip", tmp_path / "model")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "configuration_mine.Mine"}}))
    folders.plant(tmp_path / "text", tmp_path / "ran")
    path = tmp_path / "model/open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = other
    path.write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"hf_model_name: .* (leads to another place|is not a model of the hub)"):
        load("clip", **settings)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        {"a": [{"b": {"auto_map": {"AutoModel": "x.Y"}}}]}, {"text_config": {"attn_implementation": "a/b"}},
        {"attn_implementation": {"": "sdpa", "vision": "a/b"}}, {"attn_implementation": 3},
        {"attn_implementation": "flash_attention_2"}, {"trust_remote_code": 1}, {"trust_remote_code": "false"},
        {"quantization_config": "awq-ish"}, {"quantization_config": {"quant_method": ["awq"]}},
        {"num_hidden_layers": 10**6}, {"layers": [3, 4, 10**6, 3]}, {"layers_per_block": 5000}, {"depth": 201},
        {"num_train_timesteps": 10**9}, {"num_train_timesteps": 0}, {"chat_template": "x" * (limits.TEMPLATE + 1)},
        {"tokenizer_kwargs": {"bpe_path": "/dev/zero"}}, {"tokenizer_kwargs": {"reduction_mask": "syntax"}},
        {"anything": "hf-hub:a/b"}, {"tokenizer_class": "a/b"}, {"image_processor_type": "os:system"},
    ],
)  # fmt: skip
def test_settings_that_are_refused(value):
    with pytest.raises(ValueError, match=r"^here: \w+: "):
        model_folders.check_settings(value, "here")


@pytest.mark.parametrize(
    "value",
    [
        {"auto_map": None}, {"auto_map": {}}, {"trust_remote_code": False}, {"attn_implementation": None},
        {"attn_implementation": "sdpa"}, {"attn_implementation": {"": "eager", "vision": None}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"quantization_config": None},
        {"num_hidden_layers": 96}, {"layers": [3, 4, 6, 3]}, {"num_attention_heads": 4096}, {"vocab_size": 256000},
        {"tokenizer_kwargs": {"clean": "canonicalize", "strip_sep_token": True}}, {"hf_model_name": "org/name-1.3B"},
        {"backbone": "resnet50"}, {"timm_model_name": "vit_base_patch16_224"}, {"tokenizer_class": "CLIPTokenizer"},
        {"tokenizer_class": None}, {"name": "auto_map"}, {"chat_template": "{{ messages }}"}, [], 3, None,
    ],
)  # fmt: skip
def test_settings_that_are_fine(value):
    model_folders.check_settings(value, "here")


def test_every_model_of_open_clip_is_fine():
    import open_clip

    for name in open_clip.list_models():
        model_folders.check_settings(open_clip.get_model_config(name), name)


def test_a_template_and_a_vocabulary_are_bounded(tmp_path, monkeypatch):
    (tmp_path / "chat_template.jinja").write_text("x" * (limits.TEMPLATE + 1))
    with pytest.raises(ValueError, match=r"^it: chat_template.jinja has 1048577 bytes; 1048576 are read at most"):
        model_folders.check(tmp_path, "it")
    monkeypatch.setattr(limits, "VOCABULARY", 10)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"auto_map": 1}}}')
    with pytest.raises(ValueError, match=r"^it: tokenizer.json has 37 bytes; 10 are read at most"):
        model_folders.check(tmp_path, "it")


def test_the_words_of_a_vocabulary_are_no_settings(tmp_path):
    (tmp_path / "vocab.json").write_text('{"auto_map": 17, "trust_remote_code": 18}')
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"auto_map": 1}}}')
    model_folders.check(tmp_path, "it")


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", folders.DAMAGE)
@pytest.mark.parametrize("name", ["clip", "pickscore", "vqa"])
def test_a_damaged_setting_is_one_line(good, tmp_path, name, damage):
    settings = good(name, tmp_path / "model")
    path = folders.settings_of(tmp_path / "model")[0]
    folders.DAMAGE[damage](path)
    with pytest.raises(ValueError, match=path.name) as refused:
        load(name, **settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", folders.WEIGHTS)
@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv3"])
def test_damaged_weights_are_one_line(good, tmp_path, name, damage):
    settings = good(name, tmp_path / "model")
    folders.WEIGHTS[damage](next((tmp_path / "model").glob("*.safetensors")))
    with pytest.raises(ValueError, match=f"^{name}: ") as refused:
        load(name, **settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("clip", lambda w: w.pop("positional_embedding"), "positional_embedding"),
        ("clip", lambda w: w.update(extra=torch.zeros(2)), "extra"),
        ("clip", lambda w: w.update(text_projection=torch.zeros(3, 3)), "text_projection"),
        ("pickscore", lambda w: w.pop("text_projection.weight"), "lacks 1 weights of CLIPModel"),
        ("pickscore", lambda w: w.update({"visual_projection.weight": torch.zeros(3, 3)}), "could not be loaded"),
        (
            "vqa",
            lambda w: w.pop(next(n for n in w if n.endswith("norm.weight"))),
            "lacks 1 weights",
        ),
    ],
)
def test_weights_of_another_model_are_refused(good, tmp_path, name, spoil, reason):
    settings = good(name, tmp_path / "model")
    path = next((tmp_path / "model").glob("*.safetensors"))
    weights = load_file(path)
    spoil(weights)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=reason) as refused:
        load(name, **settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "key"), [("pickscore", "vocab_size"), ("vqa", "hidden_size"), ("clip", "width")])
def test_a_config_cannot_ask_for_more_than_its_weights_hold(good, tmp_path, name, key):
    """A library would make up what is missing, until there is no memory left."""
    settings = good(name, tmp_path / "model")
    path = tmp_path / "model" / ("open_clip_config.json" if name == "clip" else "config.json")
    config = json.loads(path.read_text())
    part = config["model_cfg"]["text_cfg"] if name == "clip" else config["text_config"]
    part[key] = 2**24
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"its config describes [\d,]+ numbers, its weights are [\d,]+ bytes"):
        load(name, **settings)


def survives(name: str, settings: dict) -> None:
    """Refused in one line, or scores that are numbers or have a reason."""
    line, scorer = "", None
    try:
        scorer = load(name, **settings)
    except ValueError as error:
        line = str(error)
    assert "\n" not in line
    if scorer is None:
        return
    images = torch.linspace(0, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    scores = scorer(images, PROMPTS)
    for i, row in enumerate(scores.values.tolist()):
        assert all(map(math.isfinite, row)) or scores.failures[i]


def spoiled(folder: Path, part: int, of: int):
    """Each of a folder's settings changed in turn; every `of`-th of the changes, from number `part` on."""
    number = 0
    for path in folders.settings_of(folder):
        whole = path.read_text()
        for _, value in folders.mutations(json.loads(whole)):
            if number % of == part:
                path.write_text(json.dumps(value))
                yield
            number += 1
        path.write_text(whole)


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_a_changed_setting_is_one_line_or_numbers(good, tmp_path, name):
    settings = good(name, tmp_path / "model")
    for _ in spoiled(tmp_path / "model", 3, 29):
        survives(name, settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "pickscore", "vqa", "grounded"])
def test_every_changed_setting_is_one_line_or_numbers(good, tmp_path, name):
    settings = good(name, tmp_path / "model")
    for _ in spoiled(tmp_path / "model", 0, 1):
        survives(name, settings)


# ------------------------------------------------------------------------------------------------------------- errors


LINE = r"^it: a folder could not be loaded: \w+"


@pytest.mark.parametrize("error", [RecursionError("deep"), KeyError("x"), OSError("no"), MemoryError()])
def test_what_a_library_raises_is_one_line(error):
    with pytest.raises(ValueError, match=LINE), model_folders.loading("it", "a folder"):
        raise error


def test_a_library_may_raise_anything():
    with pytest.raises(ValueError, match=f"{LINE}.*JSON"), model_folders.loading("it", "a folder"):
        json.loads(3)


@pytest.mark.parametrize("wrong", ["None + 1", "[].no", "undefined", "(1)()"])
def test_a_mistake_of_our_own_is_no_fault_of_a_folder(wrong):
    """Wrong code must not pass for a damaged folder."""
    code = compile(f"def mistaken():\n    return {wrong}\n", "mine.py", "exec")
    module = {"__name__": "reward_models.mine"}
    exec(code, module)
    with pytest.raises((TypeError, AttributeError, NameError)), model_folders.loading("it", "a folder"):
        module["mistaken"]()


def test_a_folder_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"^it: .*config.json: No such file or directory"):
        model_folders.check(tmp_path, "it")
    os.remove(tmp_path / "config.json")
    (tmp_path / "part").mkdir()
    os.mkfifo(tmp_path / "part/model.safetensors")
    with pytest.raises(ValueError, match=r"^it: part/model.safetensors is not a regular file"):
        model_folders.check(tmp_path, "it")
