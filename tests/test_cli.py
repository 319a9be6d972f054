"""The command line as a user meets it: exit codes, one clear line, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from command_line import mmalign
from safetensors.torch import load_file, save_file

from mmalign.policy import export as exports

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(random_model, prompt_files, tmp_path):
    path = tmp_path / "tiny.yaml"
    values = dict(
        model=random_model, prompts=prompt_files["train"], held_out=prompt_files["held_out"], out=str(tmp_path / "run"),
        rewards={"jpeg_size.kilobytes": 1.0}, iterations=2, prompts_per_iteration=2, steps=3,
        plan={"type": "branch", "steps": [0], "children": 2}, lora_rank=2, eval_seeds=1, eval_steps=2,
    )  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["learning_rat=1e-3"], "unknown key 'learning_rat', did you mean 'learning_rate'?"),
        (["iterations=many"], "iterations: Input should be a valid integer"),
        (["iterations=0"], "iterations: Input should be greater than or equal to 1, got 0"),
        (["iterations"], "override 'iterations' must look like key=value"),
        (["plan.children=1"], "compares siblings"),
        (["seeds=2", "plan.children=1"], "set baseline: prompt"),
        (["plan.steps=[2]"], "plan: branch: step 2 ends at t = 0"),
        (["plan.steps=[3]"], "plan: branch: step 3 is outside the plan's 3 steps"),
        (["plan={type: sde, steps: [0]}"], "plan: sde has no setting 'steps'; it has no settings"),
        (["plan={type: window, steps: [1, 1]}"], "plan: steps: [1, 1]"),
        (["seeds=2", "plan={type: window, steps: [1, 9]}"], "plan: window: step 2 ends at t = 0"),
        (["plan.child=3"], "plan: branch has no setting 'child', did you mean 'children'?"),
        (["credit={type: terminal, baseline: state}"], "credit: terminal has no setting 'baseline'"),
        (["credit.states=all"], "credit: branch has no setting 'states'"),
        (["credit.completion=2"], "credit: branch has no setting 'completion'"),
        (["credit={type: gain, states: [3]}"], "credit: states [3] must lie within 0 to 2"),
        (["credit={type: gain, completion: 0}"], "credit: completion: Input should be greater than or equal to 1"),
        (["credit={type: gain, completion: [1, 2]}"], "credit: completion: [1, 2] needs as many states, got all"),
        (["plan.moves=random"], "plan: branch has no setting 'moves'"),
        (["plan={type: window, every: 2}"], "plan: every: 2 acts only with moves: progressive"),
        (["loss=ppo"], "loss: no loss called 'ppo'; known: clipped, guard, masked, or my_module:MyClass"),
        (["loss.clip=0"], "loss: clip: Input should be greater than 0, got 0"),
        (["advantage={scale: none, floor: 0.1}"], "advantage: floor: 0.1 acts only where advantages are divided"),
        (["children=3"], "instead of these write plan: {children: 3, steps: [0], type: branch}"),
        (["noise=0.5"], "instead of these write kernel: {type: flow_sde, noise: 0.5}"),
        (["window_moves=random"], "window_moves: settings of a method belong to it now"),
        (["kernel.noise=[0.7]"], "1 noise levels for 3 steps"),
        (["kernel.noise=-1"], "kernel: noise: Input should be greater than 0"),
        (["kernel.noise=psi.json"], "kernel: noise: Input should be a valid number"),
        (["kernel={type: scheduled, noise: psi.json}"], "psi.json is not a file written by `mmalign calibrate`"),
        (["max_forwards=3"], "the thinnest plan takes 12 forwards and 4 rewards an iteration, allowed are 3 and any"),
        (["cooldown=3"], "exceed iterations 2"),
        (["prompts=nowhere.jsonl"], "prompts nowhere.jsonl: No such file or directory"),
        (["prompts=/dev/null"], "prompts /dev/null: not a regular file"),
        (["model=/nowhere"], "model '/nowhere'"),
        (["rewards={shape.strict: 1}"], "no scorer called 'shape'; near names: shapes"),
        (["rewards={jpeg_size.size: 1}"], "no component 'size'; jpeg_size gives kilobytes"),
        (["scorers={clip: {}}"], "settings for 'clip', which is neither in rewards nor in watch"),
        (["lora_targets=[to_z]"], "'to_z' matches no linear layer"),
        (["prompts_per_iteration=9"], "9 requested, the file has 4"),
        (["out=/proc/run"], "out: cannot write in /proc"),
        (["out=/dev/null/run"], "out: cannot write in /dev/null/run"),
    ],
)
def test_bad_input_is_one_line_and_code_2(config, overrides, says):
    result = mmalign("train", config, *overrides)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("mmalign: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in result.stderr
    assert not (config.parent / "run").exists()


def test_files_that_are_no_config(tmp_path):
    for text, says in [
        (None, "No such file"),
        ("a: [", "not YAML"),
        ("- 1", "a mapping of keys to values is needed, got list"),
    ]:
        path = tmp_path / "bad.yaml"
        if text is not None:
            path.write_text(text)
        result = mmalign("train", path)
        assert result.returncode == 2
        assert says in result.stderr
        assert "Traceback" not in result.stderr


def test_calibrated_noise_is_trained_with_and_belongs_to_its_schedule(config, tmp_path):
    noise = tmp_path / "noise.json"
    result = mmalign("calibrate", config, "--rounds", "2", "--out", noise)
    assert result.returncode == 0, result.stderr
    assert "round 2: gains above 0" in result.stdout
    assert noise.with_suffix(".png").exists()
    with_it = ["kernel=scheduled", f"kernel.noise={noise}"]
    assert mmalign("train", config, *with_it).returncode == 0
    levels = json.loads(noise.read_text())["noise"]
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    times = json.loads(noise.read_text())["times"]
    assert row["std/0"] == pytest.approx(levels[0] * (times[0] - times[1]) ** 0.5, rel=1e-5)
    refused = mmalign("train", config, *with_it, "steps=4", f"out={tmp_path / 'other'}")
    assert refused.returncode == 2
    assert "was calibrated with times" in refused.stderr
    nowhere = mmalign("calibrate", config, "--out", tmp_path / "absent" / "noise.json")
    assert nowhere.returncode == 2
    assert "a .json file in a folder that exists is needed" in nowhere.stderr


def test_train_sample_evaluate_export_report(config, tmp_path):
    result = mmalign("train", config, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert set(summary["rises"]["jpeg_size.kilobytes"]) == {"before", "after", "rise", "low", "high", "p"}
    run = tmp_path / "run"
    assert Path(summary["report"]) == run / "report.html"

    result = mmalign(
        "sample",
        "a red circle",
        "a cross",
        "--adapter",
        run,
        "--seeds",
        "3,4",
        "--steps",
        2,
        "--out",
        tmp_path / "s",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    assert [Path(row["image"]).name for row in json.loads(result.stdout)] == [
        "00000-3.png",
        "00000-4.png",
        "00001-3.png",
        "00001-4.png",
    ]
    assert all(Path(row["image"]).stat().st_size > 100 for row in json.loads(result.stdout))

    alone = ["a red circle", "--seeds", "3", "--steps", 2, "--out"]
    model = yaml.safe_load(config.read_text())["model"]
    assert mmalign("sample", *alone, tmp_path / "base", "--model", model).returncode == 0
    assert mmalign("sample", *alone, tmp_path / "none", "--adapter", run, "--strength", 0).returncode == 0
    guided = mmalign("sample", *alone, tmp_path / "far", "--adapter", run, "--strength", 9, "--box", "0,0,8,8")
    assert guided.returncode == 0, guided.stderr
    results = {name: (tmp_path / name / "00000-3.png").read_bytes() for name in ("base", "none", "far", "s")}
    assert results["base"] == results["none"] != results["far"]
    for given, says in [("0,0,8", "left,top,right,bottom"), ("8,0,0,8", "is empty"), ("0,0,999,8", "lies outside")]:
        result = mmalign("sample", *alone, tmp_path / "x", "--adapter", run, "--box", given)
        assert (result.returncode, result.stdout) == (2, "")
        assert says in result.stderr
    prompts = yaml.safe_load(config.read_text())["held_out"]
    result = mmalign(
        "evaluate",
        "--adapter",
        run,
        "--prompts",
        prompts,
        "--rewards",
        "jpeg_size",
        "--steps",
        2,
        "--seeds",
        1,
        "--compare",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    means = json.loads(result.stdout)
    assert means["images"] == 2
    rise = summary["rises"]["jpeg_size.kilobytes"]
    assert means["means"]["all"]["jpeg_size.kilobytes"] == pytest.approx(rise["after"], abs=1e-4)
    assert means["rises"]["jpeg_size.kilobytes"] == pytest.approx(rise, abs=1e-4, nan_ok=True)

    result = mmalign("export", run, "--out", tmp_path / "lora")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    result = mmalign("export", run, "--out", tmp_path / "lora", "--format", "merged")
    assert result.returncode == 0, result.stderr
    merged = tmp_path / "lora" / "merged"
    assert str(merged) in result.stdout
    assert mmalign("sample", *alone, tmp_path / "merged", "--model", merged).returncode == 0
    page = (run / "report.html").read_text()
    assert mmalign("report", run).returncode == 0
    assert len((run / "report.html").read_text()) == pytest.approx(len(page), rel=0.01)


def test_an_export_tells_its_run_and_is_held_to_it(config, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(yaml.safe_load(config.read_text())["model"], model)
    trained = [config, "iterations=1", "held_out=null", f"model={model}"]
    assert mmalign("train", *trained).returncode == 0
    command = ["export", tmp_path / "run", "--out", tmp_path / "lora", "--format", "comfyui"]
    result = mmalign(*command)
    assert result.returncode == 0, result.stderr
    message = exports.header(tmp_path / "lora" / "comfyui_lora.safetensors")
    assert (message["base_model"], message["iteration"], message["steps"]) == ("model", "1", "3")
    assert len(json.loads(message["sigmas"])) == 4
    remaining = json.loads(message["config"])
    assert (remaining["lora_rank"], remaining["iterations"]) == (2, 1)
    assert str(tmp_path) not in message["config"]

    form = exports.FORMATS["comfyui"]
    monkeypatch.setitem(exports.FORMATS, "comfyui", replace(form, write=lambda policy, path: save_file({}, path)))
    result = mmalign(*command)
    assert result.returncode == 1
    assert "comfyui_lora.safetensors changes the velocity by" in result.stderr
    monkeypatch.undo()

    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"proj_out.bias": tensors["proj_out.bias"] + 0.1}, weights, {"format": "pt"})
    result = mmalign(*command)
    assert result.returncode == 2
    assert f"the weights of {model} are not those that" in result.stderr
    assert mmalign("train", *trained, "--resume").returncode == 2


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sample"], "give prompts in quotes or --prompts SOURCE"),
        (["sample", "a cross", "--seeds", "1,x"], "--seeds '1,x'"),
        (["sample", "a cross", "--adapter", "/nowhere"], "no run there"),
        (["sample", "a cross", "--strength", "2"], "give --adapter RUN"),
        (["sample", "a cross", "--box", "0,0,4,4"], "give --adapter RUN"),
        (["evaluate", "--prompts", "/nowhere"], "prompts /nowhere: No such file"),
        (["evaluate", "--compare"], "give --adapter RUN"),
        (["evaluate", "--set", "clip.model=tiny_things_clip"], "must look like scorer.key=value, with one of shapes"),
        (["evaluate", "--rewards", "beauty"], "no scorer called 'beauty'"),
        (["export", "/nowhere"], "no run there"),
        (["export", "/nowhere", "--format", "onnx"], "'onnx' is not one of 'diffusers'"),
        (["report", "/nowhere"], "no run there"),
    ],
)
def test_other_commands_refuse_in_one_line(args, says):
    result = mmalign(*args)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_unwritable_folder(config, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):  # root writes anywhere; the kernel's own folders are tried above
        locked = Path("/proc")
    result = mmalign("train", config, f"out={locked}/run")
    assert result.returncode == 2
    assert f"cannot write in {locked}/run" in result.stderr


def test_the_installed_command():
    result = subprocess.run([Path(sys.executable).with_name("mmalign"), "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for command in ("train", "sample", "evaluate", "export", "report"):
        assert command in result.stdout


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def test_score_goes_on_where_it_stopped(pictures, tmp_path):
    out = tmp_path / "scores.jsonl"
    score = ["score", pictures, "--rewards", "clip,image_stats", "--prompt", "a red square", "--out", out]
    assert mmalign(*score, "--html", tmp_path / "page.html").returncode == 0
    whole = out.read_text()
    assert (tmp_path / "page.html").read_text().count("<figure") == 4
    out.write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"image": "2.p')
    result = mmalign(*score)
    assert "2 images scored now, 2 before" in " ".join(result.stdout.split())
    remaining, scored = whole.splitlines(), out.read_text().splitlines()
    assert scored[:2] == remaining[:2]
    for one, two in zip(scored[2:], remaining[2:], strict=True):  # another batch size: equal but for the last bits
        assert json.loads(one)["scores"] == pytest.approx(json.loads(two)["scores"], abs=1e-6)
    again = mmalign(*score, "--json")
    brightness = json.loads(again.stdout)["scores"]["image_stats.brightness"]
    assert brightness["max"] == pytest.approx(180 / 255 * 0.299, abs=1e-6)
    assert out.read_text().splitlines() == scored


def test_score_tries_again_what_failed(pictures, tmp_path):
    good = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_text("broken")
    out = tmp_path / "scores.jsonl"
    score = ["score", pictures, "--rewards", "image_stats", "--out", out]
    assert mmalign(*score).returncode == 1
    (pictures / "1.png").write_bytes(good)
    result = mmalign(*score)
    assert result.returncode == 0
    assert "1 images scored now, 3 before" in " ".join(result.stdout.split())
    assert sorted(json.loads(line)["image"] for line in out.read_text().splitlines()) == [f"{i}.png" for i in range(4)]


def test_score_remembers_in_a_cache(pictures, tmp_path):
    cache = ["--rewards", "clip,image_stats", "--prompt", "a red square", "--cache", tmp_path / "scores.sqlite"]
    first = json.loads(mmalign("score", pictures, *cache, "--out", tmp_path / "a.jsonl", "--json").stdout)
    again = json.loads(mmalign("score", pictures, *cache, "--out", tmp_path / "b.jsonl", "--json").stdout)
    assert first["cache"] == {name: {"asked": 4, "hits": 0} for name in ("clip", "image_stats")}
    assert again["cache"] == {name: {"asked": 4, "hits": 4} for name in ("clip", "image_stats")}
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    (pictures / "no.sqlite").write_text("no database, but long enough to be read as the head of one" * 9)
    refused = mmalign("score", pictures, *cache[:-1], pictures / "no.sqlite", "--out", tmp_path / "c.jsonl")
    assert refused.returncode == 2
    assert "file is not a database" in refused.stderr


def test_score_writes_csv_and_says_what_failed(pictures, tmp_path):
    (pictures / "1.png").write_text("broken")
    out = tmp_path / "scores.csv"
    result = mmalign("score", pictures, "--rewards", "image_stats", "--out", out)
    assert result.returncode == 1
    assert "1 of 4 images could not be scored" in result.stderr
    assert len(out.read_text().splitlines()) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "scores.csv"]
    assert "is there already" in mmalign("score", pictures, "--rewards", "image_stats", "--out", out).stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rewards", "clip"], "clip needs the prompt"),
        (["--rewards", "clop"], "no scorer called 'clop'"),
        (["--rewards", "image_stats", "--out", "scores.txt"], "a name that ends in .jsonl, .csv, .parquet is needed"),
        (["--rewards", "image_stats", "--set", "clip.model=x"], "must look like scorer.key=value"),
        (["--rewards", "jpeg_size", "--set", "jpeg_size.quality=500"], "quality is 1 to 95, not 500"),
    ],
)
def test_score_refuses_in_one_line(pictures, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mmalign("score", pictures, *arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("mmalign: ")]) == 1
    assert not list(tmp_path.glob("scores*"))
