"""The model card of an export: what the hub and readers make of it, and that the weights beside it still open."""

import contextlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import mmalign
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard, ModelCardData, constants
from hypothesis import example, given, settings as effort, strategies as st
from markdown_it import MarkdownIt
from peft import PeftModel
from PIL import Image
from run_config import run
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES

from mmalign.config import secrets
from mmalign.evaluation.generate import generate
from mmalign.pages import markdown
from mmalign.policy import export as exports
from mmalign.reporting import base_model, card, report
from mmalign.reporting.export import export_run
from mmalign.rewards.terms import AtLeast
from mmalign.runs import adapters
from mmalign.runs.inference import load_policy
from reward_models import Prompt
from reward_models.combine import Ramp

MODEL = str(Path(__file__).parents[1] / "assets/tiny_sd3")
HELD_OUT = ["a green circle", "a red square", "two blue crosses", "a black triangle", "a cross and a circle"]
STEPS = 3
SETTINGS = dict(
    rewards={"jpeg_size.kilobytes": 1.0}, watch=["image_stats"], iterations=1, prompts_per_iteration=2, seeds=2,
    steps=STEPS, plan="sde", credit="terminal", lora_rank=2, lora_alpha=12.0, learning_rate=0.02, ema=0.0, eval_seeds=2,
    eval_steps=STEPS, eval_every=0,
)  # fmt: skip
STOCK = {"dtype": torch.float32, "text_encoder_3": None, "tokenizer_3": None}
HOSTILE = (
    "--- | `code` ``` | <script>alert(1)</script> [a](http://x) ![b](c.png) \\| $x$ *y* __z__ ~~w~~ &lt; # '\" "
    "{{ 7 * 7 }} : - ? {a: b} !!python/object:os.system %TAG @ \u202e <!-- -->"
)


@pytest.fixture(scope="module")
def trained(prompt_files, tmp_path_factory) -> Path:
    """A run of one iteration on the embedded model."""
    place = tmp_path_factory.mktemp("trained")
    (place / "held_out.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in HELD_OUT))
    held_out = str(place / "held_out.jsonl")
    return run(SETTINGS, model=MODEL, prompts=prompt_files["train"], held_out=held_out, out=str(place / "run"))


@pytest.fixture(scope="module")
def made(trained) -> dict[str, Path]:
    """The folder with the card of each format."""
    place = trained.parent
    files = {form: export_run(trained, place / form, form) for form in exports.FORMATS}
    return {form: file if file.is_dir() else file.parent for form, file in files.items()}


def metadata(folder: Path) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def table(text: str) -> list[list[list[str]]]:
    """The texts of the cells of each table of a page, by row; a picture is its address."""
    tables, inside = [], False
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            inside = True
        elif token.type == "inline" and inside:
            parts = [re.sub(r'<img src="([^"]*)".*>', r"\1", child.content) for child in token.children]
            assert {child.type for child in token.children} <= {"text", "text_special", "html_inline"}
            tables[-1][-1].append("".join(parts))
            inside = False
    return tables


# ------------------------------------------------------------------------------------------------------------ weights


def test_each_way_to_load_an_export_gives_the_runs_images(trained, made):
    """Also with README.md and images in the folder."""
    policy = load_policy("", None, trained)
    prompts, seeds = [Prompt(HELD_OUT[0], id=0), Prompt(HELD_OUT[2], id=2)], [[3], [4]]
    expected, _ = generate(policy, prompts, seeds, STEPS, 2)

    def distance(pipe: StableDiffusion3Pipeline) -> float:
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            [prompt.text for prompt in prompts], num_inference_steps=STEPS, guidance_scale=1.0, max_sequence_length=0,
            sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist(), output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for [seed] in seeds],
        ).images  # fmt: skip
        return float((images - expected).abs().max())

    folder, name = made["diffusers"], exports.FORMATS["diffusers"].name
    assert {path.name for path in folder.iterdir()} == {name, "README.md", "images"}
    pipe = StableDiffusion3Pipeline.from_pretrained(MODEL, **STOCK)
    assert distance(pipe) > 0.05
    for how in ((folder, {}), (folder, {"weight_name": name}), (load_file(folder / name), {})):
        pipe.load_lora_weights(how[0], **how[1])
        assert distance(pipe) < 1e-4, how[1]
        pipe.unload_lora_weights()
    assert distance(pipe) > 0.05

    plain = pipe.transformer
    pipe.transformer = PeftModel.from_pretrained(plain, made["peft"])
    assert distance(pipe) < 1e-4
    pipe.transformer = pipe.transformer.unload()
    assert distance(pipe) > 0.05

    for key, a in load_file(folder / name).items():  # B A alone, added to the base
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            b = load_file(folder / name)[key.replace("lora_A", "lora_B")]
            with torch.no_grad():
                pipe.transformer.get_submodule(layer).weight += b @ a
    assert distance(pipe) < 1e-4
    assert distance(StableDiffusion3Pipeline.from_pretrained(made["merged"], **STOCK)) < 1e-4


def draws_its_picture(folder: Path, model: str, place: Path) -> bool:
    """Whether the code of a card, run in a new folder beside its export and the base model, draws the first picture
    after training, and not that before."""
    page = (folder / "README.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert "In float32 on a CPU this draws, to rounding, an image after training that is shown below." in page
    place.mkdir()
    (place / folder.name).symlink_to(folder)
    (place / Path(model).name).symlink_to(model)
    with contextlib.chdir(place):
        exec(compile(code, "card", "exec"), {})
    paths = (place / "image.png", folder / "images/after-1.png", folder / "images/before-1.png")
    drawn, after, before = (np.asarray(Image.open(path), dtype=float) for path in paths)
    return np.abs(drawn - after).max() <= 1 and np.abs(drawn - before).max() > 10


@pytest.mark.parametrize("form", ["diffusers", "peft", "merged"])
def test_the_code_of_a_card_draws_the_picture_that_it_shows(made, form, tmp_path):
    assert draws_its_picture(made[form], MODEL, tmp_path / "place")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "guidance"), [(name, g) for name, family in FAMILIES.items() for g in family.guidances]
)
def test_the_code_is_right_for_each_family(prompt_files, name, guidance, tmp_path):
    torch.manual_seed(0)
    FAMILIES[name].build(tmp_path / "base")
    out = run(
        SETTINGS, model=str(tmp_path / "base"), prompts=prompt_files["train"], held_out=prompt_files["held_out"],
        guidance=guidance, size=[32, 48], learning_rate=0.05, out=str(tmp_path / "run"),
    )  # fmt: skip
    for form in ("diffusers", "peft", "merged"):
        file = export_run(out, tmp_path / form, form)
        folder = file if file.is_dir() else file.parent
        assert draws_its_picture(folder, str(tmp_path / "base"), tmp_path / f"{form} place"), form


def test_sample_takes_a_folder_with_a_card(trained, made, tmp_path):
    drawn = []
    for name, how in (("run", [trained]), ("lora", [made["diffusers"], "--model", MODEL])):
        ended = mmalign("sample", "a green circle", "--steps", STEPS, "--out", tmp_path / name, "--adapter", *how)
        assert (ended.returncode, ended.stderr) == (0, "")
        drawn.append(np.asarray(Image.open(tmp_path / name / "00000-0.png"), dtype=float))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


# ----------------------------------------------------------------------------------------------------------- the card


@pytest.mark.parametrize("form", exports.FORMATS)
def test_the_hub_reads_the_metadata(made, form):
    lora = [] if form == "merged" else ["lora"]
    assert metadata(made[form]) == {
        "base_model": "tiny_sd3", "base_model_relation": "adapter" if lora else "finetune", "license": "apache-2.0",
        "library_name": "peft" if form == "peft" else "diffusers", "pipeline_tag": "text-to-image",
        "tags": [*lora, "diffusers", "text-to-image", "mmalign", "sd3"],
        "widget": [{"text": HELD_OUT[row // 2], "output": {"url": f"images/after-{number}.png"}}
                   for number, row in enumerate((0, 2, 4, 6), 1)],
    }  # fmt: skip
    assert "<Gallery />" in (made[form] / "README.md").read_text()
    assert [path.name for path in card.pictures(made[form])] == [
        f"{side}-{number}.png" for side in ("before", "after") for number in range(1, 5)
    ]


def test_a_card_shows_what_the_report_shows(trained, made):
    pictures, scores, rewards, versions = table((made["diffusers"] / "README.md").read_text())
    rows = [json.loads(line) for line in (trained / "images/after/scores.jsonl").read_text().splitlines()][:8:2]
    assert pictures == [["prompt", "seed", "before", "after"]] + [
        [row["prompt"], str(row["noise_seed"]), f"images/before-{number}.png", f"images/after-{number}.png"]
        for number, row in enumerate(rows, 1)
    ]
    for number, row in enumerate(rows, 1):
        copy = Image.open(made["diffusers"] / f"images/after-{number}.png")
        assert np.array_equal(copy, Image.open(trained / "images/after" / row["image"]))
    rise = report.summary(trained)["rises"]["jpeg_size.kilobytes"]
    assert scores[0] == ["score", "before", "after", "rise", "95 %", "p"]
    assert scores[1] == [
        "jpeg_size.kilobytes", f"{rise['before']:.3f}", f"{rise['after']:.3f}", f"{rise['rise']:+.3f}",
        f"{rise['low']:+.3f} to {rise['high']:+.3f}", f"{rise['p']:.2g}",
    ]  # fmt: skip
    assert rewards[1:] == [["jpeg_size.kilobytes", "1"], ["image_stats", "evaluated only"]]
    assert [row[0] for row in versions[1:]] == ["mmalign", "torch", "diffusers", "transformers", "peft"]
    assert versions[2][1:] == [torch.__version__.partition("+")[0]] * 2 or versions[2][1:] == [torch.__version__] * 2


def test_a_card_tells_neither_places_nor_which_checkpoint_was_good(trained, made):
    for folder in made.values():
        page = (folder / "README.md").read_text()
        assert str(trained.parent) not in page
        assert str(Path(MODEL).parent) not in page
        assert "of the newest checkpoint, after iteration 1 of 1.\nIt was not chosen by its scores." in page
        assert "tiny_sd3, has the licence apache-2.0" in page
    [settings] = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    assert yaml.safe_load(settings)["held_out"] == "held_out.jsonl"


def exported(folder: Path, run: Path, **changed) -> card.Exported:
    """An export to write a card for, as `export_run` describes it."""
    c, _ = adapters.saved(run)
    folder.mkdir()
    return card.Exported(
        "diffusers", folder / "pytorch_lora_weights.safetensors", run, c.model_copy(update=changed), 1, False, None,
        "StableDiffusion3Pipeline", {}, {"guidance_scale": 1.0}, "sd3",
    )  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def rewrite(run: Path, change) -> None:
    """Change each row of the scores on both sides."""
    for side in ("before", "after"):
        file = run / "images" / side / "scores.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


@pytest.mark.usefixtures("offline")
def test_hostile_texts_stay_text(copied, tmp_path):
    rewrite(copied, lambda row: row | {"prompt": HOSTILE, "scores": {HOSTILE: 1.0, "other": row["id"]}})
    card.write(replace(exported(tmp_path / "lora", copied, model=HOSTILE, watch=[HOSTILE]), tag=HOSTILE))
    page = (tmp_path / "lora/README.md").read_text()
    data = metadata(tmp_path / "lora")
    assert [entry["text"] for entry in data["widget"]] == [HOSTILE] * 4
    assert data["tags"][-1] == HOSTILE
    assert "base_model" not in data  # the hub has no such names
    pictures, scores, rewards, _ = table(page.partition("\n---\n")[2])
    one_line = " ".join(HOSTILE.split())
    assert [row[0] for row in pictures[1:]] == [one_line] * 4
    assert [row[0] for row in scores[1:]] == [one_line, "other"]
    assert {len(row) for row in scores} == {6}
    assert rewards[-1] == [one_line, "evaluated only"]
    tokens = MarkdownIt("commonmark").enable("table").parse(page.partition("\n---\n")[2])
    assert [token.content for token in tokens if token.type == "html_block" and "script" in token.content] == []
    [code, settings] = [token.content for token in tokens if token.type == "fence"]
    assert repr(HOSTILE) in code
    compile(code, "card", "exec")
    assert yaml.safe_load(settings)["watch"] == secrets.public([HOSTILE])


@effort(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("|`<>[]*_~\\&;#$-"), min_size=1))
@example("__a__ _b_ c_d e__f **g** ~~h~~ <i> [j](k) `l` &amp; \\|")
def test_any_text_stays_text(text):
    cells = table(f"| a | b |\n|---|---|\n| {markdown.escaped(text)} | end |\n")
    assert cells == [[["a", "b"], [" ".join(text.split()), "end"]]]
    widget = [{"text": text, "output": {"url": "images/after-1.png"}}]
    assert ModelCard(f"---\n{ModelCardData(widget=widget).to_yaml()}\n---\n").data.widget == widget
    block = MarkdownIt("commonmark").parse(str(markdown.fenced(text, "python")))
    assert [(token.type, token.content.rstrip()) for token in block] == [("fence", text.rstrip())]


def test_a_run_without_held_out_prompts_has_no_pictures(copied, tmp_path):
    shutil.rmtree(copied / "images")
    (copied / "evaluations.jsonl").unlink()
    card.write(exported(tmp_path / "lora", copied, held_out=None))
    page = (tmp_path / "lora/README.md").read_text()
    assert "This run has no held-out prompts, so there are no images and scores to show." in page
    assert "widget" not in metadata(tmp_path / "lora")
    assert "Gallery" not in page
    assert not (tmp_path / "lora/images").exists()


def test_pictures_of_another_iteration_are_not_shown(copied, tmp_path):
    rewritten = (copied / "evaluations.jsonl").read_text().replace('"iteration": 1,', '"iteration": 9,')
    (copied / "evaluations.jsonl").write_text(rewritten)
    card.write(replace(exported(tmp_path / "lora", copied), named=True))
    page = (tmp_path / "lora/README.md").read_text()
    assert "those after iteration 9, not of this checkpoint, and are not shown" in page
    assert "This checkpoint was chosen by\nhand." in page
    assert not (tmp_path / "lora/images").exists()


def test_damaged_pictures_and_older_runs_are_named(copied, tmp_path):
    rewrite(copied, lambda row: {key: value for key, value in row.items() if key != "noise_seed"})
    (copied / "images/after/00000-0.png").write_bytes(b"PNG")
    (copied / "images/before/00002-0.png").unlink()
    (copied / "alarms.jsonl").write_text("{}\n")
    card.write(exported(tmp_path / "lora", copied))
    page = (tmp_path / "lora/README.md").read_text()
    pictures = table(page)[0]
    assert pictures[1] == [HELD_OUT[0], "not recorded", "images/before-1.png", "00000-0.png is damaged"]
    assert pictures[3][2:] == ["00002-0.png is missing", "images/after-3.png"]
    assert len(metadata(tmp_path / "lora")["widget"]) == 3
    assert "Files of the run that are missing or damaged: alarms.jsonl: line 1: iteration: Field required" in page
    assert "In float32 on a CPU" not in page


def test_pictures_outside_the_run_are_refused(copied, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    rewrite(copied, lambda row: row | {"image": "../../../secret.png"})
    result = mmalign("export", copied, "--out", tmp_path / "lora")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "leads out of that folder" in result.stderr
    assert not (tmp_path / "lora/README.md").exists()


def test_another_readme_is_not_replaced_and_an_older_card_is(copied, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    result = mmalign("export", copied, "--out", folder)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"--out {folder}/README.md: another file is there; it is not overwritten" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    (folder / "README.md").unlink()
    (folder / "images").mkdir()
    (folder / "images/mine.png").write_text("mine")
    assert mmalign("export", copied, "--out", folder).returncode == 0
    assert len(card.pictures(folder)) == 8
    (copied / "evaluations.jsonl").write_text("")
    result = mmalign("export", copied, "--out", folder)
    assert result.returncode == 0, result.stderr
    assert f"{folder}/README.md: the model card" in result.stdout
    assert [path.name for path in (folder / "images").iterdir()] == ["mine.png"]
    assert "was not evaluated at its end" in (folder / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------- the licence

BOMB = "a: &a [x, x]\nb: &b [*a, *a, *a]\nlicense: mit"


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: other\nlicense_name: sai\nlicense_link: https://x/y",
         {"license": "other", "license_name": "sai", "license_link": "https://x/y"}),
        ("license: other\nlicense_name: sai\nlicense_link: LICENSE.md", {"license": "other", "license_name": "sai"}),
        ("license: mit\nlicense_link: 'javascript:alert(1)'", {"license": "mit"}),
        ("license: [mit]", base_model.UNKNOWN), ("license: MIT <b>", base_model.UNKNOWN), ("a: 1", base_model.UNKNOWN),
        ("license_name: sai", base_model.UNKNOWN), ("license: 'mit", base_model.UNKNOWN), ("- mit", base_model.UNKNOWN),
        (BOMB, base_model.UNKNOWN), (None, base_model.UNKNOWN),
    ],
)  # fmt: skip
def test_the_licence_is_that_of_the_base(tmp_path, front, expected):
    (tmp_path / "README.md").write_text("# A model, Apache-2.0" if front is None else f"---\n{front}\n---\n# A model")
    assert base_model.licence(str(tmp_path)) == expected


@pytest.mark.usefixtures("offline")
def test_an_unknown_licence_is_called_unknown(copied, tmp_path):
    for model in (str(tmp_path), "nobody/nothing", "own_policy:Mine"):
        assert base_model.licence(model) == base_model.UNKNOWN
    card.write(exported(tmp_path / "lora", copied, model=str(tmp_path / "run")))
    data, page = metadata(tmp_path / "lora"), (tmp_path / "lora/README.md").read_text()
    assert (data["license"], data["license_name"]) == ("other", "unknown-see-the-base-model")
    assert "The licence of the base model, run, is unknown" in page


@pytest.mark.usefixtures("offline")
def test_the_licence_of_a_base_on_the_hub_is_in_its_card_there(tmp_path, monkeypatch):
    """Here in the hub's cache on this disk."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, place = "a" * 40, tmp_path / "models--owner--a-model"
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    front = "license: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: LICENSE.md"
    (place / "snapshots" / commit / "README.md").write_text(f"---\n{front}\n---\n# A model")
    assert base_model.licence("owner/a-model") == {
        "license": "other", "license_name": "flux-1-dev-non-commercial-license",
        "license_link": f"{constants.ENDPOINT}/owner/a-model/resolve/main/LICENSE.md",
    }  # fmt: skip


def test_rewards_are_listed_as_they_were_trained_on(copied):
    c, _ = adapters.saved(copied)
    rewards = {"clip.cosine": Ramp(0.0, 1.0), "shapes.strict": 0.5}
    changed = c.model_copy(update={"rewards": rewards, "at_least": {"ocr.match": AtLeast(bound=0.25)}, "watch": ["x"]})
    assert card._rewards(changed) == [
        ("clip.cosine", "0 to 1, linear"), ("shapes.strict", "0.5"), ("ocr.match", "constraint: at least 0.25"),
        ("x", "evaluated only"),
    ]  # fmt: skip
    of_records = card._rewards(changed.model_copy(update={"records": "records.jsonl", "at_least": {}}))
    assert of_records == [(name, "evaluated only") for name in ("clip.cosine", "shapes.strict", "x")]


@pytest.mark.usefixtures("offline")
def test_a_base_on_the_hub_keeps_its_name(copied, tmp_path):
    card.write(exported(tmp_path / "lora", copied, model="owner/a-model"))
    assert metadata(tmp_path / "lora")["base_model"] == "owner/a-model"
    assert "from_pretrained('owner/a-model', dtype=torch.float32)" in (tmp_path / "lora/README.md").read_text()
