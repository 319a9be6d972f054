"""A value head: what image a state will become, by features that the rollout's forwards compute anyway.

The head regresses the reward of the finished image on the features of each state on the way to it, both as differences
from the mean of their group at that step, with a spread that depends on the time: `L = (R - u)^2 / (2 s^2) + log s`,
`s^2 = a t + b`, a and b learnt (DiNa-LRM's noise-dependent variance, arXiv 2602.11146). Early states say little, and so
count little. Centred, a prompt's features, which all of its images share, can explain nothing; uncentred, the head
learns training prompts by heart. A share of 0.3 of the features is hidden from it at random while it learns.

Each iteration is judged before the head learns from it: what it explains of rewards is measured on trajectories that it
has not learnt from, all of them, so that no group has to be held out. The global batch is gathered, and every rank fits
the same head to it.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmalign.config.paths import locate
from mmalign.credit.groups import dead, group_mean
from mmalign.credit.more.density import of_ends
from mmalign.credit.more.value import Value
from mmalign.distributed.processes import Ranks
from mmalign.errors import BadInput
from mmalign.policy.protocol import Observable
from mmalign.runs import adapters, optimizer_state, state as states
from mmalign.seeds import seed_of
from mmalign.types import Judgement, Rows, Trajectories, Tree

MEMORY = 0.9  # of the running sums of explained variance, per iteration
LEAST = 1e-3  # of s^2, in units of the reward's variance within groups
BATCH = 24  # groups of states of an optimiser step: siblings at one step
HIDDEN = 0.3  # share of the features, and of the hidden layer, that is hidden in a fit
NONNEGATIVE = ("count", "square", "variance", "left", "total", "t", "group", "exp_avg_sq", "step")
DECAY = 0.1  # weight decay


class Head(nn.Module):
    """One hidden layer over standardised features and the time; `unit` is that of its output, in rewards."""

    def __init__(self, features: int, width: int, blocks: tuple[int, ...] | None, seed: int):
        super().__init__()
        self.blocks = blocks
        self.hidden, self.out = nn.Linear(features + 1, width), nn.Linear(width, 1)
        self.spread = nn.Parameter(torch.zeros(2))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (self.hidden.bias, self.out.weight, self.out.bias):
                parameter.zero_()
            self.hidden.weight.normal_(0, (features + 1) ** -0.5, generator=generator)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros((), dtype=torch.float64))

    @property
    def unit(self) -> Tensor:
        return self.variance.sqrt().float()

    def observed(self, policy: Observable) -> AbstractContextManager[Any]:
        """The features that it reads (`mmalign.policy.protocol.Observable`)."""
        return policy.observed(self.blocks)

    def check(self, policy: Any) -> None:
        """ValueError unless the policy shows the features that it reads."""
        if not isinstance(policy, Observable):
            raise ValueError(f"a {type(policy).__name__} shows no features (observed), which a value head reads")
        width = width_of(policy, self.blocks)
        if width != len(self.mean):
            raise ValueError(f"the value head reads {len(self.mean)} features, and this model shows {width}")

    def standardise(self, features: Float[Tensor, "M F"], target: Float[Tensor, "M"]) -> None:
        """Move mean and spread of features, and the spread of rewards, to those of all states so far."""
        count = self.count + len(features)
        for running, values in (
            (self.mean, features.double().sum(0)),
            (self.square, features.double().square().sum(0)),
            (self.variance, target.double().square().sum()),
        ):
            running.mul_(self.count / count).add_(values / count)
        self.count.copy_(count)

    def forward(
        self, features: Float[Tensor, "M F"], t: Float[Tensor, "M"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "M"]:
        """What is expected, in units of `unit`; with a generator some features are hidden at random."""
        spread = (self.square - self.mean**2).clamp(min=1e-12).sqrt()
        x = hidden(((features.double() - self.mean) / spread).float().clamp(-10, 10), generator)
        y = nn.functional.silu(self.hidden(torch.cat([x, t[:, None]], 1)))
        return self.out(hidden(y, generator))[:, 0]

    @torch.no_grad()
    def value(self, features: Float[Tensor, "M F"], t: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
        """What is expected, in the reward's unit, up to a number that the images of a prompt share."""
        return self(features, t) * self.unit

    def loss(self, states: "States", generator: torch.Generator | None = None) -> Tensor:
        """The mean negative log-likelihood of rewards in units of `unit`; a generator hides features as `forward`."""
        a, b = nn.functional.softplus(self.spread)
        variance = a * states.t + b + LEAST
        u = self(states.features, states.t, generator)
        u = u - group_mean(u, states.group)
        return ((states.target / self.unit - u).square() / variance + variance.log()).mean() / 2


def hidden(x: Float[Tensor, "M F"], generator: torch.Generator | None) -> Float[Tensor, "M F"]:
    """Numbers of which a share is hidden (dropout)."""
    if generator is None:
        return x
    return x * (torch.rand(x.shape, generator=generator) >= HIDDEN) / (1 - HIDDEN)


@dataclass(frozen=True)
class States(Rows):
    """States on the way to images with a reward: features, times, the reward's difference from its group's mean, and
    the `group`, whose members are siblings at one step."""

    features: Float[Tensor, "M F"]
    t: Float[Tensor, "M"]
    target: Float[Tensor, "M"]
    group: Int[Tensor, "M"]


class Values:
    """The head of a run, its optimiser, the `past` states that are learnt from again, and by step the running sums of
    squares that it has left unexplained and that there were."""

    def __init__(self, settings: Value, features: int, steps: int, seed: int):
        self.settings, self.seed = settings, seed
        self.head = Head(features, settings.width, settings.blocks, seed_of(seed, "value head"))
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=settings.learning_rate, weight_decay=DECAY, foreach=False
        )
        self.past: list[States] = []
        self.left, self.total = torch.zeros(2, steps, dtype=torch.float64)

    @property
    def explained(self) -> Float[Tensor, "T"]:
        """The share of the variance within groups that the head has explained at each step, on trajectories before it
        has learnt from them; NaN where rewards have not differed yet."""
        return 1 - self.left / self.total

    def trusted(self, iteration: int) -> Bool[Tensor, "T"]:
        """Whether the head is to be trusted at each step in an iteration."""
        return (self.explained > self.settings.floor) & (iteration >= self.settings.warmup)

    def judge(
        self, tree: Tree, judged: Judgement, features: Float[Tensor, "N T F"], iteration: int
    ) -> tuple[Float[Tensor, "N T"], dict[str, float]]:
        """The values of an iteration's trajectories, NaN where they are not to be trusted, and a row for the metrics;
        then learn from them. The reward is that of finished images alone, where there is such, as its credit has it."""
        reward = of_ends(judged).reward[:, -1]
        values = self._values(tree, features, reward)
        trusted = self.trusted(iteration)
        target = reward - group_mean(reward, tree.prompt)
        self._measure(tree, values, target)
        row = {f"value/explained/{k}": float(share) for k, share in enumerate(self.explained)}
        row["value/trusted"] = float(trusted.double().mean())
        if bool((dead(reward, tree.prompt) == 0).any()):
            row |= self._learn(tree, features, target, iteration)
        shown = torch.full_like(values, torch.nan)
        width = len(trusted)
        shown[:, :width] = torch.where(trusted, values[:, :width], torch.nan)
        return shown, row

    def _values(self, tree: Tree, features: Float[Tensor, "N T F"], reward: Float[Tensor, "N"]) -> Float[Tensor, "N T"]:
        """What the head expects of each state, as a difference from its group's mean at that step."""
        t = tree.t[:, :-1]
        values = self.head.value(features.flatten(0, 1), t.flatten()).view(t.shape)
        values = values.masked_fill(reward.isnan()[:, None] | (t == 0), torch.nan)
        return values - group_mean(values, tree.prompt)

    def _measure(self, tree: Tree, values: Float[Tensor, "N T"], target: Float[Tensor, "N"]) -> None:
        for k in range(len(self.total)):
            rows = ~values[:, k].isnan()
            for sums, off in ((self.left, target[rows] - values[rows, k]), (self.total, target[rows])):
                sums[k] = MEMORY * sums[k] + off.double().square().sum()

    def _learn(
        self, tree: Tree, features: Float[Tensor, "N T F"], target: Float[Tensor, "N"], iteration: int
    ) -> dict[str, float]:
        """Fit the head to the states of this iteration and of those before."""
        rows, steps = ((tree.t[:, :-1] > 0) & ~target[:, None].isnan()).nonzero(as_tuple=True)
        group = tree.prompt[rows] * tree.steps + steps
        now = States(features[rows, steps], tree.t[rows, steps], target[rows], group)
        self.head.standardise(now.features, now.target)
        every = [*self.past, now]
        blocks = [(states, number) for states in every for number in states.group.unique().tolist()]
        generator = torch.Generator().manual_seed(seed_of(self.seed, "value head", iteration))
        losses = []
        for _ in range(self.settings.passes):
            for part in torch.randperm(len(blocks), generator=generator).split(BATCH):
                loss = self.head.loss(_together([blocks[i] for i in part.tolist()]), generator)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses.append(float(loss.detach()))
        self.past = every[-self.settings.replay :] if self.settings.replay else []
        return {"value/loss": sum(losses) / len(losses)}

    # ------------------------------------------------------------------------------------------------- in a checkpoint

    def tensors(self) -> dict[str, Tensor]:
        """All of its state, by name."""
        row = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        row |= {f"optimizer.{name}": value for name, value in optimizer_state.tensors(self.optimizer).items()}
        for i, past in enumerate(self.past):
            row |= {f"past.{i}.{name}": value for name, value in vars(past).items()}
        return row | {"left": self.left, "total": self.total}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`. ValueError, in one line, where they are not those of such a head."""
        fresh = Values(self.settings, len(self.head.mean), len(self.total), self.seed)
        expected = {f"head.{name}": value for name, value in fresh.head.state_dict().items()}
        expected |= {"left": fresh.left, "total": fresh.total}
        expected |= _moments(fresh) if any(name.startswith("optimizer.") for name in tensors) else {}
        past = len({name.split(".")[1] for name in tensors if name.startswith("past.")})
        if past > self.settings.replay:
            raise ValueError(f"states of {past} iterations, of which {self.settings.replay} are kept")
        for i in range(past):
            rows = len(tensors.get(f"past.{i}.t", torch.zeros(0)).flatten())
            shapes = {"features": (rows, len(self.head.mean)), "t": (rows,), "target": (rows,)}
            expected |= {f"past.{i}.{name}": torch.zeros(shape) for name, shape in shapes.items()}
            expected[f"past.{i}.group"] = torch.zeros(rows, dtype=torch.long)
        check(tensors, expected)
        self.head.load_state_dict(_under("head.", tensors))
        optimizer_state.load(self.optimizer, _under("optimizer.", tensors))
        names = ("features", "t", "target", "group")
        self.past = [States(*(tensors[f"past.{i}.{name}"].clone() for name in names)) for i in range(past)]
        self.left, self.total = tensors["left"].clone(), tensors["total"].clone()


def _together(blocks: list[tuple[States, int]]) -> States:
    """The states of some groups, numbered through."""
    parts = [states[states.group == number] for states, number in blocks]
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("features", "t", "target")}
    return States(**columns, group=torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts])))


def _moments(values: Values) -> dict[str, Tensor]:
    """The state that the optimiser has after a step."""
    for parameter in values.head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    values.optimizer.step()
    return {f"optimizer.{name}": value for name, value in optimizer_state.tensors(values.optimizer).items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.clone() for name, value in tensors.items() if name.startswith(prefix)}


def check(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """ValueError unless the tensors have the names, shapes and types of those `expected`, and are finite."""
    if odd := sorted(tensors.keys() ^ expected.keys()):
        raise ValueError(f"{odd[0]!r} is {'missing' if odd[0] in expected else 'not of a value head of this run'}")
    for name, value in tensors.items():
        if (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(f"{name} is {[*value.shape]} of {value.dtype}, not {[*expected[name].shape]}")
        least = 0.0 if name.rpartition(".")[2] in NONNEGATIVE else -torch.inf
        if not bool((value.isfinite() & (value >= least)).all()):
            raise ValueError(f"{name} is not finite, or below 0")


def saved_head(tensors: dict[str, Tensor], settings: Value) -> Head:
    """The head in a checkpoint's tensors. ValueError where there is none of these settings."""
    state = _under("head.", tensors)
    width = state.get("mean", torch.zeros(0)).numel()
    if not width:
        raise ValueError("no value head")
    head = Head(width, settings.width, settings.blocks, 0)
    check(state, head.state_dict())
    head.load_state_dict(state)
    return head


def read(run: Path) -> Head:
    """The head of a run's newest checkpoint, or of one of its checkpoints. BadInput where it has none."""
    c, path = adapters.saved(run)
    observer = c.credit and c.credit.observer
    if observer is None:
        raise BadInput(f"{run}: a run with credit: value is needed, whose checkpoints have a value head")
    tensors, _ = states.read(path)
    try:
        return saved_head(tensors.get("values", {}), observer)
    except ValueError as error:
        raise states.refused(path / "values.safetensors", str(error)) from None


def opened(c: Any, policy: Any) -> Values | None:
    """The value head of a config's credit, if it has one. ValueError where the policy shows no features."""
    observer = c.credit and c.credit.observer
    if observer is None:
        return None
    if not isinstance(policy, Observable):
        raise ValueError(f"credit: model {c.model!r} shows no features (observed); use another credit")
    return Values(observer, width_of(policy, observer.blocks), c.steps, c.seed)


def scouting(c: Any, policy: Any) -> Head | None:
    """The head that a config's scouts read of another run. ValueError where it does not suit the policy."""
    if c.scouts is None or c.scouts.by in ("reward", "value"):
        return None
    head = read(Path(locate(c.scouts.by)))
    head.check(policy)
    return head


@torch.no_grad()
def width_of(policy: Any, blocks: tuple[int, ...] | None) -> int:
    """The number of features, by a trial, which counts as no forward."""
    forwards = policy.counts["forwards"]
    x = torch.zeros(1, *policy.latent_shape, device=policy.device)
    t, index = torch.ones(1, device=policy.device), torch.zeros(1, dtype=torch.long, device=policy.device)
    with policy.observed(blocks) as features:
        policy.velocity(x, t, policy.encode([""]), index)
        width = features(1).shape[1]
    policy.counts["forwards"] = forwards
    return width


def judged(
    ranks: Ranks, values: Values | None, paths: Trajectories, tree: Tree, judgement: Judgement, iteration: int
) -> tuple[Judgement, dict[str, float]]:
    """The judgement of all ranks with the values of its states, and a row for the metrics; `paths` are this rank's."""
    if values is None:
        return judgement, {}
    features = ranks.in_order(paths.features, paths.tree.prompt, "features of states")
    shown, row = values.judge(tree, judgement, features, iteration)
    return replace(judgement, values=shown), row
