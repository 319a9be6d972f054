"""Fit a mixture of scores whose weights depend on the prompt to preference pairs, and compare it with fixed weights.

Letters: `N` pairs, `K` components, `D` numbers of an embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reward_models import files
from reward_models.pairs import Pair
from reward_models.training import base as bases, data
from reward_models.training.data import Progress, silent
from reward_models.training.evaluation import scores
from reward_models.training.experts import About, Mixture, Source, flat, numbered, save
from reward_models.training.losses import bradley_terry
from reward_models.training.statistics import accuracies, agreement, mcnemar
from reward_models.types import RewardModel

FOLDS = 5
STEPS = 100  # of L-BFGS at most
TINY = 1e-4  # pull of the fixed weights towards equal ones; without it, separable pairs have no solution
SEVERE = 1 - 1e-6  # the largest weight that the penalty on irrelevant components reads


@dataclass(frozen=True)
class Examples:
    """Raw components of both images of `N` pairs, NaN where missing in both, and the embedding of their prompts."""

    a: Float[Tensor, "N K"]
    b: Float[Tensor, "N K"]
    embedding: Float[Tensor, "N D"]
    preference: Float[Tensor, "N"]

    def part(self, rows: Tensor) -> "Examples":
        return Examples(*(value[rows] for value in vars(self).values()))


def difference(mixture: Mixture, examples: Examples) -> Float[Tensor, "N"]:
    """The score of image a less that of image b."""
    present = ~examples.a.isnan()
    a, b = (mixture.score(side, examples.embedding, present) for side in (examples.a, examples.b))
    return a - b


def losses(mixture: Mixture, examples: Examples) -> Float[Tensor, "N"]:
    """The Bradley-Terry loss of each pair."""
    return bradley_terry(difference(mixture, examples), examples.preference)


def irrelevance(mixture: Mixture, examples: Examples) -> Float[Tensor, ""]:
    """Mean over the pairs of -log(1 - w), summed over the components that neither image has: the weight w that they
    would have, were they there, should be small for prompts that they say nothing of."""
    missing = examples.a.isnan()
    weights = mixture.weights(examples.embedding, torch.ones_like(missing)).clamp(max=SEVERE)
    return (-torch.log1p(-weights) * missing).sum(1).mean()


SCALE, FIXED, BY_PROMPT = ("log_scale",), ("gate_bias", "within_bias"), ("gates", "within")


def fitted(
    start: Mixture, examples: Examples, learnt: Sequence[str], weight_decay: float, irrelevant: float = 0.0
) -> Mixture:
    """The mixture with the least loss, from `start`, with the parameters `learnt`; half the square of the weights that
    the prompt multiplies is penalised by `weight_decay`."""
    parameters = {name: getattr(start, name).clone().requires_grad_() for name in learnt}
    optimizer = torch.optim.LBFGS([*parameters.values()], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Float[Tensor, ""]:
        optimizer.zero_grad()
        mixture = replace(start, **parameters)
        loss = losses(mixture, examples).mean() + irrelevant * irrelevance(mixture, examples)
        for names, decay in ((FIXED, TINY), (BY_PROMPT, weight_decay)):
            loss = loss + decay / 2 * sum(getattr(mixture, name).square().sum() for name in names)
        loss.backward()
        return loss

    optimizer.step(closure)
    return replace(start, **{name: value.detach() for name, value in parameters.items()})


def begun(examples: Examples, aspects: Sequence[str], names: Sequence[str]) -> Mixture:
    """The mixture with weights of 0, in the units of these pairs. ValueError where a component does not vary."""
    both = torch.cat([examples.a, examples.b]).double()
    mean = both.nanmean(0)
    std = (both - mean).square().nanmean(0).sqrt()
    for name, value in zip(names, std.tolist(), strict=True):
        if not value > 0:
            raise ValueError(f"{name} is the same for all images of the pairs, or missing; leave it out")
    centre = examples.embedding.mean(0)
    size = float((examples.embedding - centre).square().sum(1).mean().sqrt()) or 1.0
    return flat(torch.tensor(numbered(aspects)), centre, size, mean.float(), std.float())


def both(start: Mixture, examples: Examples, weight_decay: float, irrelevant: float = 0.0) -> tuple[Mixture, Mixture]:
    """The mixtures with fixed weights and with weights by prompt, fitted to the examples from `start`."""
    fixed = fitted(start, examples, (*SCALE, *FIXED), weight_decay, irrelevant)
    return fixed, fitted(fixed, examples, (*SCALE, *FIXED, *BY_PROMPT), weight_decay, irrelevant)


def gains(
    start: Mixture, examples: Examples, cluster: Int[np.ndarray, "N"], weight_decay: float, irrelevant: float
) -> Float[np.ndarray, "N"]:
    """How much lower the loss of each pair is with weights by prompt than with fixed ones, both fitted to the pairs of
    other prompts (`FOLDS` of the prompts)."""
    names, number = np.unique(cluster, return_inverse=True)
    fold = torch.from_numpy(np.random.default_rng(0).permutation(len(names))[number] % min(FOLDS, len(names)))
    gain = torch.zeros(len(fold))
    for k in fold.unique():
        here = fold == k
        fixed, gated = both(start, examples.part(~here), weight_decay, irrelevant)
        gain[here] = losses(fixed, examples.part(here)) - losses(gated, examples.part(here))
    return gain.double().numpy()


def lower(gain: Float[np.ndarray, "N"], cluster: Int[np.ndarray, "N"]) -> bool:
    """Whether a loss is lower, by a mean gain over prompts that exceeds its standard error."""
    names, number = np.unique(cluster, return_inverse=True)
    means = np.bincount(number, gain) / np.bincount(number)
    return len(names) > 1 and bool(means.mean() > means.std(ddof=1) / len(names) ** 0.5)


def fit_experts(
    pairs: Sequence[Pair],
    scorers: Mapping[str, RewardModel],
    out: str | Path,
    aspects: Mapping[str, Sequence[str]] | None = None,
    *,
    weight_decay: float = 0.01,
    irrelevant: float = 0.1,
    base: str = "",
    pretrained: str = "",
    held_out: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
    batch: int = 64,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Fit the mixture to pairs, write it to the file `out`, and return its card.

    `aspects` groups components, "scorer.component"; without it each component of the scorers is an aspect. Half of the
    share `held_out` of the prompts is not fitted to: the accuracies in the card are those there. Weights that depend on
    the prompt are written only where their loss is lower than that of fixed weights by more than its standard error, in
    a cross-validation over the other prompts; otherwise the fixed ones are. Pairs of which one image alone has a
    component are left out. ValueError, in one line, for pairs, scorers or settings that cannot be used.
    """
    for name, value in (("weight_decay", weight_decay), ("irrelevant", irrelevant)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} {value}: a number of at least 0 is needed")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out {held_out}: a share between 0 and 1 is needed")
    source, of_component = _components(scorers, aspects)
    names = [*source]
    data.check(pairs)
    model = bases.opened(base, pretrained, device, batch)
    every, complete = _examples(pairs, scorers, source, model, batch, progress)
    used = [pair for pair, good in zip(pairs, complete.tolist(), strict=True) if good]
    parts = data.split(used, held_out, seed)
    rows = {id(pair): row for row, pair in enumerate(pairs)}
    learnt = [*parts.train, *parts.stop]
    train, test = (every.part(torch.tensor([rows[id(p)] for p in part])) for part in (learnt, parts.test))
    settings = weight_decay, irrelevant
    start = begun(train, of_component, names)
    gain = gains(start, train, data.cluster(learnt), *settings)
    by_prompt = lower(gain, data.cluster(learnt))
    equal = fitted(start, train, SCALE, *settings)
    fixed, gated = both(equal, train, *settings)
    prompts = {"train": len(np.unique(data.cluster(learnt))), "test": len(np.unique(data.cluster(parts.test)))}
    of_mean = fixed.weights(fixed.centre[None], torch.ones(1, len(names), dtype=torch.bool))[0].tolist()
    made = {
        "data": data.digest(used, progress), "pairs": len(pairs), "left_out": len(pairs) - len(used),
        "prompts": prompts,
        "held_out": held_out, "seed": seed, "weight_decay": weight_decay, "irrelevant": irrelevant,
        "written": "by prompt" if by_prompt else "fixed", "gain": float(gain.mean()),
        "fixed_weights": dict(zip(names, of_mean, strict=True)),
        "test": _measured({"equal": equal, "fixed": fixed, "by prompt": gated}, test, parts.test),
    }  # fmt: skip
    about = About(
        components=names,
        aspects=of_component,
        scorers={name: scorers[name].card.version for name in dict.fromkeys(source.values())},
        base=Source(model=base, pretrained=pretrained, checkpoint=model.card.checkpoint),
        made=made,
    )
    files.make_folder(Path(out).parent)
    save(Path(out), gated if by_prompt else fixed, about)
    return about.model_dump()


def _components(
    scorers: Mapping[str, RewardModel], aspects: Mapping[str, Sequence[str]] | None
) -> tuple[dict[str, str], list[str]]:
    """The name of the scorer of each component, and the aspects of the components. ValueError."""
    source = {f"{name}.{component}": name for name, scorer in scorers.items() for component in scorer.names}
    if aspects is None:
        aspects = {name: [name] for name in source}
    listed = [(name, aspect) for aspect, names in aspects.items() for name in names]
    for name, _ in listed:
        if name not in source:
            raise ValueError(f"aspects: no component {name!r}; the scorers give {', '.join(source)}")
    if len(listed) < 2 or len({name for name, _ in listed}) < len(listed):
        raise ValueError(f"aspects: at least 2 components are needed, each once; got {len(listed)}")
    return {name: source[name] for name, _ in listed}, [aspect for _, aspect in listed]


def _examples(
    pairs: Sequence[Pair],
    scorers: Mapping[str, RewardModel],
    source: Mapping[str, str],
    model: Any,
    batch: int,
    progress: Progress,
) -> tuple[Examples, Bool[Tensor, "N"]]:
    """The examples of all pairs, and which of them have the same components in both images, one at least."""
    values, _ = scores(pairs, {name: scorers[name] for name in dict.fromkeys(source.values())}, batch, progress)
    columns = [
        (scorer, scorers[scorer].names.index(name.removeprefix(f"{scorer}."))) for name, scorer in source.items()
    ]
    a, b = (torch.stack([values[scorer][side][:, k] for scorer, k in columns], 1).float() for side in (0, 1))
    texts = {text: i for i, text in enumerate(dict.fromkeys(pair.prompt.text for pair in pairs))}
    with torch.no_grad():
        embedding = bases.encode_texts(model, [*texts]).cpu().float()
    rows = torch.tensor([texts[pair.prompt.text] for pair in pairs])
    complete = (a.isnan() == b.isnan()).all(1) & ~a.isnan().all(1)
    return Examples(a, b, embedding[rows], data.preferences(pairs)), complete


def _measured(mixtures: Mapping[str, Mixture], examples: Examples, pairs: Sequence[Pair]) -> dict[str, Any]:
    """By mixture the accuracies on these pairs and the mean loss, and McNemar's test of prompt-dependent weights
    against fixed ones."""
    preference, cluster = data.preferences(pairs).double().numpy(), data.cluster(pairs)
    leads = {name: difference(one, examples).double().numpy() for name, one in mixtures.items()}
    rows: dict[str, Any] = {
        name: accuracies(lead, preference, cluster) | {"loss": float(losses(mixtures[name], examples).mean())}
        for name, lead in leads.items()
    }
    two = (agreement(leads[name], preference) for name in ("fixed", "by prompt"))
    return rows | {"compared": mcnemar(*two)}
