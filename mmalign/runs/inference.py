"""Load a policy to draw images with: a base model, or one with the adapter of a run or of a file."""

from pathlib import Path
from typing import Any

from mmalign import policy as policies
from mmalign.activity import doing
from mmalign.config import paths
from mmalign.errors import refusing


def load_policy(model: str, guidance: float | None = None, adapter: Path | None = None) -> Any:
    """The policy, on a GPU if there is one.

    An adapter (`mmalign.runs.adapters.read`) may name its model, which then replaces `model`, and has the precision and
    image size it was trained with; its guidance is the default of `guidance`, which is 1 without adapter. BadInput.
    """
    policies.quiet()  # before the imports below, of peft, whose warnings it silences
    import torch

    from mmalign.runs import adapters

    chosen = None if adapter is None else adapters.read(adapter)
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
        if chosen is not None:
            chosen.attach(policy)
    return policy
