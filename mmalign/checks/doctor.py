"""Sanity checks with known answers, run on the user's config and model before time is spent.

The checks take one small iteration of the config apart: its rollout, judgement, update and checkpoint. They leave
nothing behind: neither the run's folder nor the model's files are touched. What is compared, and with what:

| check | must be |
|---|---|
| untouched | a fresh adapter changes no bit of the velocity: KL 0 to the model without it |
| many steps | the model was not distilled to a few steps, to which noise in between is foreign |
| times | float32, from 1 down to 0, those of the stock pipeline |
| ODE | the images of the stock pipeline's own loop, same seeds and guidance |
| prompts | two prompts give two images |
| seeds | siblings begin from different noises, and different draws lead to different states |
| zero noise | the kernel without noise is the ODE's step, to the bit |
| ratio | replayed log-densities are those of the rollout, so that the ratio is 1 before the first step |
| guidance | replay evaluates the network as often for a row as the rollout did, and gets the same velocity |
| gradient | every adapter matrix that can act gets one, and nothing else |
| KL gradient | the divergence to the reference pulls (where `beta` is not 0) |
| graph | decoding in a graph gives the images of decoding, and the adapter a gradient (objective `backprop`) |
| judged as shown | an image judged in its batch scores as it does alone with its own prompt |
| a failure | an image that cannot be scored is NaN, neither a number nor an exception |
| ... | and what `reward_models.tools.examine` asks of each scorer |
| group spread | siblings differ in reward |
| average | the averaged adapter moves by `1 - ema` of the way |
| checkpoint | a saved state is restored to the bit |
| memory, disk | there is room |

Because a fresh adapter is the identity (B = 0), it is perturbed after the first three checks.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.config.schema import Config
from mmalign.credit.groups import dead
from mmalign.evaluation import generate
from mmalign.flow import kernels, plan as plans
from mmalign.flow.sample import sample
from mmalign.learn.update import update
from mmalign.objectives.replay import transitions
from mmalign.policy.protocol import Inspectable, MayBeDistilled, Stock
from mmalign.rewards.judge import score
from mmalign.training import saving
from mmalign.training.rollout import Rollout, judged, sample_and_score
from mmalign.training.session import Session
from mmalign.training.setup import open_session
from mmalign.types import Judgement, Transitions, Tree
from reward_models import Prompt
from reward_models.tools import examine as health
from reward_models.tools.examine import Check

BOUND = 0.1  # of the clip range: what replay may be off by in log-density
CLIP = 1e-4  # the clip range of a loss that has none
GRAPH = {"float32": 1e-4, "bfloat16": 0.05}  # what pixels may be off by between decoding with and without a graph
STOCK = {"float32": 1e-3, "bfloat16": 0.1}  # of the difference between images: what ODE sampling may be off by
MOVED = 0.02  # size of the disturbance of the adapter's matrices
GIB = 2**30


@dataclass(frozen=True)
class Bench:
    """A small iteration, taken apart."""

    run: Session
    rollout: Rollout
    judged: Judgement

    @property
    def tree(self) -> Tree:
        return self.rollout.tree

    @property
    def steps(self) -> Transitions:
        """Its stochastic steps, with advantages that are not 0."""
        std = self.tree.std
        batch = transitions(self.rollout.paths, torch.ones(*std.shape, 1, 1, device=std.device))
        signs = torch.ones_like(batch.advantage)
        signs[1::2] = -1
        return replace(batch, advantage=signs)


def examine(c: Config) -> Iterator[Check]:
    """The findings, as they come. Raises BadInput for what keeps the config from being opened at all."""
    with tempfile.TemporaryDirectory() as folder:
        run = open_session(small(c, Path(folder)))
        prompts = run.prompts.all[: max(2, run.config.prompts_per_iteration)]
        for check in (many_steps, untouched, stock, prompted):
            yield from check(run, prompts)
        if c.records:
            yield Check("rollout", None, "records are learnt from; nothing is sampled")
        else:
            disturb(run)
            yield from _of_rollout(run)
        for check in (averaged, saved):
            yield from check(run)
        yield from room(run, Path(c.out))


def small(c: Config, out: Path) -> Config:
    """The same with few prompts and siblings, in another folder; enough that hardly ever all rewards are the same."""
    prompts, seeds = (2, 2) if c.plan.children > 1 else (4, 4)
    change = {"prompts_per_iteration": min(prompts, c.prompts_per_iteration), "seeds": min(seeds, c.seeds)}
    return c.model_copy(update=change | {"out": str(out / "run"), "rollout_parts": 1, "cache": None})


def disturb(run: Session) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in run.policy.parameters():
            p.add_(MOVED * torch.randn(p.shape, generator=generator).to(p))


def _of_rollout(run: Session) -> Iterator[Check]:
    rollout = sample_and_score(run, run.prompts(0), 0, whole=True)
    verdict = judged(run, rollout, 0)
    if run.step_rewards is not None:
        verdict = replace(verdict, process=run.step_rewards.of(run, rollout, run.step_rewards.steps(run, rollout)))
    bench = Bench(run, rollout, verdict)
    of_steps = (zero_noise, ratio, guidance, gradient, kl_gradient) if run.config.objective.stochastic else ()
    for check in (seeds, *of_steps):
        yield from check(bench)
    for check in (graph, pixels, judged_as_shown, rewards, group_spread):
        yield from check(bench)


# --------------------------------------------------------------------------------------- the model as it was loaded


def _velocity(run: Session, texts: list[str]) -> Tensor:
    cond, count = run.policy.encode(texts), len(texts)
    start, _ = generate.initial_noise(run.policy, [[i] for i in range(count)])
    t = torch.linspace(0.9, 0.1, count, device=run.policy.device)
    with torch.no_grad():
        return run.policy.velocity(start, t, cond, torch.arange(count, device=run.policy.device))


def many_steps(run: Session, prompts: list[Prompt]) -> Iterator[Check]:
    """A model that was distilled to a few steps jumps from noise to image. Neither the noise of an SDE nor the error of
    flow matching belongs to what it has learnt: the authors of TDM-R1 (arXiv 2603.07700) advise against losses of that
    kind on its generator."""
    reason = run.policy.distilled() if isinstance(run.policy, MayBeDistilled) else None
    if reason is not None:
        yield Check(
            "many steps", False, f"distilled to a few steps, by {reason}",
            "train the model that it was distilled from; of the objectives only backprop (way: last, plan: ode) "
            "adds no noise, and it was not tried there",
        )  # fmt: skip


def untouched(run: Session, prompts: list[Prompt]) -> Iterator[Check]:
    texts = [p.text for p in prompts]
    on = _velocity(run, texts)
    with run.policy.reference():
        off = _velocity(run, texts)
    worst = float((on - off).abs().max())
    yield Check(
        "untouched", worst == 0, f"largest change of the velocity {worst:.3g}",
        "the adapter must begin as nothing; is another one still on, or dropout?",
    )  # fmt: skip


def stock(run: Session, prompts: list[Prompt]) -> Iterator[Check]:
    """Times and images against the stock pipeline."""
    policy, c = run.policy, run.config
    if not isinstance(policy, Stock):
        yield Check("ODE", None, "the policy has no stock pipeline to compare with")
        return
    texts, numbers = [p.text for p in prompts[:2]], [0, 1]
    theirs = policy.stock_images(texts, numbers, c.steps)
    walked = policy.pipe.scheduler.sigmas.float().cpu()
    times = run.times
    off = float((times.double() - walked.double()).abs().max()) if len(times) == len(walked) else float("inf")
    yield Check(
        "times", times.dtype == torch.float32 and off < 1e-6, f"{times.dtype}, off by {off:.3g}".replace("torch.", ""),
        "the schedule is not the pipeline's: shift, size or number type differ",
    )  # fmt: skip
    start, owner = generate.initial_noise(policy, [[seed] for seed in numbers])
    ends = [p.finals for p in generate.trajectories(policy, prompts[:2], start, owner, times, c.batch)]
    ours = policy.decode(torch.cat(ends)).cpu()
    apart = float(_rms(theirs[0] - theirs[1]))
    share = float(_rms(ours - theirs)) / max(apart, 1e-9)
    yield Check(
        "ODE", share <= STOCK[c.precision],
        f"off the stock pipeline's images by {share:.2g} of what two images differ by",
        "sampling is not the pipeline's: look at guidance, negatives, shift, packing and the autoencoder's scaling",
    )  # fmt: skip


def _rms(difference: Tensor) -> Tensor:
    return difference.square().mean().sqrt()


def prompted(run: Session, prompts: list[Prompt]) -> Iterator[Check]:
    policy = run.policy
    start, _ = generate.initial_noise(policy, [[0]])
    index, texts = torch.arange(2, device=policy.device), [p.text for p in prompts[:2]]
    two = sample(policy.velocity, start.repeat(2, 1, 1, 1), policy.encode(texts), index, plans.ode(run.times)).finals
    share = float(_rms(two[0] - two[1]) / _rms(two))
    yield Check(
        "prompts", share > 1e-3, f"two prompts from one noise differ by {share:.2g} of the latent",
        "the text does not reach the network",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- rollout


def seeds(bench: Bench) -> Iterator[Check]:
    """Of every pair of states at one step: the same number, the same state; another number, another state."""
    paths, tree, twins = bench.rollout.paths, bench.tree, 0
    starts = paths.x[:, 0].flatten(1)
    begun = torch.stack([tree.prompt, tree.member], 1).unique(dim=0)
    twins += len(begun) - len(starts.unique(dim=0))
    for k in range(1, paths.x.shape[1]):
        twins += len(tree.node[:, k].unique()) - len(paths.x[:, k].flatten(1).unique(dim=0))
    count = len(tree.node[:, -1].unique())
    yield Check(
        "seeds", twins == 0, f"{count} images from {len(begun)} noises, {twins} states that should differ do not",
        "siblings share their noise: seeds must depend on prompt, member and step",
    )  # fmt: skip


def zero_noise(bench: Bench) -> Iterator[Check]:
    b, c = bench.steps, bench.run.config
    with torch.no_grad():
        v = bench.run.policy.velocity(b.x, b.t, bench.rollout.cond, b.index)
    still, std = c.kernel.step(b.x, v, b.t, b.s, torch.zeros_like(b.noise), bench.rollout.paths.t_max)
    off = float((still - kernels.ode(b.x, v, b.t, b.s)[0]).abs().max()) + float(std.abs().max())
    yield Check("zero noise", off == 0, f"off the ODE's step by {off:.3g}", "the kernel's mean is not the ODE's")


def _replayed(bench: Bench, batch: Transitions) -> tuple[dict[str, float], list[Tensor | None]]:
    """Statistics and gradients of one replay, in the run's batches; nothing is stepped."""
    run, c, parameters = bench.run, bench.run.config, bench.run.policy.parameters()
    advantage = c.advantage(bench.tree, bench.judged, c.credit.at(0.0), c.mask, c.dead_spread)
    objective = next(part for part in c.objective.summands if part.stochastic)
    replay = objective.batch(run, bench.rollout, bench.judged, advantage, 0).replay
    statistics = update(
        parameters, torch.optim.SGD(parameters, 0.0), batch, replay, epochs=1, minibatches=1,
        micro_batch=run.learner.micro_batch, max_grad_norm=float("inf"), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return statistics, gradients


def ratio(bench: Bench) -> Iterator[Check]:
    c, b = bench.run.config, bench.steps
    statistics, _ = _replayed(bench, b)
    mean, clip = statistics.get("log_ratio", float("nan")), getattr(c.loss, "clip", CLIP)
    with torch.no_grad():
        parts = torch.arange(len(b), device=b.x.device).split(bench.run.learner.micro_batch.rows)
        v = torch.cat([bench.run.policy.velocity(b.x[i], b.t[i], bench.rollout.cond, b.index[i]) for i in parts])
    again, std = c.kernel.step(b.x, v, b.t, b.s, b.noise, bench.rollout.paths.t_max)
    off = float(kernels.log_ratio(b.y, again, b.mean, std).mean((1, 2)).abs().max())
    worst = max(off, abs(mean))
    yield Check(
        "ratio", worst <= BOUND * clip, f"log-density off by {worst:.3g} at most; clip is {clip:g}",
        "rollout and replay differ: precision, attention back end, guidance, or states that were rounded after their "
        "density was taken; in bfloat16 a wider clip, or float32",
    )  # fmt: skip


def guidance(bench: Bench) -> Iterator[Check]:
    """Forwards a row, and velocities, with and without gradients."""
    run, b = bench.run, bench.steps[slice(0, 4)]
    forwards, velocities = [], []
    for graded in (False, True):
        before = run.policy.counts["forwards"]
        with torch.set_grad_enabled(graded):
            velocities.append(run.policy.velocity(b.x, b.t, bench.rollout.cond, b.index).detach())
        forwards.append((run.policy.counts["forwards"] - before) / len(b))
    off = float(_rms((velocities[0] - velocities[1]).float()) / _rms(velocities[0].float()))
    yield Check(
        "guidance", forwards[0] == forwards[1] and off < (1e-5 if run.config.precision == "float32" else 0.02),
        f"{forwards[0]:g} and {forwards[1]:g} forwards a row, velocities {off:.2g} apart",
        "rollout and replay must use the same guidance",
    )  # fmt: skip


def gradient(bench: Bench) -> Iterator[Check]:
    policy, inspected = bench.run.policy, isinstance(bench.run.policy, Inspectable)
    _, gradients = _replayed(bench, bench.steps)
    names = policy.adapter_names() if inspected else [*policy.adapter()]
    idle = [name for name, g in zip(names, gradients, strict=True) if g is None or not bool(g.any())]
    unused = policy.unused(bench.rollout.paths.x[:1, 0], bench.rollout.cond) if inspected else []
    lost = [name for name in idle if not any(name.startswith(layer + ".") for layer in unused)]
    extra = policy.trained_besides() if inspected else []
    result = f"{len(names) - len(idle)} of {len(names)} matrices"
    if len(idle) > len(lost):
        result += f", {len(idle) - len(lost)} in layers whose output the model does not use"
    result += f"; none at {lost[0]}" if lost else ""
    result += f"; {extra[0]} is trained too" if extra else ""
    yield Check(
        "gradient", len(idle) < len(names) and not lost and not extra, result,
        "lora_targets must name layers the loss depends on, with the adapter on, and all else must be frozen",
    )  # fmt: skip


def kl_gradient(bench: Bench) -> Iterator[Check]:
    if not any(part.stochastic and part.reference for part in bench.run.config.objective.summands):
        return
    b = bench.steps
    statistics, gradients = _replayed(bench, replace(b, advantage=torch.zeros_like(b.advantage)))
    pull = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
    yield Check(
        "KL gradient", statistics["kl"] > 0 and pull > 0, f"KL {statistics['kl']:.3g}, gradient {pull:.3g}",
        "the divergence to the reference does not pull: is it detached?",
    )  # fmt: skip


def graph(bench: Bench) -> Iterator[Check]:
    """For an objective whose gradient goes through the reward."""
    run, c, parameters = bench.run, bench.run.config, bench.run.policy.parameters()
    objective = next((part for part in c.objective.summands if part.decoded), None)
    if objective is None:
        return
    latents = bench.rollout.paths.finals[:2]
    off = float((run.policy.decode_in_graph(latents).detach() - run.policy.decode(latents)).abs().max())
    batch = objective.batch(run, bench.rollout, bench.judged, None, 0)
    losses, _ = batch.replay(batch.rows[:2])
    gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    reached = sum(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
    yield Check(
        "graph", off <= GRAPH[c.precision] and reached > 0,
        f"images off those of decoding by {off:.2g}; gradient in {reached} of {len(gradients)} matrices",
        "a part of decoder or scorer is detached, or rounds; or the ceiling is below all rewards",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- rewards


def pixels(bench: Bench) -> Iterator[Check]:
    images = bench.rollout.images
    low, high, spread = float(images.min()), float(images.max()), float(images.std())
    good = bool(images.isfinite().all()) and low >= 0 and high <= 1 and spread > 1e-3
    yield Check("images", good, f"pixels {low:.2f} to {high:.2f}, spread {spread:.2g}", "the autoencoder's scaling")


def judged_as_shown(bench: Bench) -> Iterator[Check]:
    """Rewards of the finished trajectories, against each one's image alone with its own prompt."""
    run, judgement, off = bench.run, bench.judged, {}
    for name in run.config.trained:
        scorer = run.rewards.scorers[name]
        if scorer.card.groupwise:
            continue
        for i, (end, p) in enumerate(zip(bench.tree.final[:, -1].tolist(), bench.tree.prompt.tolist(), strict=True)):
            alone = score(bench.rollout.images[end : end + 1], [bench.rollout.prompts[p]], {name: scorer})
            for part, value in alone.parts.items():
                one, two = float(value[0]), float(judgement.parts[part][i])
                far = abs(one - two) if one == one and two == two else float(one == one or two == two)
                off[part] = max(off.get(part, 0.0), far / max(1.0, abs(one) if one == one else 1.0))
    worst = max(off, key=off.get, default=None)
    if worst is not None:
        yield Check(
            "judged as shown", off[worst] < 1e-3, f"largest difference {off[worst]:.2g} ({worst})",
            "images and prompts are mixed up, or the scorer looks at its neighbours or does not repeat itself",
        )  # fmt: skip


def rewards(bench: Bench) -> Iterator[Check]:
    prompts = [bench.rollout.prompts[i] for i in bench.tree.owner.tolist()]
    for name in bench.run.config.trained:
        scorer = bench.run.rewards.scorers[name]
        yield replace(failing(scorer, bench.rollout.images, prompts), check=f"{name}: a failure")
        for check in health.examine(scorer, bench.rollout.images, prompts):
            always = check.check in ("answers", "spread", "repeats", "neighbours")
            of_prompts = check.check == "sees the image: noise" and scorer.card.sees_prompt
            if always or of_prompts:
                yield replace(check, check=f"{name}: {check.check}")


def failing(scorer, images: Float[Tensor, "E 3 H W"], prompts: list[Prompt]) -> Check:
    """An image that is not a number cannot be scored."""
    advice = "return NaN with a reason (Scores.failures), never 0 and never an exception for one image"
    spoilt = images[:2].clone()
    spoilt[0] = torch.nan
    try:
        value = scorer(spoilt, prompts[:2]).values[0]
    except Exception as error:  # whatever a user's scorer raises is the finding
        return Check("", False, f"raises {type(error).__name__}: {str(error)[:120]}", advice)
    scores = ", ".join(f"{v:g}" for v in value.tolist())
    return Check("", bool(value.isnan().all()), f"an image of NaN scores {scores}", advice)


def group_spread(bench: Bench) -> Iterator[Check]:
    shown = bench.judged.reward[:, -1].flatten(1) if bench.judged.reward.ndim > 2 else bench.judged.reward[:, -1:]
    alive = dead(shown[:, 0], bench.tree.prompt, bench.run.config.dead_spread).mean()
    share = 1 - float(alive)
    yield Check(
        "group spread", share > 0, f"{share:.0%} of the trajectories are in groups whose rewards differ",
        "a constant reward carries no gradient: another reward, more noise, or harder prompts",
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- the saved state, and room


def averaged(run: Session) -> Iterator[Check]:
    before, now = (
        {name: v.clone() for name, v in run.learner.ema.items()},
        {n: v + 1 for n, v in run.policy.adapter().items()},
    )
    adapter = run.policy.adapter()
    run.policy.load_adapter(now)
    run.learner.average(0)
    run.policy.load_adapter(adapter)
    decay = run.config.ema
    off = max(float((run.learner.ema[n] - (decay * before[n] + (1 - decay) * now[n])).abs().max()) for n in before)
    yield Check("average", off < 1e-5, f"off by {off:.2g}", "the averaged adapter, which is exported, does not follow")


def saved(run: Session) -> Iterator[Check]:
    """Save, disturb, restore."""
    out = Path(run.config.out)
    before = {"adapter": run.policy.adapter(), "ema": {name: v.clone() for name, v in run.learner.ema.items()}}
    saving.save(run, out, 1)
    disturb(run)
    for value in run.learner.ema.values():
        value.add_(1)
    done = saving.restore(run, out, lambda message: None)
    after = {"adapter": run.policy.adapter(), "ema": run.learner.ema}
    same = all(torch.equal(before[kind][n], after[kind][n]) for kind in before for n in before[kind])
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    yield Check("checkpoint", same and done == 1, f"{size / 2**20:.1f} MiB, back to the bit: {same}", "see `out`")


def room(run: Session, out: Path) -> Iterator[Check]:
    device = run.policy.device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        most = torch.cuda.max_memory_allocated(device)
        used, where = most + (total - free) - torch.cuda.memory_reserved(device), "GPU"
    else:
        total, used, where = psutil.virtual_memory().total, psutil.Process().memory_info().rss, "main memory"
    yield Check(
        "memory", used < 0.95 * total, f"{used / GIB:.1f} of {total / GIB:.1f} GiB of {where} at most so far",
        "gradient_checkpointing, offload, quantize, precision: bfloat16, or smaller batches",
    )  # fmt: skip
    size = sum(v.numel() * v.element_size() for v in run.learner.ema.values()) * 6
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    advice = "a checkpoint needs room beside the last"
    yield Check("disk", free > 10 * size + GIB / 4, f"{free / GIB:.1f} GiB free", advice)


def page(c: Config, checks: list[Check]) -> str:
    """The report, on one page of Markdown."""
    bad = sum(check.good is False for check in checks)
    lines = [f"# {c.model}", "", f"{len(checks)} checks, {bad} bad." if bad else f"{len(checks)} checks, none bad.", ""]
    return "\n".join([*lines, *health.table(checks)]) + "\n"
