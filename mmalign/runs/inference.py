"""Load a policy to draw images with: a base model, or one with the adapters of runs or files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign import policy as policies
from mmalign.activity import doing
from mmalign.config import paths
from mmalign.errors import BadInput, refusing


def load_policy(model: str, guidance: float | None = None, adapter: Path | Mapping[str, float] | None = None) -> Any:
    """The policy, on a GPU if there is one.

    An adapter (`mmalign.runs.adapters.read`) may name its model, which then replaces `model`, and has the precision and
    image size it was trained with; its guidance is the default of `guidance`, which is 1 without adapter. Several, each
    with its weight, act as a mixture of velocities; what they name must be the same. BadInput.
    """
    policies.quiet()  # before the imports below, of peft, whose warnings it silences
    import torch

    from mmalign.policy.protocol import Mixes
    from mmalign.runs import adapters

    weights = adapter if isinstance(adapter, Mapping) else {} if adapter is None else {str(adapter): 1.0}
    read = {each: adapters.read(Path(each)) for each in weights}
    chosen = _agreeing(read)
    if chosen is not None:
        model, guidance = chosen.model or model, chosen.guidance if guidance is None else guidance
    with refusing(), doing("loading the model"):
        policy = policies.load(
            paths.locate(model),
            dtype=chosen.precision if chosen else "float32",
            device="cuda" if torch.cuda.is_available() else "cpu",
            guidance=1.0 if guidance is None else guidance,
            size=chosen.size if chosen else None,
        )
        for number, each in enumerate(read.values()):
            each.attach(policy, *([f"mixed{number}"] if number else []))  # the first has the name of a single one
        if isinstance(adapter, Mapping):
            if not isinstance(policy, Mixes):
                raise BadInput(f"adapter: a {type(policy).__name__} does not mix adapters; give one, without a weight")
            policy.mix(dict(zip(policy.adapters(), weights.values(), strict=True)))
    return policy


def _agreeing(adapters: Mapping[str, Any]) -> Any:
    """The first adapter, with the model that any of them names; None without any. BadInput where they disagree."""
    chosen = None
    for name, each in adapters.items():
        if chosen is None:
            chosen, first = each, name
            continue
        for what in ("model", "precision", "guidance", "size"):
            one, other = getattr(chosen, what), getattr(each, what)
            if one != other and not (what == "model" and None in (one, other)):
                raise BadInput(f"adapter: {what} of {first} is {one}, of {name} {other}; a mixture needs the same")
        chosen = replace(chosen, model=chosen.model or each.model)
    return chosen
