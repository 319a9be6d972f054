"""The Python API: the same runs, images and scores as the command line's, from objects."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from command_line import mmalign as command
from PIL import Image
from run_config import rows, run
from safetensors.torch import load_file

import mmalign
from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.runs import checkpoint
from reward_models import FunctionScorer, Prompt, load, score_files
from reward_models.combine import Ramp
from reward_models.images import to_pil
from reward_models.scorers.jpeg_size import JpegSize

TEXTS = ["a red circle", "a blue square", "two green crosses", "a circle above a square"]


def redness(images, prompts):
    return [(2 * r - g - b) / 510 for r, g, b in (image.resize((1, 1)).getpixel((0, 0)) for image in images)]


@pytest.fixture
def config(settings, tmp_path):
    """A config file of the small run."""
    path = tmp_path / "small.yaml"
    path.write_text(configs.dump(configs.build(settings, "test")))
    return str(path)


def adapter(folder):
    return load_file(checkpoint.latest(folder / "checkpoints") / "ema.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_times(row):
    return {key: value for key, value in row.items() if not key.startswith("seconds/") and key != "nfe_per_second"}


# ------------------------------------------------------------------------------------------------------------ training


def test_it_is_the_run_of_the_command_line(settings, config, tmp_path):
    expected = run(settings)
    made = mmalign.align(
        settings["model"], settings["prompts"], "jpeg_size", config=config, out=tmp_path / "python",
        held_out=settings["held_out"],
    )  # fmt: skip
    assert equal(adapter(made.folder), adapter(expected))
    assert [without_times(row) for row in made.metrics] == [
        without_times(row) for row in rows(expected / "metrics.jsonl")
    ]


def test_prompts_as_objects_are_those_of_the_file(settings, config, tmp_path):
    datasets = pytest.importorskip("datasets")
    expected, listed = run(settings), rows(Path(settings["prompts"]))
    for number, prompts in enumerate([listed, datasets.Dataset.from_list(listed), [row["prompt"] for row in listed]]):
        made = mmalign.align(
            settings["model"], prompts, JpegSize(), config=config, out=tmp_path / f"{number}",
            held_out=rows(Path(settings["held_out"])),
        )  # fmt: skip
        assert equal(adapter(made.folder), adapter(expected))


def test_a_function_trains_as_the_scorer_of_its_values_does(settings, config, tmp_path):
    def kilobytes(images, prompts):
        tensors = torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in images])
        pixels = tensors.view(len(images), *reversed(images[0].size), 3).permute(0, 3, 1, 2) / 255
        return JpegSize()(pixels, [Prompt(text) for text in prompts]).values[:, 0]

    made = mmalign.align(
        settings["model"], settings["prompts"], kilobytes, config=config, out=tmp_path / "function",
        held_out=settings["held_out"],
    )  # fmt: skip
    assert equal(adapter(made.folder), adapter(run(settings)))
    assert configs.load(made.folder / "config.yaml").rewards == {"kilobytes.score": 1.0}


def test_rewards_are_added_with_their_weights(settings, config, tmp_path):
    together = mmalign.open(
        settings["model"], TEXTS, {redness: Ramp(0.0, 1.0), "jpeg_size.kilobytes": -0.5}, config=config,
        out=tmp_path / "a", watch=["image_stats", lambda images, prompts: [0] * len(images)],
    )  # fmt: skip
    with together:
        assert together.config.rewards == {"redness.score": Ramp(0.0, 1.0), "jpeg_size.kilobytes": -0.5}
        assert together.config.watch == ["image_stats", "reward"]
    with mmalign.open(
        settings["model"], TEXTS, [redness, "mine"], config=config, out=tmp_path / "b", held_out=None, keep_best=None,
        scorers={"mine": JpegSize()},
    ) as listed:  # fmt: skip
        assert listed.config.rewards == {"redness.score": 1.0, "mine.kilobytes": 1.0}
        assert len(list(listed)) == 4
        assert listed.metrics[0]["part/mine.kilobytes"] < 0


def test_a_loop_that_was_left_goes_on_and_is_the_whole_run(settings, config, tmp_path):
    whole = mmalign.align(settings["model"], TEXTS, redness, config=config, out=tmp_path / "whole")
    with mmalign.open(settings["model"], TEXTS, redness, config=config, out=tmp_path / "parts") as parts:
        for row in parts:
            if row["iteration"] == 1:
                break
        images = parts.sample(["a circle"], steps=2)
        assert [row["iteration"] for row in parts] == [2, 3, 4]
    assert equal(adapter(parts.folder), adapter(whole.folder))
    assert images[0].size == (32, 32) or images[0].width > 0


def test_a_run_that_was_closed_early_resumes_to_the_bit(settings, config, tmp_path):
    whole = mmalign.align(settings["model"], TEXTS, redness, config=config, out=tmp_path / "whole")
    with mmalign.open(settings["model"], TEXTS, redness, config=config, out=tmp_path / "parts") as parts:
        next(iter(parts))
    assert list(parts) == []
    assert len(parts.metrics) == 1
    again = mmalign.align(settings["model"], TEXTS, redness, config=config, out=tmp_path / "parts", resume=True)
    assert equal(adapter(again.folder), adapter(whole.folder))


def test_another_function_is_not_the_same_run(settings, config, tmp_path):
    def other(images, prompts):
        return [1.0 + i.getpixel((0, 0))[0] for i in images]

    other.__name__ = "redness"
    with mmalign.open(settings["model"], TEXTS, redness, config=config, out=tmp_path / "run") as begun:
        next(iter(begun))
    with pytest.raises(BadInput, match="scorer redness was"):
        mmalign.open(settings["model"], TEXTS, other, config=config, out=tmp_path / "run", resume=True)


def test_what_the_function_raises_is_the_reason_of_the_failure(settings, config, tmp_path):
    def broken(images, prompts):
        return [image.nothing for image in images]

    with pytest.raises(mmalign.Failed, match=r"broken: AttributeError: .*nothing.* \(line \d+ of "):
        mmalign.align(settings["model"], TEXTS, broken, config=config, out=tmp_path / "run")


def test_by_default_it_is_evaluated_on_prompts_of_the_training(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many = [f"{number} circles" for number in range(130)]
    small = dict(iterations=1, prompts_per_iteration=1, seeds=2, steps=2, eval_steps=2, lora_rank=2)
    for name in ("runs/align", "runs/align-2"):
        made = mmalign.align(settings["model"], many, redness, **small)
        assert str(made.folder) == name
    evaluated = rows(made.folder / "images/before/scores.jsonl")
    assert [row["prompt"] for row in evaluated[::2]] == many[::3]
    for page in (made.report, made.save_lora("lora").parent / "README.md"):
        assert "evaluated on prompts that it trains on" in page.read_text()


def test_ctrl_c_ends_a_script_and_the_run_can_be_resumed(settings, config, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, mmalign\n"
        "def reward(images, prompts):\n"
        "    return [image.getpixel((0, 0))[0] for image in images]\n"
        f"run = mmalign.open({settings['model']!r}, {TEXTS!r}, reward, config={config!r}, out='run', held_out=None,"
        " keep_best=None)\n"
        "for row in run:\n"
        "    os.kill(os.getpid(), signal.SIGINT) if row['iteration'] == 2 else None\n"
    )
    ended = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert ended.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in ended.stderr


@pytest.mark.parametrize("interactive", [True, False])
def test_an_interrupt_is_kept_by_a_session_and_ends_a_script(interactive, settings, config, tmp_path, monkeypatch):
    texts = dict(held_out=None, keep_best=None)
    whole = mmalign.align(settings["model"], TEXTS, redness, config=config, out=tmp_path / "whole", **texts)
    calls = []

    def interrupted(images, prompts):
        calls.append(len(images))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return redness(images, prompts)

    def align(function, **more):
        scorers = {"redness": FunctionScorer(redness)}
        scorers["redness"].function = function
        return mmalign.align(
            settings["model"],
            TEXTS,
            "redness.score",
            scorers=scorers,
            config=config,
            out=tmp_path / "cut",
            **texts,
            **more,
        )

    if interactive:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        assert len(align(interrupted).metrics) == 2
    else:
        with pytest.raises(KeyboardInterrupt):
            align(interrupted)
    assert len(rows(tmp_path / "cut/metrics.jsonl")) == 2
    assert equal(adapter(align(redness, resume=True).folder), adapter(whole.folder))


@pytest.mark.slow
def test_two_processes_learn_as_one(settings, config, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import mmalign\n"
        "def reward(images, prompts):\n"
        "    return [image.getpixel((0, 0))[0] / 255 for image in images]\n"
        f"run = mmalign.align({settings['model']!r}, {TEXTS!r}, reward, config={config!r}, out='run')\n"
        "run.save_lora('lora')\n"
    )
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script.name]
    for command_line, folder in ((launched, "two"), ([sys.executable, script.name], "one")):
        (tmp_path / folder).mkdir()
        script_there = tmp_path / folder / script.name
        script_there.write_text(script.read_text())
        environment = os.environ | {"PYTHONPATH": str(Path(mmalign.__file__).parents[1])}
        subprocess.run(command_line, cwd=tmp_path / folder, check=True, env=environment)
    one, two = (adapter(tmp_path / folder / "run") for folder in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert (tmp_path / "two/lora/README.md").is_file()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(prompts=[]), "prompts: no prompts in it"),
        (
            dict(prompts=["a", 3]),
            "prompts: number 1: a text, an object with a `prompt`, or a Prompt is needed",
        ),
        (dict(prompts=[{"text": "a"}]), "prompts: number 0: an object with a `prompt`, a text, is needed"),
        (dict(prompts="a red circle"), "prompts a red circle: "),
        (dict(prompts=3), "prompts: a list of texts, a dataset or the name of a file is needed, got '3'"),
        (dict(reward=[]), "reward: at least one is needed"),
        (dict(reward="shape"), "no scorer called 'shape'; near names: shapes"),
        (dict(reward="shapes"), "reward 'shapes': it gives strict, partial; name one, as 'shapes.strict'"),
        (dict(reward=3), "reward: a function, a scorer or its name is needed, got '3'"),
        (dict(reward=[redness, redness]), "reward: two are called 'redness'"),
        (dict(reward=lambda a, b: [0]), "must take images and prompts"),
        (
            dict(reward=lambda images, prompts, answer: answer),
            "needs 'answer' of the prompts, and they are texts",
        ),
        (dict(learningrate=1), "unknown key 'learningrate', did you mean 'learning_rate'?"),
        (dict(seed=object()), "a object cannot be a setting"),
        (dict(model="nowhere"), "nowhere"),
        (dict(model=object()), "the object is not a pipeline of a known family: StableDiffusion3Pipeline"),
        (dict(out="."), "already holds a run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_line(change, says, settings, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    arguments = dict(model=settings["model"], prompts=TEXTS, reward=redness) | change
    with pytest.raises(BadInput) as error:
        mmalign.align(**{"config": config, "out": "run", **arguments})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "thing",
    [
        mmalign.align,
        mmalign.open,
        mmalign.evaluate,
        mmalign.best_of_n,
        mmalign.refine,
        load,
        FunctionScorer,
        score_files,
    ],
    ids=lambda thing: thing.__name__,
)
def test_the_example_of_each_public_name_runs(thing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(Path(__file__).parents[1] / "assets")
    code = example(thing)
    assert thing.__name__ in code
    names = dict(mmalign=mmalign, redness=redness, load=load, Prompt=Prompt, torch=torch)
    exec(code.replace("redness)", "redness, iterations=1)"), names | {thing.__name__: thing})


def example(thing):
    """The indented lines of its docstring."""
    text = inspect.cleandoc(thing.__doc__)
    return textwrap.dedent("\n".join(line for line in text.split("\n") if line.startswith("    ") or not line))


# --------------------------------------------------------------------------------------------------- what a run gives


def test_images_and_scores_of_the_averaged_adapter_and_of_the_base(settings, config, tmp_path):
    made = mmalign.align(settings["model"], TEXTS, redness, config=config, out=tmp_path / "run", learning_rate=0.05)
    before, after = made.evaluate(TEXTS, base=True, steps=3), made.evaluate(TEXTS, steps=3)
    assert before.parts.keys() == {"redness.score"}
    assert not torch.equal(before.images, after.images)
    exported = made.save_lora(tmp_path / "lora").parent
    same = mmalign.evaluate(settings["model"], TEXTS, redness, adapter=exported, steps=3)
    assert torch.allclose(same.images, after.images, atol=1e-4)
    base = mmalign.evaluate(settings["model"], TEXTS, redness, steps=3)
    assert torch.equal(base.images, before.images)
    drawn = made.sample(TEXTS[:2], seeds=[3, 5], steps=3)
    assert len(drawn) == 4
    assert all(isinstance(image, Image.Image) for image in drawn)
    [stock] = made.pipeline(
        TEXTS[1], num_inference_steps=3, sigmas=[1, 2 / 3, 1 / 3], guidance_scale=1.0, max_sequence_length=0,
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    difference = max(abs(a - b) for a, b in zip(stock.tobytes(), drawn[2].tobytes(), strict=True))
    assert difference <= 1
    assert made.report.is_file()


def test_best_of_n_and_evaluate_are_those_of_the_command_line(tmp_path):
    texts = ["a red circle", "two blue squares"]
    result = mmalign.best_of_n("assets/tiny_sd3", texts, "clip.cosine", seeds=[0, 1, 2], steps=3, keep=2, after=1)
    result_of_command = command(
        "sample", *texts, "--best", "clip.cosine", "--seeds", "0,1,2", "--steps", 3, "--keep", 2, "--after", 1,
        "--out", tmp_path, "--json",
    )  # fmt: skip
    lines = json.loads(result_of_command.stdout)["images"]
    assert [row["seed"] for row in lines] == result.member.tolist()
    assert [row["score"] for row in lines] == result.score.tolist()
    assert Image.open(lines[0]["image"]).tobytes() == to_pil(result.images)[0].tobytes()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(texts))
    result_of_command = command("evaluate", "--prompts", prompts, "--rewards", "clip", "--steps", 3, "--json")
    means = mmalign.evaluate("assets/tiny_sd3", texts, "clip", steps=3).means()
    assert json.loads(result_of_command.stdout)["means"]["all"] == pytest.approx(means)
    assert not math.isnan(means["clip.cosine"])


def test_refine_is_that_of_the_command_line(tmp_path):
    text = "a purple circle and a square"
    result = mmalign.refine("assets/tiny_sd3", [text], out=tmp_path / "python", steps=3, rounds=2)
    result_of_command = command("refine", text, "--out", tmp_path / "shell", "--steps", 3, "--rounds", 2, "--json")
    shell = json.loads(result_of_command.stdout)
    assert result.summary | {"out": ""} == shell | {"out": ""}
    assert rows(tmp_path / "python/trace.jsonl") == rows(tmp_path / "shell/trace.jsonl")
    assert rows(tmp_path / "python/trace.jsonl") == json.loads(json.dumps(result.rows))


def test_objects_stand_for_names():
    by_name = mmalign.evaluate("assets/tiny_sd3", TEXTS, "clip", steps=2)
    by_object = mmalign.evaluate("assets/tiny_sd3", TEXTS, {"clip": load("clip")}, steps=2)
    assert torch.equal(by_name.parts["clip.cosine"], by_object.parts["clip.cosine"])
