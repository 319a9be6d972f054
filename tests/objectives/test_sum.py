"""Sums of objectives: the gradient is the weighted sum of the parts' gradients; a run counts, resumes and reports."""

from types import SimpleNamespace

import pytest
import torch
from run_config import cut_off, rows, run
from safetensors.torch import load_file

from mmalign.checks import estimate
from mmalign.config import load as configs
from mmalign.config.methods import described
from mmalign.errors import BadInput
from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.update import update
from mmalign.objectives import Awm, Backprop, Grpo, Nft, OnlineDpo, Rft, Sum
from mmalign.objectives.objective import Lag
from mmalign.objectives.sum import RowsOfParts
from mmalign.objectives.ways import Jump, Last, LowVariance, Sparse
from mmalign.policy.gaussian import GaussianFlow
from mmalign.rewards.rewards import Rewards
from mmalign.seeds import gaussian, seed_of
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.types import Judgement
from reward_models import Card, Prompt, Scores

TEXTS, SEEDS, STEPS = ("0.5", "-0.5"), 3, 4
NFT = Nft(draws=2, bound=1.0)
BACK = Backprop(Last(steps=2))
GRPO = Grpo()
ALONE = SimpleNamespace(all_reduce_sum=lambda counts, what: dict(counts), gather=lambda values, what: values)


class Quadratic:
    """The negative mean squared distance of the pixels from 0.75."""

    names, card = ("value",), Card("quadratic")

    def in_graph(self, images, prompts):
        return -((images - 0.75) ** 2).mean((1, 2, 3))[:, None]

    def __call__(self, images, prompts):
        return Scores(self.names, self.in_graph(images, prompts))


def gradient(objective, micro=64, plan="ode", ranks=ALONE, unscored=()):
    """The gradient of one update on a fixed rollout, its batch, its statistics, and the forwards of the replay."""
    flow = GaussianFlow()
    with torch.no_grad():
        flow.shift.fill_(0.1)
    flow.counts["forwards"] = 0
    settings = {} if plan == "ode" or "credit" not in objective.uses else {"credit": "terminal"}
    c = configs.build(
        {"objective": objective, "plan": plan, "steps": STEPS, "seeds": SEEDS, "held_out": None,
         "prompts_per_iteration": 2, "rewards": {"a:Quadratic.value": 1.0}} | settings, "test",
    )  # fmt: skip
    rewards = Rewards(c, {"a:Quadratic": Quadratic()}, {}, None, c.combine)
    cond, index = flow.encode(TEXTS), torch.arange(2).repeat_interleave(SEEDS)

    def noise(start, *rest):
        return gaussian(flow.latent_shape, seed_of(start, *rest))

    start, table = torch.stack([noise(i) for i in range(len(index))]), c.plan(flow.times(STEPS), c.kernel, 0)
    paths = sample(flow.velocity, start, cond, index, [table] * len(index), noise)
    n = len(paths.tree.prompt)
    reward = torch.full((n, STEPS + 1), torch.nan)
    reward[:, -1] = torch.linspace(0, 1, n) ** 2
    reward[[*unscored], -1] = torch.nan
    advantage = torch.zeros(n, STEPS, 1, 1) + (reward[:, -1].nan_to_num(0.0) - 0.4)[:, None, None, None]
    run = SimpleNamespace(
        config=c, policy=flow, ranks=ranks, fits={"batch": lambda work: work(64)}, rewards=rewards,
    )  # fmt: skip
    rollout = SimpleNamespace(
        prompts=[Prompt(text, id=p) for p, text in enumerate(TEXTS)], cond=cond, paths=paths, forwards=None
    )
    batch = c.objective.batch(run, rollout, Judgement(reward, {}), advantage, 0)
    before, parameters = flow.counts["forwards"], flow.parameters()
    statistics = update(
        parameters, torch.optim.SGD(parameters, 0.0), batch.rows, batch.replay, needed=batch.needed, epochs=1,
        minibatches=1, micro_batch=AdaptiveBatch(micro), max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return parameters[0].grad.clone(), batch, statistics, flow.counts["forwards"] - before


@pytest.mark.parametrize(("objective", "plan"), [(NFT, "ode"), (BACK, "ode"), (GRPO, "sde"), (Rft(), "ode")])
def test_a_sum_of_one_is_that_objective_to_the_bit(objective, plan):
    one, batch, statistics, forwards = gradient(objective, plan=plan)
    summed, rows_of_sum, both, again = gradient(Sum((objective,), (1.0,)), plan=plan)
    assert torch.equal(summed, one)
    assert one.abs().max() > 0
    assert len(rows_of_sum.rows) == len(batch.rows)
    assert again == forwards
    assert both[f"loss/{objective.type}"] == both["loss"] == statistics["loss"]
    assert {key: both[key] for key in statistics} == pytest.approx(statistics, nan_ok=True)


def test_a_part_of_weight_0_is_absent():
    one, batch, _, forwards = gradient(NFT)
    summed, rows_of_sum, both, again = gradient(Sum((NFT, BACK), (1.0, 0.0)))
    assert torch.equal(summed, one)
    assert (len(rows_of_sum.rows), again) == (len(batch.rows), forwards)
    assert "reward_in_graph" not in both
    assert Sum((GRPO, NFT), (0.0, 1.0)).uses == NFT.uses


@pytest.mark.parametrize(
    ("parts", "plan"),
    [
        ((NFT, BACK), "ode"),
        ((NFT, Backprop(Sparse(steps=2)), Rft(draws=3)), "ode"),
        ((GRPO, Backprop(Sparse(steps=2))), "sde"),
        ((GRPO, Backprop(Last(steps=3))), "sde"),
        ((GRPO, Backprop(LowVariance())), {"type": "branch", "steps": [0, 1], "children": 2}),
        ((Grpo(beta=0.1), Backprop(Jump()), OnlineDpo()), {"type": "window", "steps": [0, 2]}),
    ],
    ids=["nft+last", "nft+sparse+rft", "grpo+sparse", "grpo+last", "grpo+low_variance", "grpo+jump+dpo"],
)
def test_the_gradient_is_the_weighted_sum(parts, plan):
    """Of parts with different numbers of rows, whatever the micro-batch; an image without a score gives none."""
    weights = (1.0, 0.5, 2.0)[: len(parts)]
    each = [gradient(part, plan=plan, unscored=[1]) for part in parts]
    counts = [len(batch.rows) for _, batch, *_ in each]
    assert len({*counts}) == len(counts)
    expected = sum(weight * result[0] for weight, result in zip(weights, each, strict=True))
    for micro in (64, 1, 4):
        summed, batch, statistics, forwards = gradient(Sum(parts, weights), micro, plan, unscored=[1])
        torch.testing.assert_close(summed, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert (len(batch.rows), forwards) == (sum(counts), sum(result[3] for result in each))
    for part, result in zip(parts, each, strict=True):
        assert statistics[f"loss/{part.type}"] == pytest.approx(result[2]["loss"], rel=1e-5)
    losses = [weight * result[2]["loss"] for weight, result in zip(weights, each, strict=True)]
    if all(batch.needed is None for _, batch, *_ in each):
        assert statistics["loss"] == pytest.approx(sum(losses), rel=1e-5)
    assert (batch.rows.index.diff() >= 0).all()


def test_rows_of_all_ranks_count():
    """As many rows of each part on another rank change no scale; six more of one part change those of both."""
    twice = replace_ranks(lambda counts, what: {name: 2 * n for name, n in counts.items()})
    _, alone, *_ = gradient(Sum((NFT, BACK), (1.0, 0.5)))
    _, shared, *_ = gradient(Sum((NFT, BACK), (1.0, 0.5)), ranks=twice)
    torch.testing.assert_close(shared.rows.scale, alone.rows.scale)
    more = replace_ranks(lambda counts, what: {"nft": counts["nft"] + 6, "backprop": counts["backprop"]})
    _, uneven, *_ = gradient(Sum((NFT, BACK), (1.0, 0.5)), ranks=more)
    assert sorted({*uneven.rows.scale.tolist()}) == pytest.approx([1.0 * 24 / 18, 0.5 * 24 / 6])


def replace_ranks(exchange):
    return SimpleNamespace(all_reduce_sum=exchange, gather=ALONE.gather)


def test_rows_are_picked_with_their_place():
    rows_of_sum = RowsOfParts(*(torch.arange(3) + k for k in range(2)), torch.ones(3), *[torch.arange(3)] * 3)
    picked = rows_of_sum[torch.tensor([2, 0])]
    assert (picked.part.tolist(), picked.row.tolist(), len(picked)) == ([2, 0], [3, 1], 2)


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "ddim"])
def test_steps_with_noise_end_where_the_rollout_did(kernel):
    """The noise is held fixed: the steps taken again give the rollout's images, and their gradient is autograd's
    through the kernel."""
    flow = GaussianFlow()
    made = configs.build(
        {"kernel": kernel, "plan": "sde", "seeds": 2, "held_out": None, "credit": "terminal"}, "t"
    ).kernel
    cond, index = flow.encode(["0.5"]), torch.zeros(3, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    start, table = torch.randn(3, *flow.latent_shape, generator=generator), plans.sde(flow.times(STEPS), made)
    draws = {}

    def noise(i, *key):
        return draws.setdefault((i, *key), torch.randn(flow.latent_shape, generator=generator))

    paths = sample(flow.velocity, start, cond, index, [table] * 3, noise)
    picked = Last(steps=STEPS).picked(paths, torch.arange(3), STEPS, torch.Generator())
    latents, _ = Last(steps=STEPS).latents(lambda x, t, i: flow.velocity(x, t, cond, i), picked)
    torch.testing.assert_close(latents[:, 0].detach(), paths.finals, rtol=0, atol=1e-5)
    latents.square().sum().backward()
    walked, flow.shift.grad = flow.shift.grad.clone(), None
    x = start
    for k in range(STEPS):
        t, s = paths.tree.t[:, k], paths.tree.t[:, k + 1]
        mean, _ = paths.kernel.step(x, flow.velocity(x, t, cond, index), t, s, paths.tree.noise[:, k], paths.t_max)
        x = mean + (paths.x[:, k + 1] - paths.mean[:, k])
    x.square().sum().backward()
    torch.testing.assert_close(walked, flow.shift.grad, rtol=1e-5, atol=1e-6)


def test_a_sum_is_read_written_and_described():
    text = {
        "type": "sum",
        "parts": ["nft", {"type": "backprop", "way": {"type": "last", "steps": 2}}],
        "weights": [1, 0.5],
    }
    c = configs.build({"objective": text, "plan": "ode", "seeds": 2, "held_out": None}, "test")
    assert c.objective == Sum((Nft(), Backprop(Last(steps=2))), (1.0, 0.5))
    assert configs.build(c.model_dump(mode="json"), "test") == c
    assert configs.build(c.model_dump(mode="json") | {"objective": c.objective}, "test") == c
    assert described(c.objective).endswith(" + 0.5 x backprop (way last (steps 2), pull 0.1, recompute False)")


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        ({"type": "sum"}, r"sum: parts \[\]"),
        ({"type": "sum", "parts": "nft"}, "parts: a list of methods is needed"),
        ({"type": "sum", "parts": ["nft", "sum"]}, "no objective called 'sum'"),
        ({"type": "sum", "parts": ["nft", "nft"]}, "nft twice"),
        ({"type": "sum", "parts": ["nft", "grpo"]}, "nft and grpo: the advantages of grpo are of steps"),
        ({"type": "sum", "parts": ["nft", "rft"], "weights": [1]}, r"weights: \[1.0\] for 2 parts"),
        ({"type": "sum", "parts": ["nft", "rft"], "weights": [0, 0]}, "nothing to learn"),
        ({"type": "sum", "parts": ["nft", "rft"], "weights": [1, -1]}, "weights: .* got -1"),
        ({"type": "sum", "parts": ["nft", {"type": "rft", "draw": 1}]}, "parts: rft has no setting 'draw'"),
        ({"type": "sum", "parts": ["nft", {"type": "awm", "lag": {"most": 0.5}}]}, "2 different settings `lag`"),
        (
            {"type": "sum", "parts": ["nft", {"type": "backprop", "way": {"type": "last", "steps": 99}}]},
            "way: steps: 99",
        ),
    ],
)
def test_what_does_not_suit_is_refused_in_a_line(objective, reason):
    settings = {"objective": objective, "plan": "sde", "seeds": 2, "held_out": None}
    with pytest.raises(BadInput, match=reason) as error:
        configs.build(settings, "test")
    assert "\n" not in str(error.value)


def test_one_policy_draws_for_all_parts():
    slow = Lag(most=0.5)
    assert Sum((Nft(lag=slow), Awm(lag=slow), BACK)).lag == slow
    assert Sum((BACK,)).lag == Lag()


@pytest.fixture
def override(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("objective: backprop\nplan: ode\nheld_out: null\n")
    return lambda *words: configs.load(file, words).objective


def test_overrides_reach_methods_in_methods(override):
    assert override("objective.way=last", "objective.way.steps=1") == Backprop(Last(steps=1))
    assert override("objective.way={type: last, steps: 3}", "objective.way.steps=1") == Backprop(Last(steps=1))
    parts = "objective={type: sum, parts: [rft, backprop]}"
    assert override("seeds=2", parts, "objective.parts.0.draws=3").parts == (Rft(draws=3), Backprop())
    with pytest.raises(BadInput, match=r"objective.parts.2.draws: '2': a number from 0 to 1"):
        override(parts, "objective.parts.2.draws=3")


SUM = {"type": "sum", "parts": ["nft", {"type": "backprop", "way": "sparse"}], "weights": [1.0, 0.5]}
NOISY = {
    "plan": {"type": "window", "steps": [0, 2]}, "credit": "terminal", "loss": "clipped", "kernel": "flow_sde",
    "objective": {
        "type": "sum",
        "parts": [{"type": "grpo", "beta": 0.01}, {"type": "backprop", "way": {"type": "last", "steps": 3}}],
    },
}  # fmt: skip
RUN = {"plan": "ode", "rewards": {"smooth:Smooth.red": 1.0}, "iterations": 2, "eval_every": 0, "held_out": None}


@pytest.mark.parametrize(
    "changed",
    [{"objective": SUM}, NOISY, NOISY | {"max_kl": 1e3, "epochs": 2, "guidance": 3.0}],
    ids=["nft", "grpo", "grpo, guided"],
)
def test_counts_of_the_estimate_are_those_of_the_run(settings, changed):
    settings = settings | RUN | changed
    figures, metrics = estimate.estimate(configs.build(settings, "test")), rows(run(settings) / "metrics.jsonl")
    for count in estimate.COUNTS:
        assert [row[count] for row in metrics] == [figures["iteration"][count]] * 2
    assert all(row["grad_norm"] > 0 and row["graded"] > 0 for row in metrics)
    for row in metrics:  # an image of the rollout is scored once more in each epoch
        graph = row["rewards_in_graph"]
        assert graph == settings.get("epochs", 1) * (row["rewards"] - graph) > 0


def test_a_resumed_run_is_the_same_to_the_bit(settings, tmp_path):
    settings = settings | RUN | {"objective": SUM, "checkpoint_every": 1, "iterations": 3}
    whole = run(settings, out=str(tmp_path / "whole"))
    with cut_off(2):
        run(settings, out=str(tmp_path / "cut"))
    again = run(settings, resume=True, out=str(tmp_path / "cut"))
    one, two = (load_file(out / "checkpoints/000003/adapter.safetensors") for out in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(value.abs().max() > 0 for name, value in one.items() if "lora_B" in name)
