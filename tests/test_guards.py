"""Values that are not finite, the KL budget, alarms: what they report and what they leave unchanged."""

from dataclasses import dataclass

import pytest
import torch
from command_line import mmalign
from kill_and_resume import outcome
from run_config import rows, run
from trajectories import sampled

from mmalign import errors, run as runs
from mmalign.config import load as configs
from mmalign.errors import BadInput, Failed, NonFinite
from mmalign.flow import plan as plans
from mmalign.learn.update import update
from mmalign.policy.sd3 import SD3Policy
from mmalign.reporting import report
from mmalign.rewards.combination import Combination, Product, Sum
from mmalign.rewards.judge import judge, score
from mmalign.runs import alarms, checkpoint
from mmalign.sampling.kernels import FlowSde
from mmalign.training import finite
from mmalign.training.finite import Skips
from mmalign.types import Rows
from reward_models import Prompt, Scores, files
from reward_models.types import Card

PROMPTS = [Prompt("a circle", id=10), Prompt("a cross", id=11), Prompt("a square", id=12)]


def planted(monkeypatch, method, iterations, spoil):
    """From here on, in these iterations, what the policy's `method` returns goes through `spoil`."""
    whole, iterate, now = getattr(SD3Policy, method), runs.iterate, []

    def of_iteration(opened, iteration, *rest):
        now[:] = [iteration]
        try:
            return iterate(opened, iteration, *rest)
        finally:
            now.clear()

    def spoilt(self, *args):
        result = whole(self, *args)
        return spoil(result, *args) if now and now[0] in iterations else result

    monkeypatch.setattr(runs, "iterate", of_iteration)
    monkeypatch.setattr(SD3Policy, method, spoilt)


def of_second_prompt(result, x, t, cond, index):
    return torch.where((index == 1)[:, None, None, None], result * torch.nan, result)


def learning(result, *args):
    return of_second_prompt(result, *args) if torch.is_grad_enabled() else result


def walking(result, *args):
    return result if torch.is_grad_enabled() else of_second_prompt(result, *args)


def state(out, iteration):
    """Adapter, average and optimiser in one table."""
    tensors, _ = checkpoint.read(out / f"checkpoints/{iteration:06d}")
    return {f"{kind} {name}": value for kind, other in tensors.items() for name, value in other.items()}


# ------------------------------------------------------------------------------------------------- not finite, in runs


@pytest.mark.parametrize(
    ("method", "spoil", "what"),
    [
        ("velocity", learning, "loss"),
        ("velocity", walking, "latents"),
        ("decode", lambda images, x: images * torch.nan, "decoded images"),
    ],
)
def test_what_is_not_finite_is_named_and_left_out_to_the_bit(settings, monkeypatch, method, spoil, what):
    planted(monkeypatch, method, {1}, spoil)
    changed = dict(held_out=None, checkpoint_every=1, keep_checkpoints=9, max_skips=1)
    out = run(settings, **changed)
    before, after, last = state(out, 1), state(out, 2), state(out, 3)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], last[name]) for name in after)
    metrics, reported = rows(out / "metrics.jsonl"), rows(out / "alarms.jsonl")
    assert [row["skipped"] for row in metrics] == [0, 1, 0, 0]
    assert "grad_norm" not in metrics[1]
    assert [(row["iteration"], row["alarm"]) for row in reported] == [(2, "skipped")]
    assert reported[0]["text"].startswith(f"iteration 2: {what} not finite; prompts: ")
    assert reported[0]["text"].count("'") == (4 if method == "decode" else 2)  # all prompts, or one
    page = report.write(out).read_text()
    assert f"{what} not finite" in page
    assert ">nan<" not in page


def test_by_default_the_first_one_stops_with_one_line(settings, monkeypatch, tmp_path):
    planted(monkeypatch, "velocity", {2}, learning)
    file = tmp_path / "config.yaml"
    file.write_text(configs.dump(configs.build(settings | dict(held_out=None), "test")))
    ended = mmalign("train", file)
    assert ended.returncode == 1
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("mmalign: iteration 3: loss not finite; prompts: ")
    out = tmp_path / "run"
    assert len(rows(out / "metrics.jsonl")) == 2
    assert [path.name for path in checkpoint.numbered(out / "checkpoints")] == ["000002"]


def test_a_resumed_run_meets_it_again_and_leaves_it_out_when_told_to(settings, monkeypatch, tmp_path):
    planted(monkeypatch, "velocity", {2}, walking)
    message = []
    for resume in (False, True):
        with pytest.raises(NonFinite, match=r"^iteration 3: latents not finite; prompts: \d 'a [a-z ]+'$") as stop:
            run(settings, resume, held_out=None)
        message.append(str(stop.value))
    assert message[0] == message[1]
    resumed = run(settings, True, held_out=None, max_skips=2)
    assert configs.load(resumed / "config.yaml").max_skips == 2
    whole = run(settings, held_out=None, max_skips=2, out=str(tmp_path / "whole"))
    assert outcome(resumed) == outcome(whole)
    with pytest.raises(BadInput, match="seed is 1 and was 0; a run keeps its config"):
        run(settings, True, held_out=None, seed=1)


def test_spoilt_weights_stop_the_run_before_they_are_saved(settings, monkeypatch):
    opened = runs.open_session

    def spoilt(*args):
        result = opened(*args)
        result.policy.parameters()[0].data.view(-1)[0] = torch.nan
        return result

    monkeypatch.setattr(runs, "open_session", spoilt)
    with pytest.raises(NonFinite, match=r"iteration 2: latents not finite.*\(1 steps in a row left out before\)"):
        run(settings, held_out=None, checkpoint_every=2, max_skips=1)


def test_out_of_memory_with_one_row_is_one_line(settings, monkeypatch):
    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more")

    monkeypatch.setattr(SD3Policy, "network", full)
    with pytest.raises(Failed, match=r"^out of memory: CUDA out of memory. Tried to allocate 2 GiB.; gradient_check"):
        run(settings)


# -------------------------------------------------------------------------------------------------- not finite, by hand


@dataclass(frozen=True)
class Numbers(Rows):
    x: torch.Tensor
    index: torch.Tensor
    step: torch.Tensor


@pytest.mark.parametrize(("bad", "what"), [(torch.nan, "loss"), (torch.inf, "loss"), (1e38, "gradient")])
def test_one_minibatch_of_four_is_left_out_exactly(bad, what):
    """Plain gradient descent on w x: the parameter ends where the other three minibatches bring it."""
    x, w = torch.tensor([1.0, 2.0, bad, 4.0]), torch.nn.Parameter(torch.zeros(()))
    batch = Numbers(x, torch.tensor([0, 1, 2, 0]), torch.zeros(4, dtype=torch.long))
    skips = Skips(1)

    def replay(rows):
        loss = 10 * (rows.x * (w - w.detach()))
        return loss, {"loss": loss.detach()}

    result = update(
        [w], torch.optim.SGD([w], 0.5), batch, replay, epochs=1, minibatches=4, micro_batch=lambda work: work(1),
        max_grad_norm=float("inf"), generator=torch.Generator().manual_seed(0),
        may_step=lambda *args: skips.may_step(6, PROMPTS, *args),
    )  # fmt: skip
    assert float(w) == -0.5 * 10 * (1 + 2 + 4)
    assert result["grad_norm"] == pytest.approx(10 * (1 + 2 + 4) / 3)
    assert skips.reasons == [f"iteration 7: {what} not finite; prompts: 12 'a square'"]


def test_a_loss_that_is_not_finite_is_caught_where_its_gradient_is():
    w = torch.nn.Parameter(torch.zeros(()))
    batch = Numbers(torch.ones(1), torch.tensor([1]), torch.zeros(1, dtype=torch.long))
    with pytest.raises(NonFinite, match=r"iteration 1: loss not finite; prompts: 11 'a cross'$"):
        update(
            [w], torch.optim.SGD([w], 0.5), batch, lambda rows: (w * rows.x + torch.inf, {"loss": rows.x * torch.inf}),
            epochs=1, minibatches=1, micro_batch=lambda work: work(1), max_grad_norm=1.0,
            generator=torch.Generator(), may_step=lambda *args: Skips(0).may_step(0, PROMPTS, *args),
        )  # fmt: skip
    assert float(w) == 0


def test_skips_in_a_row_are_limited_and_a_step_begins_anew():
    skips, one = Skips(2), Numbers(torch.zeros(1), torch.tensor([0]), torch.tensor([0]))
    may = lambda loss: skips.may_step(0, PROMPTS, one, [loss], 1.0)  # noqa: E731
    assert [may(value) for value in (torch.nan, torch.nan, 1.0, torch.nan, torch.nan)] == [False, False, True] + [
        False
    ] * 2
    with pytest.raises(NonFinite, match="2 steps in a row left out before"):
        may(torch.inf)


def test_three_prompts_are_named_and_the_others_counted():
    many = [Prompt("x" * 100, id=i) for i in range(9)]
    message = str(errors.non_finite("latents", many, [8, 1, 1, 0, 5, 7]))
    assert message == f"latents not finite; prompts: 0 '{'x' * 60}', 1 '{'x' * 60}', 5 '{'x' * 60}' and 2 more"


SUM = Sum()


class Given:
    names, card = ("value",), Card("given")

    def __init__(self, values):
        self.values = values

    def __call__(self, images, prompts):
        return Scores(self.names, torch.tensor(self.values)[:, None])


def combined(values, weights, rule=SUM, reference=None):
    """The judgement of three trajectories of three prompts, their tree and the prompts."""
    paths = sampled(plans.sde(torch.linspace(1, 0, 5), FlowSde()), 3, 3)
    combination = Combination(weights, rule, reference=reference)
    scored = score(paths.finals, PROMPTS, {"given": Given(values)})
    return judge(paths, scored, (8, 8), combination), paths.tree, PROMPTS


def test_rewards_that_are_not_finite_are_named_and_failed_scores_are_not():
    with pytest.raises(NonFinite, match=r"^scores of given not finite; prompts: 11 'a cross'$"):
        combined([0.5, -torch.inf, torch.nan], {"given.value": 1.0})
    finite.check_rewards(*combined([0.5, 1.0, torch.nan], {"given.value": 1.0}))
    with pytest.raises(NonFinite, match=r"^combined rewards not finite; prompts: 12 'a square'$"):
        finite.check_rewards(*combined([0.5, 1.0, 3e38], {"given.value": 2.0}))
    with pytest.raises(Failed, match=r"combine: product: .* at least 0, got -1"):
        combined([0.5, 1.0, -1.0], {"given.value": 1.0}, Product())


# ---------------------------------------------------------------------------------------------------------- KL budget


def test_the_kl_budget_is_measured_without_a_trace_and_ends_the_run_where_it_is_spent(settings, tmp_path):
    plain = run(settings, iterations=5)
    free = run(settings, iterations=5, max_kl=1e6, out=str(tmp_path / "free"))
    for kind in ("adapter", "ema", "optimizer"):
        one, two = (checkpoint.read(out / "checkpoints/000005")[0][kind] for out in (plain, free))
        assert all(torch.equal(one[name], two[name]) for name in one)
    measured = rows(free / "metrics.jsonl")
    kl = [row["kl"] for row in measured]
    assert kl[0] == 0 < kl[1]  # of the adapter before the step
    assert all(
        row["replay_forwards"] == 2 * other["replay_forwards"]
        for row, other in zip(measured, rows(plain / "metrics.jsonl"), strict=True)
    )
    where = next(i for i in (2, 3) if kl[i] > max(kl[:i]))
    changed = dict(iterations=5, max_kl=(kl[where] + max(kl[:where])) / 2, out=str(tmp_path / "ended"))
    out = run(settings, **changed)
    assert [row["kl"] for row in rows(out / "metrics.jsonl")] == kl[: where + 1]
    assert checkpoint.latest(out / "checkpoints").name == f"{where + 1:06d}"
    assert rows(out / "evaluations.jsonl")[-1]["name"] == "after"
    reported = report.summary(out)["alarms"]
    assert [(row["alarm"], row["iteration"]) for row in reported] == [("max_kl", where + 1)]
    again = run(settings, resume=True, **changed)
    assert len(rows(again / "metrics.jsonl")) == where + 1
    assert report.summary(again)["alarms"] == reported


# -------------------------------------------------------------------------------------------------------------- alarms

CONFIG = configs.build(
    dict(plan="sde", seeds=2, credit="terminal", rewards={"shapes.strict": 1.0}, watch=["jpeg_size"]), "test"
)


def healthy(count=60):
    """A run that learns: its numbers move as those of real runs do."""
    return [
        {
            "iteration": i + 1, "dead_groups": 0.25 + 0.5 * (i % 3 == 0), "skipped": 0, "kl": 1e-4,
            "grad_norm": 1.0 + 0.05 * i + 0.3 * (i % 3),
            "diversity": 0.2 - 0.001 * i + 0.01 * (i % 2), "part/shapes.strict": 0.5 + 0.004 * i,
        }
        for i in range(count)
    ]  # fmt: skip


def evaluated(watched, strict=None):
    """An evaluation every 5 iterations, with those before and after, which are of other images."""
    count = len(watched)
    strict = strict or [0.5 + 0.01 * k for k in range(count)]
    between = [
        {"iteration": 5 * (k + 1), "name": None, "shapes.strict": strict[k], "jpeg_size.kilobytes": watched[k]}
        for k in range(count)
    ]
    ends = [
        {"iteration": i, "name": name, "shapes.strict": 0.0, "jpeg_size.kilobytes": 99.0}
        for i, name in ((0, "before"), (5 * count + 5, "after"))
    ]
    return [ends[0], *between, ends[1]]


def agreeing(*shares, pairs=400):
    name = "shapes.strict~jpeg_size.kilobytes"
    return [
        {"iteration": 5 * k, "name": "before" if k == 0 else None, f"agrees/{name}": share, f"pairs/{name}": pairs}
        for k, share in enumerate(shares)
    ]


def traded(row):
    return [{"iteration": 0, "name": "before"}, {"iteration": 20, "name": None} | row]


def fired(metrics, evaluations=()):
    return {name for name, alarm in alarms.ALARMS.items() if alarm(CONFIG, metrics, evaluations)}


def changed(last, **values):
    """A healthy run whose last rows have other values."""
    metrics = healthy()
    return metrics[:-last] + [row | values for row in metrics[-last:]]


def test_each_alarm_fires_on_its_own_series_alone():
    rising, falling = [2 + 0.1 * k for k in range(8)], [2 - 0.1 * k for k in range(8)]
    assert fired(healthy(), evaluated(rising)) == set()
    assert all(fired(healthy()[:n]) == set() for n in range(60))
    assert fired(changed(5, grad_norm=0.0)) == {"zero_gradient"}
    assert fired(changed(4, grad_norm=0.0)) == set()
    assert fired(changed(5, skipped=1, grad_norm=0.0)) == set()  # reported as skips
    with_one_dead = changed(6, grad_norm=0.0)
    with_one_dead[-3]["dead_groups"] = 1.0
    assert fired(with_one_dead) == {"zero_gradient"}
    assert fired(changed(5, dead_groups=1.0, grad_norm=None)) == {"constant_reward"}
    assert fired(changed(5, dead_groups=0.99)) == set()
    assert fired(changed(5, diversity=0.09)) == {"lost_diversity"}
    assert fired(changed(5, diversity=0.11)) == set()
    assert fired(changed(5, grad_norm=8.5)) == {"outgrown"}
    assert fired(changed(5, grad_norm=8.0)) == set()
    assert fired(healthy(), evaluated(falling)) == {"hacking"}
    assert fired(healthy(), evaluated(rising, strict=falling)) == {"hacking"}  # held out itself
    flat = changed(60, **{"part/shapes.strict": 0.5})
    assert fired(flat, evaluated(falling)) == set()
    assert fired(healthy(), evaluated(falling[:4])) == set()  # too few to tell
    assert fired(healthy(), evaluated([*falling[:4], *rising[4:]])) == set()
    with_a_step_back = [2.0, 1.9, 1.8, 1.7, 1.75, 1.6, 1.5, 1.4]
    assert fired(healthy(), evaluated(with_a_step_back)) == {"hacking"}
    fallen = {"rise/jpeg_size.kilobytes": -0.1, "p/jpeg_size.kilobytes": 0.019, "size/jpeg_size.kilobytes": -0.25}
    risen = {"rise/shapes.strict": 0.1, "p/shapes.strict": 0.019}
    assert fired(healthy(), traded(risen | fallen)) == {"traded"}
    assert fired(healthy(), traded(risen | fallen | {"refresh": 20})) == set()  # scores of another reward
    assert fired(healthy(), traded(risen | fallen | {"p/jpeg_size.kilobytes": 0.021})) == set()  # that may be chance
    assert fired(healthy(), traded(risen | fallen | {"size/jpeg_size.kilobytes": -0.24})) == set()
    assert fired(healthy(), traded(risen | fallen | {"rise/shapes.strict": -0.1})) == set()  # a bad run, not a trade
    assert fired(healthy(), agreeing(0.8, 0.75, 0.65)) == {"disagreement"}
    assert fired(healthy(), agreeing(0.8, 0.65, 0.72)) == set()  # less than 0.1 below
    assert fired(healthy(), agreeing(0.8, 0.65, pairs=30)) == set()  # that may be chance
    records = [
        {"iteration": i + 1, "grad_norm": 1.0 + 0.05 * i + 0.3 * (i % 3), "reward": 0.5, "skipped": 0}
        for i in range(60)
    ]
    assert fired(records, evaluated(falling)) == set()


def test_an_alarm_is_told_once_also_by_a_run_that_is_resumed(tmp_path):
    message = []
    for start, end in ((0, 7), (7, 20)):
        watch = alarms.Watch(CONFIG, tmp_path, message.append)
        for i in range(start, end):
            row = healthy(20)[i] | {"dead_groups": 1.0}
            files.append(tmp_path / "metrics.jsonl", row)
            watch.look(row, [])
    assert len(message) == 1
    assert message[0].startswith(
        "alarm after iteration 5, constant_reward: siblings got the same reward in every group"
    )
    assert [(row["iteration"], row["alarm"]) for row in rows(tmp_path / "alarms.jsonl")] == [(5, "constant_reward")]
    assert not watch.ended
