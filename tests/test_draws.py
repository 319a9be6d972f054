"""Which prompts an iteration draws: today's epochs, and by pass rate; its state in checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import checkpoints as corpus
from run_config import cut_off, rows, run

from mmalign.config import load as configs
from mmalign.data.draws import Epochs, PassRate, Stages
from mmalign.data.prompts import PromptBatches
from mmalign.errors import BadInput
from mmalign.runs import checkpoint
from mmalign.training import saving, selecting
from mmalign.training.rollout import judged, sample_and_score
from mmalign.training.setup import open_session
from reward_models import Prompt

IDS = [7, 2**62, -3, 11]
PROMPTS = [Prompt(f"prompt {id_}", id=id_) for id_ in IDS]


def shares(draw: PassRate, rates: dict[int, float], size: int, times: int = 4000) -> dict[tuple[int, ...], float]:
    """How often each row or tuple of rows is drawn."""
    drawn = [tuple(draw(IDS, size, i, 0, rates)) for i in range(times)]
    return {key: drawn.count(key) / times for key in set(drawn)}


def test_epochs_hold_every_prompt_once():
    for epoch in range(3):
        batches = [Epochs()(IDS, 2, 2 * epoch + i, 5, {}) for i in range(2)]
        assert sorted(batches[0] + batches[1]) == [0, 1, 2, 3]


def test_one_prompt_is_drawn_in_proportion_to_its_weight():
    """Weights p (1 - p) + 0.05: 0.3 of a new prompt, 0.05 of the solved and the hopeless, 0.21 of p = 0.8."""
    result = shares(PassRate(), {7: 1.0, 2**62: 0.0, -3: 0.8}, 1)
    weights = np.array([0.05, 0.05, 0.21, 0.30])
    for row, weight in enumerate(weights / weights.sum()):
        assert result[row,] == pytest.approx(weight, abs=4 * (weight / 4000) ** 0.5)


def test_the_second_is_drawn_among_those_that_remain():
    """P(i, j) = w_i / W x w_j / (W - w_i)."""
    result = shares(PassRate(), {7: 1.0, 2**62: 0.0, -3: 0.8}, 2)
    weights = [0.05, 0.05, 0.21, 0.30]
    for i, j in ((3, 2), (2, 3), (3, 0), (0, 1)):
        expected = weights[i] / 0.61 * weights[j] / (0.61 - weights[i])
        assert result.get((i, j), 0.0) == pytest.approx(expected, abs=4 * (expected / 4000) ** 0.5)
    assert all(i != j for i, j in result)


def test_equal_rates_give_all_prompts_alike_and_none_twice():
    for rates in ({}, dict.fromkeys(IDS, 0.9)):
        result = shares(PassRate(), rates, 2)
        assert len(result) == 4 * 3
        assert all(share == pytest.approx(1 / 12, abs=4 * (1 / 12 / 4000) ** 0.5) for share in result.values())


def test_a_draw_is_a_function_of_seed_iteration_and_rates():
    draw = PassRate()
    assert draw(IDS, 3, 4, 1, {7: 0.2}) == draw(IDS, 3, 4, 1, {7: 0.2})
    assert len({tuple(draw(IDS, 4, i, s, {})) for i in range(10) for s in range(3)}) > 10


def test_rates_are_running_means_on_the_scale_of_the_setting():
    rates = {7: 0.25}
    PassRate(low=-1.0, high=3.0, memory=0.75).learn(rates, {7: 1.0, 11: 99.0, -3: -2.0})
    assert rates == {7: 0.75 * 0.25 + 0.25 * 0.5, 11: 0.75 * 0.5 + 0.25, -3: 0.75 * 0.5}


def test_batches_learn_from_the_mean_of_each_prompt_that_has_one():
    batches = PromptBatches(PROMPTS, 2, 0, PassRate(memory=0.0))
    first = batches(0)[0]
    reward = torch.tensor([0.25, float("nan"), float("nan"), 0.75])
    row = batches.learn(0, reward, torch.tensor([0, 1, 1, 0]))
    assert batches.rates == {first.id: 0.5}
    assert row == {"draw/known": 0.25, "draw/rate": 0.5}
    batches.learn(0, torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))
    assert batches.rates[first.id] == 1.0
    assert PromptBatches(PROMPTS, 2, 0).learn(0, reward, torch.tensor([0, 1, 1, 0])) == {}


def test_too_many_prompts_are_refused_whatever_the_draw():
    for draw in (Epochs(), PassRate()):
        with pytest.raises(BadInput, match="5 requested, the file has 4"):
            PromptBatches(PROMPTS, 5, 0, draw)(0)


def test_weights_are_one_less_the_rate_and_one_of_new_prompts():
    batches = PromptBatches(PROMPTS, 4, 0, PassRate(memory=0.0, weigh=True))
    assert batches.weights(0).tolist() == [1.0] * 4
    batches.rates.update({7: 0.25, -3: 1.0})
    by_id = dict(zip([p.id for p in batches(0)], batches.weights(0).tolist(), strict=True))
    assert by_id == {7: 0.75, 2**62: 1.0, -3: 0.0, 11: 1.0}
    row = batches.learn(0, torch.ones(4), torch.arange(4))
    assert row["draw/weight"] == (0.75 + 1.0 + 0.0 + 1.0) / 4
    assert PromptBatches(PROMPTS, 4, 0, PassRate()).weights(0) is None


# in runs


@pytest.fixture
def chosen(settings):
    draw = {"type": "pass_rate", "low": -4.0, "high": 0.0, "memory": 0.3}
    return settings | {"held_out": None, "draw": draw, "iterations": 5, "checkpoint_every": 1, "keep_checkpoints": 9}


def state(out: Path, number: int) -> dict:
    return json.loads((out / f"checkpoints/{number:06d}/state.json").read_text())


def test_a_resumed_run_draws_and_ends_as_an_uninterrupted_one(chosen, tmp_path):
    whole = run(chosen)
    parts = chosen | {"out": str(tmp_path / "parts")}
    with cut_off(2):
        run(parts)
    run(parts, resume=True)
    for number in range(1, 6):
        one, two = state(whole, number), state(tmp_path / "parts", number)
        assert one["rates"] == two["rates"] != {}
        assert one["made"] == two["made"]
    tensors = [checkpoint.read(checkpoint.latest(Path(out) / "checkpoints"))[0] for out in (whole, tmp_path / "parts")]
    for name, value in tensors[0]["adapter"].items():
        assert torch.equal(value, tensors[1]["adapter"][name])
    assert rows(whole / "metrics.jsonl")[-1]["draw/known"] > 0.5


def test_the_rates_of_a_checkpoint_are_those_of_its_metrics(chosen):
    """With `memory: 0` the rate of a prompt is the scaled mean of its last group, and one prompt gives the reward."""
    out = run(chosen, draw=chosen["draw"] | {"memory": 0.0}, prompts_per_iteration=1, iterations=1)
    [rate] = state(out, 1)["rates"].values()
    assert rate == pytest.approx(rows(out / "metrics.jsonl")[0]["reward"] / 4 + 1, rel=1e-6)


def test_a_checkpoint_without_rates_belongs_to_runs_that_do_not_learn(chosen):
    plain = run(chosen | {"draw": "epochs"})
    assert not {"rates", "draw"} & {*state(plain, 5), *state(plain, 5)["config"]}
    session = open_session(configs.build(chosen | {"draw": "epochs"}, "test"))
    assert saving.restore(session, plain, print) == 5


FORGERIES = {
    "no rates": (lambda s: s.pop("rates"), "rates: missing with draw pass_rate"),
    "null": (lambda s: s.update(rates=None), "rates: missing with draw pass_rate"),
    "a list": (lambda s: s.update(rates=[0.5]), "rates: Input should be a valid dictionary"),
    "a text": (lambda s: s["rates"].update({min(s["rates"]): "0.5"}), "valid number"),
    "above 1": (lambda s: s["rates"].update({min(s["rates"]): 1.5}), "less than or equal to 1"),
    "below 0": (lambda s: s["rates"].update({min(s["rates"]): -0.5}), "greater than or equal to 0"),
    "another prompt": (lambda s: s["rates"].update({"999": 0.5}), "rates: no prompt has the id '999'"),
    "other draws": (lambda s: s["rates"].update(dict.fromkeys("0123", 0.0) | {"0": 0.5, "1": 0.5}), "order of prompts"),
    "another draw": (lambda s: s["config"].pop("draw"), "no 'draw'"),
}


def test_weights_multiply_the_advantages_of_a_prompt(chosen):
    c = configs.build(chosen | {"draw": chosen["draw"] | {"weigh": True}}, "test")
    session = open_session(c)
    session.prompts.rates.update({p.id: (i + 1) / 8 for i, p in enumerate(session.prompts.all)})
    prompts = session.prompts(0)
    expected = torch.tensor([1 - session.prompts.rates[p.id] for p in prompts])
    rollout = sample_and_score(session, prompts, 0)
    tree, judgement = rollout.tree, judged(session, rollout, 0)
    every = selecting.choose(c, tree, judgement)
    plain = selecting.advantages(c, tree, judgement, every)
    weighed = selecting.advantages(c, tree, judgement, every, 0, session.prompts.weights(0))
    assert plain.abs().max() > 0
    assert torch.equal(weighed, plain * expected[tree.prompt][:, None, None, None])


def test_weights_act_once_rates_are_known(chosen, tmp_path):
    """To the bit as without them in an iteration of new prompts, and not after it."""
    weighed = chosen | {"draw": chosen["draw"] | {"weigh": True}, "prompts_per_iteration": 4, "iterations": 2}
    plain = weighed | {"draw": chosen["draw"], "out": str(tmp_path / "plain")}
    outs = run(weighed), run(plain)
    for number, same in ((1, True), (2, False)):
        one, two = (checkpoint.read(out / f"checkpoints/{number:06d}")[0]["adapter"] for out in outs)
        assert all(torch.equal(value, two[name]) for name, value in one.items()) == same
    assert [row.get("draw/weight", 0) == 1 for row in rows(outs[0] / "metrics.jsonl")] == [True, False]
    assert "draw/weight" not in rows(outs[1] / "metrics.jsonl")[0]


@pytest.fixture(scope="module")
def finished(random_model, prompt_files, tmp_path_factory):
    made = dict(
        model=random_model, prompts=prompt_files["train"], held_out=None, rewards={"jpeg_size.kilobytes": 1.0},
        iterations=2, prompts_per_iteration=2, seeds=2, steps=2, plan="sde", credit="terminal", lora_rank=2,
        draw={"type": "pass_rate", "low": -4.0, "high": 0.0}, checkpoint_every=2,
        out=str(tmp_path_factory.mktemp("rates") / "run"),
    )  # fmt: skip
    return open_session(configs.build(made, "test")), run(made)


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_rates_are_refused_in_a_line(finished, tmp_path, name):
    session, whole = finished
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    change, says = FORGERIES[name]
    corpus.restated(out / "checkpoints/000002", change)
    with pytest.raises(BadInput) as error:
        saving.restore(session, out, print)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_rates_in_a_run_that_does_not_learn_are_refused(finished, tmp_path):
    session, whole = finished
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    changed = session.config.model_copy(update={"draw": Epochs(), "out": str(out)})
    with pytest.raises(BadInput, match=r"state\.json: rates: not with draw epochs"):
        saving.restore(open_session(changed), out, print)


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        ({"type": "pass_rate", "low": 1.0}, "low: 1 must be below high: 1"),
        ({"type": "pass_rate", "floor": 0.0}, "floor"),
        ({"type": "pass_rate", "memory": 1.0}, "memory"),
        ("passrate", "did you mean 'pass_rate'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, draw, says):
    with pytest.raises(BadInput, match=says):
        configs.build(settings | {"draw": draw}, "test")


def test_weights_without_advantages_are_refused(settings):
    changed = {"draw": {"type": "pass_rate", "weigh": True}, "plan": "ode", "objective": "rft", "seeds": 4}
    with pytest.raises(BadInput, match="weigh acts on advantages, which objective: rft does not have"):
        configs.build(settings | changed, "test")


STAGED = [Prompt(f"prompt {i}", {"tag": tag}, i) for i, tag in enumerate("bacabb")]


def test_stages_add_prompts_by_difficulty():
    """Two iterations on tag a, two on a and b, then all; in epochs within a stage."""
    batches = PromptBatches(STAGED, 1, 3, Stages(("a", "b", "c"), 2))
    drawn = [batches(i)[0].wants["tag"] for i in range(16)]
    assert drawn[:2] == ["a", "a"]
    assert {*drawn[2:4]} <= {"a", "b"}
    assert sorted(p.id for i in range(4, 10) for p in batches(i)) == [0, 1, 2, 3, 4, 5]
    assert {batches(i)[0].id for i in (0, 1)} == {1, 3}
    assert [batches(i)[0].id for i in range(16)] == [
        PromptBatches(STAGED, 1, 3, Stages(("a", "b", "c"), 2))(i)[0].id for i in range(16)
    ]


def test_one_stage_of_all_prompts_is_the_draw_by_epochs():
    plain = PromptBatches(STAGED, 2, 3)
    one = [Prompt(p.text, {"tag": "a"}, p.id) for p in STAGED]
    staged = PromptBatches(one, 2, 3, Stages(("a",)))
    assert all([p.id for p in plain(i)] == [p.id for p in staged(i)] for i in range(9))


def test_prompts_that_do_not_suit_the_stages_are_refused():
    with pytest.raises(BadInput, match="prompt 2 has tag 'c'"):
        PromptBatches(STAGED, 1, 3, Stages(("a", "b")))(0)
    with pytest.raises(BadInput, match="3 requested, stage 1 has 2"):
        PromptBatches(STAGED, 3, 3, Stages(("a", "b", "c")))(0)
    for draw in ("stages", {"type": "stages", "tags": ["a", "a"]}, {"type": "stages", "tags": ["a"], "every": 0}):
        with pytest.raises(BadInput, match=r"tags|every"):
            configs.build({"draw": draw}, "test")
