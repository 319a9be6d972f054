"""Configs from before methods owned their settings are refused with the lines that are right, and build the same."""

import pytest

from mmalign.config import load as configs, old_form, yaml12
from mmalign.config.paths import locate
from mmalign.errors import BadInput

BRANCH = """
model: assets/tiny_sd3
prompts: assets/prompts/train.jsonl
held_out: assets/prompts/validation.jsonl
out: runs/tiny_branch
seed: 0

rewards: {shapes.strict: 0.5, shapes.partial: 0.5}
watch: [clip]

iterations: 60
prompts_per_iteration: 12
seeds: 1
guidance: 1.0
steps: 6
plan: branch
branch_steps: [0, 1, 2]
children: 6
kernel: ddim
noise: 1.0

credit: branch
baseline: state
advantage_scale: batch
weighting: noise

lora_targets: [norm1.linear, norm1_context.linear, add_q_proj, add_k_proj, add_v_proj, to_add_out,
               ff_context.net.0.proj, ff_context.net.2, context_embedder,
               text_embedder.linear_1, text_embedder.linear_2]
lora_rank: 64
lora_alpha: 128
learning_rate: 6.0e-4
warmup: 2
cooldown: 50
ema: 0.95

eval_every: 20
eval_seeds: 2
eval_steps: 6
checkpoint_every: 20
"""
DENSE = """
model: stabilityai/stable-diffusion-3.5-medium
size: [512, 512]
prompts: assets/prompts/scenes_train.jsonl
held_out: assets/prompts/scenes_held_out.jsonl
out: runs/sd35_dense_grpo_pickscore
seed: 42

rewards: {pickscore.score: 1.0}
scorers: {pickscore: {device: cuda}, image_reward: {device: cuda}}
watch: [image_reward]

iterations: 4500
prompts_per_iteration: 48
seeds: 24
guidance: 4.5
steps: 10
plan: sde
kernel: flow_sde
noise: 0.7
score_states: all
completion: null

credit: gain
compare: step
advantage_scale: group
advantage_clip: 5.0
loss: clipped
clip: 1.0e-4
beta: 0.001

lora_rank: 32
lora_alpha: 64
learning_rate: 3.0e-4
weight_decay: 1.0e-4
max_grad_norm: 1.0
minibatches: 1
ema: 0.987

eval_every: 60
eval_seeds: 2
eval_steps: 40
checkpoint_every: 60

precision: bfloat16
batch: 32
micro_batch: 4
decode_batch: 16
"""
MIX = """
model: black-forest-labs/FLUX.1-dev
size: [720, 720]
prompts: assets/prompts/scenes_train.jsonl
held_out: assets/prompts/scenes_held_out.jsonl
out: runs/flux_mixgrpo_hps
seed: 42

rewards: {hpsv2.cosine: 1.0, pickscore.score: 1.0, image_reward.score: 1.0}
combine: mrn
scorers: {hpsv2: {device: cuda}, pickscore: {device: cuda}, image_reward: {device: cuda}}
watch: [clip]

iterations: 300
prompts_per_iteration: 32
seeds: 1
children: 12
guidance: 3.5
steps: 25
plan: window
window: [0, 4]
window_moves: progressive
window_every: 25
kernel: flow_sde
noise: 0.7

credit: terminal
advantage_scale: none
loss: clipped
clip: 1.0e-4
beta: 0.0

lora_rank: 32
lora_alpha: 64
learning_rate: 1.0e-5
weight_decay: 1.0e-4
max_grad_norm: 1.0
minibatches: 1
ema: 0.9

eval_every: 25
eval_seeds: 2
eval_steps: 50
checkpoint_every: 25

precision: bfloat16
gradient_checkpointing: true
offload: true
batch: 12
micro_batch: 4
decode_batch: 4
"""
OLD = {
    "tiny_branch": (
        BRANCH,
        "branch_steps, children, noise, baseline, advantage_scale, weighting",
        [
            "plan: {type: branch, steps: [0, 1, 2], children: 6}", "kernel: {type: ddim, noise: 1.0}",
            "credit: {type: branch, baseline: state}", "objective: {type: grpo, weighting: noise}",
            "advantage: {scale: batch}",
        ],
    ),
    "sd35_dense_grpo_pickscore": (
        DENSE,
        "noise, score_states, completion, compare, advantage_scale, advantage_clip, clip, beta",
        [
            "kernel: {type: flow_sde, noise: 0.7}", "credit: {type: gain, states: all, compare: step}",
            "loss: {type: clipped, clip: 0.0001}", "objective: {type: grpo, beta: 0.001}",
            "advantage: {scale: group, clip: 5.0}",
        ],
    ),
    "flux_mixgrpo_hps": (
        MIX,
        "children, window, window_moves, window_every, noise, advantage_scale, clip, beta",
        [
            "plan: {type: window, steps: [0, 4], children: 12, moves: progressive, every: 25}",
            "kernel: {type: flow_sde, noise: 0.7}", "loss: {type: clipped, clip: 0.0001}",
            "objective: {type: grpo, beta: 0.0}", "advantage: {scale: none}",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_the_old_form_is_refused_with_the_lines_that_are_right(name, tmp_path):
    text, keys, lines = OLD[name]
    (tmp_path / "old.yaml").write_text(text)
    with pytest.raises(BadInput) as refusal:
        configs.load(tmp_path / "old.yaml")
    start = f"{tmp_path / 'old.yaml'}: {keys}: settings of a method belong to it now; instead of these write "
    assert str(refusal.value) == start + ", ".join(lines)


@pytest.mark.parametrize("name", OLD)
def test_the_modern_form_builds_the_config_of_today(name):
    values = old_form.modern(yaml12.parsed(OLD[name][0]))
    assert old_form.refused(values) is None
    assert configs.build(values, "test") == configs.load(locate(f"configs/{name}.yaml"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"objective": "srum", "draws": 3, "alpha_range": [0, 2], "background": -0.5, "anchor": 0.1, "margin": 1.0},
            {"objective": {"type": "srum", "draws": 3, "alpha": [0, 2], "background": -0.5, "anchor": 0.1,
                           "margin": 1.0}},
        ),
        (
            {"objective": "rgdpo", "draws": 1, "preference_scale": 5.0, "intra_weight": 0.0},
            {"objective": {"type": "rgdpo", "draws": 1, "scale": 5.0, "intra": 0.0}},
        ),
        ({"ratio_over": "credit"}, {"objective": {"type": "grpo", "ratio": "credit"}}),
        (
            {"credit": "gain", "score_states": [0, 2], "completion": [1, 2], "compare": "walk", "control": "fit"},
            {"credit": {"type": "gain", "states": [0, 2], "completion": [1, 2], "compare": "trajectory",
                        "control": "fit"}},
        ),
        (
            {"advantage_floor": 0.1, "saturated": 0.9, "region_weight": 0.5, "whole_weight": 0.0},
            {"advantage": {"floor": 0.1, "saturated": 0.9, "whole": 0.0, "regional": 0.5}},
        ),
        ({"combine": "gate", "gate": "a.b"}, {"combine": {"type": "gate", "by": "a.b"}}),
        ({"focus": "map"}, {"mask": "map"}),
        ({"focus": "prompt", "focus_share": 0.25}, {"mask": {"type": "prompt", "share": 0.25}}),
        ({"branch_steps": [0], "children": None}, {"plan": {"type": "branch", "steps": [0]}}),
        ({"plan": {"type": "sde"}, "clip": 0.2}, {"plan": {"type": "sde"}, "loss": {"type": "clipped", "clip": 0.2}}),
        (
            {"plan": {"type": "branch", "steps": [1]}, "children": 3, "advantage": {"clip": 2.0}, "saturated": 1.0},
            {"plan": {"type": "branch", "steps": [1], "children": 3}, "advantage": {"clip": 2.0, "saturated": 1.0}},
        ),
        ({"plan": "sde", "window_every": 2}, {"plan": "sde"}),
    ],
)  # fmt: skip
def test_each_former_setting_has_a_method(old, new):
    assert old_form.refused(old)
    assert old_form.modern(old) == new


def test_settings_that_no_chosen_method_has_are_to_be_removed():
    assert old_form.refused({"plan": "sde", "window_every": 2}).endswith(
        "the methods chosen have none of these; remove them"
    )
