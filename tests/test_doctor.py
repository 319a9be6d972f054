"""The doctor finds nothing where nothing is wrong, and each planted fault by the check that is there for it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_pipelines import FAMILIES, SOME

from mmalign import errors, run as runs
from mmalign.checks import doctor
from mmalign.cli.app import main
from mmalign.config import load as configs
from mmalign.flow import sample as sampling
from mmalign.objectives import replay as learning
from mmalign.policy.sd3 import SD3Policy
from mmalign.training import learner, rollout

QUIET = dict(
    objective={"type": "grpo", "beta": 0.1}, guidance=3.0, rewards={"odd_scorers:Bright.mean": 1.0},
    kernel={"type": "flow_sde", "noise": 0.7},
)  # fmt: skip


def bad(settings, **changed):
    result = list(doctor.examine(configs.build(settings | QUIET | changed, "test")))
    assert all(item.advice for item in result if item.good is False)
    return {item.check.rpartition(": ")[2] if item.check.startswith("odd_scorers") else item.check for item in result
            if item.good is False}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(guidance=1.0, objective="grpo", kernel="cps"),
        dict(plan="sde", credit="gain", objective="grpo", kernel="ddim"),
        dict(plan="sde", credit="implicit", objective="grpo", kernel="ddim"),
        dict(precision="bfloat16", loss={"type": "clipped", "clip": 1.0}),
    ],
)
def test_a_sound_run_has_no_red_line(settings, changed):
    assert bad(settings, **changed) == set()


@pytest.mark.parametrize("name", SOME[1:])
def test_all_families_are_sound(settings, name, tmp_path):
    """But for those that were distilled to a few steps."""
    torch.manual_seed(0)
    FAMILIES[name].build(tmp_path / "model")
    few = {"many steps"} if name in ("FLUX.1-schnell", "FLUX.2-klein, distilled") else set()
    assert bad(settings, model=str(tmp_path / "model"), size=[32, 32], guidance=FAMILIES[name].guidances[-1]) == few


@pytest.mark.parametrize("name", ["Z-Image-Turbo", "sd3.5-large-turbo", "SDXL-Lightning", "Z-Image", "attribute"])
def test_a_distilled_model_is_known_by_its_name(settings, name, tmp_path):
    shutil.copytree(settings["model"], tmp_path / name)
    few = {"many steps"} if name not in ("Z-Image", "attribute") else set()
    assert bad(settings, model=str(tmp_path / name)) == few


# ----------------------------------------------------------------------------------------------- twelve planted faults


def test_a_wrong_shift(settings, monkeypatch):
    times = SD3Policy.times
    monkeypatch.setattr(SD3Policy, "times", lambda self, n: (t := times(self, n)) * 3 / (1 + 2 * t))
    assert {"times", "ODE"} <= bad(settings)


def test_negatives_dropped(settings, monkeypatch):
    monkeypatch.setattr(SD3Policy, "guided", lambda self, empty, wanted: wanted)
    assert bad(settings) == {"ODE"}


def test_density_taken_before_rounding(settings, monkeypatch):
    def rounded_late(*args, **more):
        paths = sampling.sample(*args, **more)
        return replace(paths, x=paths.x.bfloat16().float())

    monkeypatch.setattr(rollout, "sample", rounded_late)
    assert bad(settings) == {"ratio"}


def test_images_and_prompts_swapped(settings, monkeypatch):
    real = rollout.score
    monkeypatch.setattr(rollout, "score", lambda images, *rest: real(images.flip(0), *rest))
    assert "judged as shown" in bad(settings)


def test_a_constant_reward(settings):
    assert bad(settings, rewards={"odd_scorers:Constant.mean": 1.0}) == {"spread", "group spread"}


def test_lora_on_nothing(settings, monkeypatch):
    attach = SD3Policy.attach_lora

    def attach_to_nothing(self, *args):
        attach(self, *args)
        self.pipe.transformer.disable_adapters()

    assert bad(settings, lora_targets=["transformer_blocks.1.attn.add_q_proj"]) == {"gradient", "KL gradient"}
    monkeypatch.setattr(SD3Policy, "attach_lora", attach_to_nothing)
    with pytest.raises(errors.BadInput, match="nothing is trained"):
        bad(settings)


def test_seeds_equal_within_a_group(settings, monkeypatch):
    real = rollout.seed_of
    monkeypatch.setattr(rollout, "seed_of", lambda *key: real(*(k for i, k in enumerate(key) if i != 4)))
    assert "seeds" in bad(settings)


def test_times_of_half_precision(settings, monkeypatch):
    times = SD3Policy.times
    monkeypatch.setattr(SD3Policy, "times", lambda self, n: times(self, n).bfloat16().float())
    assert "times" in bad(settings)


def test_wrong_guidance_in_replay(settings, monkeypatch):
    guided = SD3Policy.guided
    monkeypatch.setattr(
        SD3Policy,
        "guided",
        lambda self, empty, wanted: wanted if torch.is_grad_enabled() else guided(self, empty, wanted),
    )
    assert {"ratio", "guidance"} <= bad(settings)


def test_a_stale_average(settings, monkeypatch):
    monkeypatch.setattr(learner.Learner, "average", lambda self, iteration: None)
    assert bad(settings) == {"average"}


def test_kl_without_gradient(settings, monkeypatch):
    real = learning.gaussian_kl
    monkeypatch.setattr(learning, "gaussian_kl", lambda *args: real(*args).detach())
    assert bad(settings) == {"KL gradient"}


def test_a_reward_that_is_0_on_failure(settings):
    assert bad(settings, rewards={"odd_scorers:Careless.mean": 1.0}) == {"a failure"}


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_says_what_is_bad_and_what_to_do(settings, tmp_path, capsys, monkeypatch):
    config = tmp_path / "own.yaml"
    config.write_text(configs.dump(configs.build(settings | QUIET, "test")))
    page = tmp_path / "report.md"
    monkeypatch.setattr("sys.argv", ["mmalign", "doctor", str(config), "--out", str(page)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "none bad" in page.read_text()
    rewards = json.dumps({"odd_scorers:Constant.mean": 1.0})
    monkeypatch.setattr("sys.argv", ["mmalign", "doctor", str(config), f"rewards={rewards}", "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["group spread"]["good"] is False
    assert "constant reward" in rows["group spread"]["advice"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["assets/pictures"], "a config (.yaml) is needed"),
        (["configs/quickstart.yaml", "--set", "clip.model=x"], "--set belongs to --rewards"),
        (["assets/pictures", "seed=3", "--rewards", "clip"], "'seed=3'"),
    ],
)
def test_what_cannot_be_examined_is_said_in_a_line(arguments, reason, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mmalign", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("mmalign: ")
    assert reason in stderr


def test_nothing_is_left_behind(settings):
    bad(settings)
    assert not runs.Path(settings["out"]).exists()


GRADED = dict(
    objective={"type": "backprop", "way": "last"}, plan="ode", rewards={"smooth:Smooth.red": 1.0}, kernel="flow_sde"
)


SUMMED = GRADED | dict(
    objective={"type": "sum", "parts": [{"type": "grpo", "beta": 0.01}, GRADED["objective"]]},
    plan={"type": "branch", "steps": [0, 1], "children": 2},
)


@pytest.mark.parametrize("changed", [GRADED, SUMMED], ids=["backprop", "sum"])
def test_a_graph_through_the_reward_is_checked(settings, monkeypatch, changed):
    assert bad(settings, **changed) == set()
    decode = SD3Policy.decode_in_graph
    monkeypatch.setattr(SD3Policy, "decode_in_graph", lambda self, x, recompute=False: decode(self, 1.1 * x))
    assert bad(settings, **changed) == {"graph"}
