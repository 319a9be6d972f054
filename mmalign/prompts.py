"""Prompt files, and the order in which a run meets them."""

import json
from pathlib import Path

import numpy as np

from mmalign.config import BadInput
from mmalign.flow.sample import seed_of
from reward_models import Prompt
from reward_models.images import beside


def read(path: str | Path) -> list[Prompt]:
    """Prompts from a text file (one a line) or JSONL (`prompt`, optional `id`, everything else is ground truth).

    A prompt without an id is numbered by its line. Raises BadInput with the line for anything else.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts {path}: {getattr(error, 'strerror', None) or error}") from None
    prompts = []
    for number, line in enumerate(lines):
        if line.strip():
            prompts.append(_parse(line, number, path) if path.suffix == ".jsonl" else Prompt(line.strip(), {}, number))
    if not prompts:
        raise BadInput(f"prompts {path}: no prompts in it")
    if len({p.id for p in prompts}) < len(prompts):
        raise BadInput(f"prompts {path}: ids repeat; each prompt needs its own")
    return prompts


def _parse(line: str, number: int, path: Path) -> Prompt:
    try:
        row = json.loads(line)
        text, name = str(row.pop("prompt")), int(row.pop("id", number))
        return Prompt(text, beside(row, path.parent), name)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"prompts {path}, line {number + 1}: an object with a `prompt` is needed ({error!r})") from None


def batch(prompts: list[Prompt], size: int, iteration: int, seed: int) -> list[Prompt]:
    """The prompts of one iteration: epochs of all prompts, each shuffled by its own seed, cut into whole batches.

    A function of its arguments alone, so a resumed run needs no cursor; a batch never holds a prompt twice. What is
    left over at the end of an epoch is dropped, another remainder each time. Raises BadInput for a batch beyond the
    file.
    """
    if size > len(prompts):
        raise BadInput(f"prompts_per_iteration: {size} asked for, the file has {len(prompts)}")
    epoch, slot = divmod(iteration, len(prompts) // size)
    order = np.random.default_rng(seed_of(seed, "prompts", epoch)).permutation(len(prompts))
    return [prompts[i] for i in order[slot * size : (slot + 1) * size]]
