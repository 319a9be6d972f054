"""Each kind of thing, written outside the package, trains by name from a config and handed over as an object."""

import sys

import pytest
import torch
from run_config import rows, run

from mmalign import run as runs
from mmalign.checks import doctor
from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.training.setup import Given
from reward_models import registry

MODULE = """
from dataclasses import dataclass

import torch

from mmalign.credit.groups import Credit, as_grid, normalise
from mmalign.data.draws import Draw
from mmalign.flow import plan as plans
from mmalign.flow.kernels import scheduled
from mmalign.learn.loss import Loss, pool
from mmalign.objectives.flow_matching import error, examples
from mmalign.objectives.objective import OnImages
from mmalign.policy.gaussian import GaussianFlow
from mmalign.rewards.combination import Rule
from mmalign.sampling.plans import Fixed
from mmalign.selection.selection import Selection
from reward_models import Card, Scores


class Red:
    card, names = Card("red", sees_prompt=False), ("mean", "left")

    def __init__(self, sign: float = 1.0):
        self.sign = sign

    def __call__(self, images, prompts):
        red = images[:, 0]
        return Scores(self.names, self.sign * torch.stack([red.mean((1, 2)), red[:, :, 0].mean(1)], 1))


@dataclass(frozen=True)
class Discounted(Credit):
    gamma: float = 0.9

    def __call__(self, tree, judged, units):
        advantage = normalise(judged.reward[:, -1], tree.prompt, units)
        return as_grid(torch.stack([advantage * self.gamma**k for k in range(tree.steps)], 1))


@dataclass(frozen=True)
class Alternating(Fixed):
    every: int = 2

    def __call__(self, t, kernel, position=0):
        return plans.table(t, kernel, [dict.fromkeys(range(0, len(t) - 2, self.every), 0)])


@dataclass(frozen=True)
class Worst(OnImages):
    draws: int = 1

    def examples(self, policy, images, generator):
        worst = images[images.reward.argsort(stable=True)[:1]]
        return examples(policy, worst.x, worst.prompt, -torch.ones(len(worst), 1, 1), self.draws, generator)

    def replay(self, policy, cond, rows):
        loss = -error(policy, rows.x, rows.noise, rows.t, cond, rows.index).mean((1, 2))
        return loss, {"loss": loss.detach()}


@dataclass(frozen=True)
class Plain:
    scale: float = 1.0

    def __call__(self, step):
        ratio = pool(step.log_ratio, step.advantage.shape[1:]).exp()
        return Loss(-self.scale * (ratio * step.advantage).mean((1, 2)), {"ratio": ratio.detach().mean((1, 2))})


@dataclass(frozen=True)
class Halved:
    noise: float = 0.4

    def step(self, x, v, t, s, noise, t_max):
        return scheduled(x, v, t, s, noise / 2)


@dataclass(frozen=True)
class Best(Rule):
    margin: float = 0.0

    def __call__(self, values, names, group, weights, floor):
        return (values * weights - self.margin).max(1).values


@dataclass(frozen=True)
class Some(Selection):
    keep: int = 2
    leave: int = 0

    def __call__(self, reward, prompt):
        return torch.arange(len(reward)) % 3 != self.leave


@dataclass(frozen=True)
class Backwards(Draw):
    by: int = 1

    def __call__(self, ids, size, iteration, seed, rates):
        return [-self.by * (iteration * size + i) % len(ids) for i in range(size)]


class Shifted(GaussianFlow):
    def velocity(self, x, t, cond, index):
        return super().velocity(x, t, cond + 0.1, index)
"""
BASE = dict(
    model="mmalign.policy.gaussian:GaussianFlow", held_out=None, iterations=2, prompts_per_iteration=2,
    rewards={"my_methods:Red.mean": 1.0, "my_methods:Red.left": 0.9}, seeds=3,
    steps=4, plan="sde", credit="terminal", checkpoint_every=2,
)  # fmt: skip
METHODS = {
    "credit": ("Discounted", {"gamma": 0.5}),
    "plan": ("Alternating", {"every": 3}),
    "loss": ("Plain", {"scale": 2.0}),
    "kernel": ("Halved", {"noise": 0.6}),
    "combine": ("Best", {"margin": 0.1}),
    "select": ("Some", {"leave": 1}),
    "draw": ("Backwards", {"by": 3}),
}


@pytest.fixture(scope="module")
def my_methods(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "my_methods.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("MMALIGN_ALLOW", "my_methods")
        import my_methods

        yield my_methods
        sys.modules.pop("my_methods")


@pytest.fixture
def base(tmp_path):
    (tmp_path / "prompts.txt").write_text("0.5\n-0.5\n0.0\n0.25\n")
    return BASE | {"prompts": str(tmp_path / "prompts.txt"), "out": str(tmp_path / "run")}


def trained(out) -> torch.Tensor:
    """The adapter after two iterations, which must have moved."""
    assert [row["iteration"] for row in rows(out / "metrics.jsonl")] == [1, 2]
    from mmalign.runs import checkpoint

    shift = checkpoint.read(checkpoint.latest(out / "checkpoints"))[0]["adapter"]["shift"]
    assert bool(shift.any())
    return shift


@pytest.mark.parametrize("key", METHODS)
def test_a_method_of_another_module(my_methods, base, tmp_path, key):
    name, settings = METHODS[key]
    plain = trained(run(base, out=str(tmp_path / "plain")))
    named = run(base, **{key: {"type": f"my_methods:{name}", **settings}}, out=str(tmp_path / "named"))
    handed = run(base, **{key: getattr(my_methods, name)(**settings)}, out=str(tmp_path / "object"))
    defaults = run(base, **{key: f"my_methods:{name}"}, out=str(tmp_path / "defaults"))
    assert torch.equal(trained(named), trained(handed))
    assert not torch.equal(trained(named), plain)
    assert configs.load(handed / "config.yaml") == configs.load(named / "config.yaml").model_copy(
        update={"out": str(handed)}
    )
    if key != "combine":  # a margin moves all rewards of a group by the same amount
        assert not torch.equal(trained(defaults), trained(named))


def test_an_objective_on_finished_images(my_methods, base, tmp_path):
    images = {key: value for key, value in base.items() if key != "credit"} | {"plan": "ode"}
    named = run(images, objective={"type": "my_methods:Worst", "draws": 2}, out=str(tmp_path / "named"))
    handed = run(images, objective=my_methods.Worst(draws=2), out=str(tmp_path / "object"))
    assert torch.equal(trained(named), trained(handed))
    assert rows(named / "metrics.jsonl")[0]["transitions"] == 2 * 2  # the worst image of each prompt, twice


def test_a_policy_and_a_scorer(my_methods, base, tmp_path):
    named = run(base | {"model": "my_methods:Shifted", "out": str(tmp_path / "named")})
    c = configs.build(
        base | {"model": "shifted", "rewards": {"red.mean": 1.0, "red.left": 0.9}, "out": str(tmp_path / "object")},
        "test",
    )
    handed = runs.train(c, given=Given(my_methods.Shifted(), {"red": my_methods.Red()}))
    assert torch.equal(trained(named), trained(handed))


def test_a_scorer_with_a_setting(my_methods, base, tmp_path):
    up = trained(run(base, out=str(tmp_path / "up")))
    settings = {
        "rewards": {"down.mean": 1.0, "down.left": 0.9},
        "scorers": {"down": {"scorer": "my_methods:Red", "sign": -1.0}},
    }
    assert torch.allclose(trained(run(base | settings, out=str(tmp_path / "down"))), -up, atol=1e-4)


def test_inside_the_package_it_is_one_file_and_one_line(my_methods, monkeypatch):
    """A scorer in the table is found by its name; the tables of methods are tuples that the config is built from."""
    monkeypatch.setitem(registry.SCORERS, "red", "my_methods:Red")
    from mmalign.config import methods
    from mmalign.credit import CREDITS

    field = methods.one_of((*CREDITS, type("Named", (my_methods.Discounted,), {"type": "discounted"})), "credit")
    from pydantic import TypeAdapter

    assert TypeAdapter(field).validate_python({"type": "discounted", "gamma": 0.5}).gamma == 0.5


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"credit": "no_such_module:Credit"}, "no_such_module"),
        ({"credit": {"type": "my_methods:Discounted", "delta": 1}}, "delta"),
        ({"credit": {"type": "my_methods:Discounted", "gamma": "much"}}, "much"),
        ({"loss": "my_methods:Red"}, "my_methods:Red"),
        ({"objective": "my_methods:Worst"}, "credit does not act"),
    ],
)
def test_a_wrong_method_is_one_line_that_names_it(my_methods, base, changed, named):
    with pytest.raises(BadInput, match=named) as error:
        configs.build(base | changed, "test")
    assert "\n" not in str(error.value)


def test_the_doctor_examines_a_policy_without_a_pipeline(my_methods, base):
    checks = [*doctor.examine(configs.build(base | {"model": "my_methods:Shifted"}, "test"))]
    assert [check.check for check in checks if check.good is False] == []
    assert {"ODE", "gradient", "ratio", "checkpoint"} <= {check.check for check in checks}
