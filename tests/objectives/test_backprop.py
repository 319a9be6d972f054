"""Back-propagation of a reward: each way's gradient against closed forms, autograd and finite differences, and runs."""

import json
from itertools import combinations, pairwise, permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_config import cut_off, rows, run
from safetensors.torch import load_file
from smooth import Smooth

from mmalign import policy as policies
from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.config.methods import described
from mmalign.errors import BadInput, Failed
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.update import update
from mmalign.objectives import ways
from mmalign.objectives.backprop import Backprop, gap
from mmalign.objectives.ways import Jump, Last, LowVariance, Sparse
from mmalign.policy.gaussian import GaussianFlow
from mmalign.rewards.rewards import Rewards
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.types import Judgement
from reward_models import Card, Prompt, Scores

TARGET = 0.75
WAYS = [Sparse(steps=2), Last(steps=2), Jump(), LowVariance(copies=2)]


class Quadratic:
    """The negative mean squared distance of the pixels from a level. Prompts with the number `unknown` have none."""

    names, card = ("value",), Card("quadratic")

    def __init__(self, weight: float = 1.0, unknown: int = -1):
        self.weight, self.unknown = weight, unknown

    def in_graph(self, images, prompts):
        if any(prompt.id == self.unknown for prompt in prompts):
            raise ValueError("an unknown prompt")
        return -self.weight * ((images - TARGET) ** 2).mean((1, 2, 3))[:, None]

    def __call__(self, images, prompts):
        return Scores(self.names, self.in_graph(images, prompts))


class Indifferent(Quadratic):
    """It does not look at the image."""

    def in_graph(self, images, prompts):
        return torch.ones(len(images), 1)


class Inside(Quadratic):
    """Pixels of 0 and 1, at which the decoder clamps, count for nothing, and so do small changes of them."""

    def in_graph(self, images, prompts):
        return -self.weight * ((images - TARGET) * images * (1 - images)).square().mean((1, 2, 3))[:, None]


def context(objective, policy=None, scorer=None, texts=("0.5", "-0.5"), seeds=3, steps=4, **settings):
    """A run with a rollout of `seeds` ODE trajectories a prompt, and its reward."""
    policy = GaussianFlow() if policy is None else policy
    settings = {"rewards": {"a:Quadratic.value": 1.0}, "held_out": None} | settings
    c = configs.build({"objective": objective, "plan": "ode", "steps": steps} | settings, "test")
    scorer = Quadratic() if scorer is None else scorer
    rewards = Rewards(c, dict.fromkeys(c.trained, scorer), dict.fromkeys(c.at_least, 0.0), None, c.combine)
    cond, index = policy.encode(texts), torch.arange(len(texts)).repeat_interleave(seeds)
    start = torch.randn(len(index), *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    paths = sample(policy.velocity, start, cond, index, plans.ode(policy.times(steps)))
    prompts = [Prompt(text, id=p) for p, text in enumerate(texts)]
    reward = torch.zeros(len(index), steps + 1)
    return (
        SimpleNamespace(config=c, policy=policy, ranks=None, fits=None, rewards=rewards),
        SimpleNamespace(prompts=prompts, cond=cond, paths=paths, forwards=None),
        Judgement(reward, {}),
    )  # fmt: skip


def gradient(objective, micro=64, changed=None, **settings):
    """The gradient of one update, the batch and its statistics."""
    run, rollout, judged = changed or context(objective, **settings)
    batch = run.config.objective.batch(run, rollout, judged, None, 0)
    parameters = run.policy.parameters()
    statistics = update(
        parameters, torch.optim.SGD(parameters, 0.0), batch.rows, batch.replay, needed=batch.needed, epochs=1,
        minibatches=1, micro_batch=AdaptiveBatch(micro), max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return torch.cat([p.grad.flatten() for p in parameters]), batch.rows, statistics


def towards(x):
    """The gradient at a latent of what the quadratic reward lacks."""
    return 2 * (x / 8 + 0.5 - TARGET) / 8 / x[0].numel()


def slope(t):
    """d v / d shift of the Gaussian flow, one number at each time."""
    return -(t - (1 - t)) / ((1 - t) ** 2 + t**2) * (1 - t) - 1


def test_the_last_step_has_a_closed_form():
    objective = Backprop(Last(steps=1), pull=0.0)
    result, batch, _ = gradient(objective)
    t = batch.t[:, 0]
    expected = (towards(batch.end) * (-t * slope(t))[:, None, None, None]).mean(0)
    assert len(batch) == 6
    torch.testing.assert_close(result, expected.flatten(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("recompute", [False, True])
def test_all_last_steps_are_autograd_through_the_sampler(recompute):
    result, batch, _ = gradient(Backprop(Last(steps=4), pull=0.0, recompute=recompute))
    flow = GaussianFlow()
    cond, x, times = flow.encode(["0.5", "-0.5"]), batch.x[:, 0], flow.times(4)
    for t, s in pairwise(times):
        x = x + (s - t) * flow.velocity(x, t.expand(len(x)), cond, batch.index)
    (-Quadratic().in_graph(flow.decode_in_graph(x), [Prompt("")])).mean().backward()
    torch.testing.assert_close(result, flow.shift.grad.flatten(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("correct", [0.0, 0.5, 1.0])
def test_all_steps_without_chained_jacobians(correct):
    """With all steps c is 1, whatever its share."""
    result, batch, _ = gradient(Backprop(Sparse(steps=4, correct=correct), pull=0.0))
    assert batch.weight.tolist() == [1.0] * 6
    factor = (batch.b * slope(batch.t)).sum(1)
    expected = (towards(batch.end) * factor[:, None, None, None]).mean(0)
    torch.testing.assert_close(result, expected.flatten(), rtol=1e-5, atol=1e-8)


def expectation(values, sizes, picked, power, share):
    """Of c times the sum over drawn steps of size x value, over all orders of drawing without replacement."""
    weights = [(i + 1) ** power for i in range(len(values))]
    total = 0.0
    for order in permutations(range(len(values)), picked):
        chance, left = 1.0, sum(weights)
        for i in order:
            chance, left = chance * weights[i] / left, left - weights[i]
        c = 1 + share * (sum(sizes) / sum(sizes[i] for i in order) - 1)
        total += chance * c * sum(sizes[i] * values[i] for i in order)
    return total


@pytest.mark.parametrize(("power", "share"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.5), (2.0, 0.0)])
def test_the_expectation_over_drawn_steps(power, share):
    t = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0]).expand(20_000, -1)
    steps = ways.drawn(len(t), 4, 2, power, torch.Generator().manual_seed(0))
    assert (steps[:, 0] < steps[:, 1]).all()
    values, sizes = torch.tensor([1.0, -2.0, 3.0, 0.5]), t[0, :-1] - t[0, 1:]
    each = ways.correction(t, steps, share) * (sizes[steps] * values[steps]).sum(1)
    expected = expectation(values.tolist(), sizes.tolist(), 2, power, share)
    assert each.mean().item() == pytest.approx(expected, abs=4 * each.std().item() / len(t) ** 0.5)


def test_equal_steps_drawn_with_equal_weights_are_unbiased_and_half_a_correction_shrinks():
    values, sizes = [1.0, -2.0, 3.0, 0.5], [0.25] * 4
    every = sum(value / 4 for value in values)
    assert expectation(values, sizes, 2, 0.0, 1.0) == pytest.approx(every)
    assert expectation(values, sizes, 2, 0.0, 0.5) == pytest.approx(0.75 * every)
    assert expectation(values, sizes, 2, 1.0, 1.0) != pytest.approx(every)  # later steps are drawn more often


def test_where_all_steps_have_one_gradient_each_draw_gives_that_of_all():
    t = torch.tensor([[1.0, 0.9, 0.7, 0.4, 0.0]])
    sizes = t[0, :-1] - t[0, 1:]
    for steps in combinations(range(4), 2):
        assert float(ways.correction(t, torch.tensor([steps]), 1.0) * sizes[[*steps]].sum()) == pytest.approx(1.0)


def test_a_jump_has_a_closed_form_and_its_step_is_in_the_later_part():
    result, batch, _ = gradient(Backprop(Jump(after=0.5), pull=0.0), seeds=40)
    assert {*batch.step.tolist()} == {2, 3}
    t = batch.t[:, 0]
    x = ways.clean(batch.x[:, 0], t, GaussianFlow().velocity(batch.x[:, 0], t, torch.tensor([0.5, -0.5]), batch.index))
    expected = (towards(x) * (-t * slope(t))[:, None, None, None]).mean(0)
    torch.testing.assert_close(result, expected.detach().flatten(), rtol=1e-5, atol=1e-8)


def test_copies_are_noised_to_the_last_time_and_counted_as_images():
    flow = GaussianFlow()
    result, batch, _ = gradient(Backprop(LowVariance(copies=2), pull=0.0), policy=flow)
    t, cond = batch.t[0, 0], torch.tensor([0.5, -0.5])
    assert t == 0.25
    total = 0
    with torch.no_grad():
        image = batch.end
        for noise in (None, *batch.noise.unbind(1)):
            x = batch.x[:, 0] if noise is None else (1 - t) * image + t * noise
            x = ways.clean(x, batch.t[:, 0], flow.velocity(x, batch.t[:, 0], cond, batch.index))
            total = total + towards(x) * (-t * slope(t)) / 3
    torch.testing.assert_close(result, total.mean(0).flatten(), rtol=1e-4, atol=1e-8)


def test_a_last_step_that_is_too_short_is_passed_over():
    t = torch.tensor([[1.0, 0.5, 0.2, 0.0089, 0.0]])
    assert LowVariance().chosen(t, torch.Generator()).tolist() == [[2]]
    assert LowVariance(least=0.001).chosen(t, torch.Generator()).tolist() == [[3]]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.type)
def test_a_reward_that_ignores_the_image_has_no_gradient(way):
    result, _, statistics = gradient(Backprop(way, pull=0.0), scorer=Indifferent())
    assert result.eq(0).all()
    assert statistics["reward_in_graph"] == 1


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.type)
def test_micro_batches_add_up(way):
    whole, *_ = gradient(Backprop(way))
    for micro in (1, 4):
        torch.testing.assert_close(gradient(Backprop(way), micro)[0], whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", [Sparse(steps=2), Last(steps=3), LowVariance()], ids=lambda way: way.type)
def test_latents_in_the_graph_are_those_of_the_rollout(way):
    run, rollout, judged = context(Backprop(way))
    batch = run.config.objective.batch(run, rollout, judged, None, 0).rows
    latents, _ = way.latents(lambda x, t, i: run.policy.velocity(x, t, rollout.cond, i), batch)
    torch.testing.assert_close(latents[:, 0].detach(), rollout.paths.finals, rtol=0, atol=1e-6)


def test_images_above_the_ceiling_have_no_gradient():
    run, rollout, _ = context(Backprop(Last(), pull=0.0))
    reward = Quadratic().in_graph(run.policy.decode(rollout.paths.finals), rollout.prompts[:1])[:, 0]
    ceiling = float(reward.sort().values[2:4].mean())  # three of six are above
    result, batch, statistics = gradient(Backprop(Last(), ceiling=ceiling, pull=0.0))
    t, low = batch.t[:, 0], (reward < ceiling).float()
    expected = (towards(batch.end) * (low * -t * slope(t))[:, None, None, None]).mean(0)
    torch.testing.assert_close(result, expected.flatten(), rtol=1e-5, atol=1e-8)
    assert statistics["graded"] == 0.5
    assert gradient(Backprop(Last(), ceiling=-1.0, pull=0.0))[0].eq(0).all()


def test_what_an_image_lacks():
    reward = torch.tensor([[1.0, 3.0], [torch.nan, 2.0]])
    lacking, graded = gap(reward, 2.5)
    assert lacking.tolist() == [0.75, 0.25]
    assert graded.tolist() == [[True, False], [False, True]]
    assert gap(reward, None)[0].tolist() == [-2.0, -1.0]


@pytest.mark.parametrize("way", [*WAYS, Last(steps=4)], ids=lambda way: f"{way.type}{way.width}")
def test_the_pull_is_that_of_fixed_states(way):
    """Without a reward, the gradient of mean (v - v_base)^2 at a shift of 0.3: (slope 0.3)^2, whatever led to a state.
    On the base it adds nothing."""
    flow = GaussianFlow()
    assert gradient(Backprop(way, pull=1.0), policy=flow, scorer=Indifferent())[0].eq(0).all()
    with torch.no_grad():
        flow.shift.fill_(0.3)
    result, batch, statistics = gradient(Backprop(way, pull=1.0), policy=flow, scorer=Indifferent())
    t = batch.t[:, :1] if way.copies else batch.t  # copies are at the same time
    mean = float((slope(t) ** 2).mean())
    torch.testing.assert_close(result, torch.full_like(result, 2 * 0.3 * mean / len(result)), rtol=1e-5, atol=0)
    assert statistics["drift"] == pytest.approx(0.09 * mean, rel=1e-5)


def test_an_image_that_cannot_be_scored_in_the_graph_is_left_out():
    alone, *_ = gradient(Backprop(Last(), pull=0.0), texts=("0.5",))
    changed = context(Backprop(Last(), pull=0.0), scorer=Quadratic(unknown=1))
    both, batch, statistics = gradient(None, changed=changed)
    graph = changed[0].rewards.graph
    assert (len(batch), graph.images, graph.scores, len(graph.failures)) == (6, 6, 6, 3)
    assert {*graph.failures.values()} == {"a:Quadratic: an unknown prompt"}
    torch.testing.assert_close(both, alone / 2, rtol=1e-5, atol=1e-9)
    assert statistics["graded"] == 0.5


def test_failures_in_the_graph_are_counted_and_too_many_end_the_run_with_a_reason(settings, monkeypatch):
    def unread(self, images, prompts):
        if prompts[0].text != first:
            raise ValueError("it cannot\nbe read")
        return self._values(images)

    first = json.loads(Path(settings["prompts"]).read_text().splitlines()[0])["prompt"]
    monkeypatch.setattr(Smooth, "in_graph", unread)
    settings = backprop(settings, "jump", prompts_per_iteration=4, iterations=1, micro_batch=1)
    [row] = rows(run(settings, max_failed=0.75) / "metrics.jsonl")
    assert (row["failed"], row["rewards_in_graph"], row["failed_in_graph"], row["graded"]) == (0, 8, 6, 0.25)
    with pytest.raises(Failed, match=r"6 of 8 images could not be scored .*: smooth:Smooth: it cannot be read"):
        run(settings, out=settings["out"] + "2")


def test_an_image_without_a_score_gives_no_row():
    run, rollout, judged = context(Backprop(Last(), pull=0.0))
    judged.reward[1, -1] = torch.nan
    _, batch, _ = gradient(None, changed=(run, rollout, judged))
    assert batch.index.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(batch.end, rollout.paths.finals[[0, 2, 3, 4, 5]])


def test_weights_are_those_of_the_iteration():
    """A ramp at its start, plus the multiplier of a constraint, which moves only after the rows were made."""
    name = "a:Quadratic.value"
    one, *_ = gradient(Backprop(Last(), pull=0.0))
    ramp = {"rewards": {name: {"start": 2.0, "end": 9.0}}, "at_least": {name: {"bound": 0.0}}}
    run, rollout, judged = context(Backprop(Last(), pull=0.0), **ramp)
    run.rewards.multipliers[name] = 1.0
    batch = run.config.objective.batch(run, rollout, judged, None, 0)
    run.rewards.multipliers[name] = 50.0
    loss, _ = batch.replay(batch.rows)
    loss.mean().backward()
    torch.testing.assert_close(run.policy.shift.grad.flatten(), 3 * one, rtol=1e-5, atol=1e-8)


def test_learning_raises_the_reward():
    flow, levels = GaussianFlow(), []
    optimizer = torch.optim.SGD(flow.parameters(), 400.0)
    for _ in range(10):
        run, rollout, judged = context(Backprop(Sparse(steps=2), pull=0.0), policy=flow)
        levels.append(float(Quadratic().in_graph(flow.decode(rollout.paths.finals), rollout.prompts).mean()))
        batch = run.config.objective.batch(run, rollout, judged, None, 0)
        optimizer.zero_grad()
        batch.replay(batch.rows)[0].mean().backward()
        optimizer.step()
    assert (torch.tensor(levels).diff() > 0).all()
    assert levels[-1] > 0.5 * levels[0]  # both below 0


def test_a_pipelines_gradient_is_that_of_finite_differences(random_model):
    """One element of the adapter, through all steps, decoder and reward."""
    policy = policies.load(random_model)
    policy.attach_lora(2, 4.0, None, 0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))

    def changed():
        return context(
            Backprop(Last(steps=3), pull=0.0), policy, Inside(1e5), texts=("a red circle",), seeds=2, steps=3
        )

    whole, *_ = gradient(None, changed=changed())
    at = int(whole.abs().argmax())
    element = next(
        p.view(-1)[at - before : at - before + 1]
        for p, before in zip(policy.parameters(), _before(policy.parameters()), strict=True)
        if before <= at < before + p.numel()
    )
    losses = []
    for step in (0.02, -0.04):
        with torch.no_grad():
            element += step
        run, rollout, judged = changed()
        batch = run.config.objective.batch(run, rollout, judged, None, 0)
        losses.append(float(batch.replay(batch.rows)[0].detach().double().mean()))
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(float(whole[at]), rel=0.01)


def _before(parameters):
    """How many elements are before each parameter."""
    count = 0
    for p in parameters:
        yield count
        count += p.numel()


def backprop(settings, way, **changed):
    return settings | {
        "objective": {"type": "backprop", "way": way}, "plan": "ode", "rewards": {"smooth:Smooth.red": 1.0},
        "iterations": 2, "eval_every": 0, "held_out": None,
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("way", "changed"),
    [
        ({"type": "sparse", "steps": 3}, {}),
        ({"type": "last", "steps": 2}, {"guidance": 3.0, "epochs": 2}),
        ("jump", {"objective": {"type": "backprop", "way": "jump", "pull": 0.0}}),
        ({"type": "low_variance", "copies": 2}, {}),
    ],
    ids=["sparse", "last", "jump", "low_variance"],
)
def test_counts_of_the_estimate_are_those_of_the_run(settings, way, changed):
    settings = backprop(settings, way, **changed)
    figures, metrics = estimate.estimate(configs.build(settings, "test")), rows(run(settings) / "metrics.jsonl")
    for count in estimate.COUNTS:
        assert [row[count] for row in metrics] == [figures["iteration"][count]] * 2
    assert all(row["grad_norm"] > 0 for row in metrics)


def test_a_resumed_run_is_the_same_to_the_bit(settings, tmp_path):
    settings = backprop(settings, "sparse", checkpoint_every=1, iterations=3)
    whole = run(settings, out=str(tmp_path / "whole"))
    with cut_off(2):
        run(settings, out=str(tmp_path / "cut"))
    again = run(settings, resume=True, out=str(tmp_path / "cut"))
    one, two = (load_file(out / "checkpoints/000003/adapter.safetensors") for out in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(value.abs().max() > 0 for name, value in one.items() if "lora_B" in name)


def test_a_way_is_described_with_its_settings():
    way = {"type": "last", "steps": 2}
    c = configs.build({"objective": {"type": "backprop", "way": way}, "plan": "ode", "held_out": None}, "test")
    assert described(c.objective) == "backprop (way last (steps 2), pull 0.1, recompute False)"
    assert configs.build({"objective": c.objective, "plan": "ode", "held_out": None}, "test").objective == c.objective


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rewards": {"jpeg_size.kilobytes": 1.0}}, "rewards: objective: backprop: jpeg_size has no gradients"),
        ({"combine": "mrn"}, "combine: mrn: objective: backprop needs combine: sum"),
        ({"credit": "terminal"}, "credit does not act with objective: backprop"),
        ({"objective": {"type": "backprop", "way": {"type": "last", "steps": 5}}}, "way: steps: 5 of the 4 steps"),
        ({"objective": {"type": "backprop", "way": "final"}}, "way: a name or .* of sparse, last, jump, low_variance"),
        (
            {"objective": {"type": "backprop", "way": {"type": "sparse", "step": 3}}},
            "way: sparse has no setting 'step'",
        ),
        ({"objective": {"type": "backprop", "way": {"type": "jump", "after": 1.0}}}, "way: after: .* less than 1"),
        ({"objective": {"type": "backprop", "pull": -1.0}}, "pull: .* got -1.0"),
    ],
)
def test_what_does_not_suit_it_is_refused_in_a_line(settings, changed, reason):
    with pytest.raises(BadInput, match=reason) as error:
        run(backprop(settings, "jump", **changed))
    assert "\n" not in str(error.value)
