"""Train a reward model from preference pairs and write it to a folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from reward_models.errors import first_problem
from reward_models.pairs import Pair
from reward_models.registry import load
from reward_models.training import data, folder as folders
from reward_models.training.clip_head import ClipHead
from reward_models.training.clip_towers import ClipTowers
from reward_models.training.data import Progress, silent
from reward_models.training.evaluation import evaluate
from reward_models.training.vlm import Vlm
from reward_models.training.vlm_head import VlmHead

Settings = TypeVar("Settings")
Fit = ClipHead | ClipTowers | VlmHead | Vlm
FITS = {method.type: method for method in (ClipHead, ClipTowers, VlmHead, Vlm)}


def method_of(name: str, settings: Mapping[str, Any]) -> Fit:
    """The method of `FITS` with these settings. ValueError, in one line, for an unknown name or setting, or an invalid
    value."""
    if name not in FITS:
        raise ValueError(f"no fit called {name!r}; there are {', '.join(FITS)}")
    return checked(FITS[name], name, settings)


def checked(kind: type[Settings], name: str, settings: Mapping[str, Any]) -> Settings:
    """The dataclass `kind` with these settings. ValueError, in one line that begins with `name`, for an unknown
    setting, or an invalid value."""
    fields = [*kind.__dataclass_fields__]
    if unknown := [key for key in settings if key not in fields]:
        raise ValueError(f"{name}: no setting {unknown[0]!r}; it takes {', '.join(fields)}")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(dict(settings), allow_nan=False), strict=True)
    except ValidationError as error:
        raise ValueError(f"{name}: {first_problem(error.errors())}") from None


def fit(
    pairs: Sequence[Pair],
    out: str | Path,
    method: str | Fit = "clip_head",
    *,
    held_out: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Train a reward model on pairs, write it to the folder `out`, and return its card. `reward_models.load("fitted",
    folder=out)` loads it.

    `method` is a name of `FITS`, with `settings`, or such an object. The share `held_out` of the prompts is not trained
    on: half of it decides when to stop, and the accuracy of the other half is that of new prompts. The result depends
    on the pairs, `seed`, the settings and the kind of device. `progress` gets an iterable, how many of its items were
    done before, their total, and names for the work and its unit. ValueError, in one line, for pairs, settings or a
    folder that cannot be used; a training that was interrupted continues in its folder.
    """
    out = Path(out)
    method = method_of(method, settings) if isinstance(method, str) else method
    if not 0 < held_out < 1:
        raise ValueError(f"held_out {held_out}: a share between 0 and 1 is needed")
    data.check(pairs)
    parts = data.split(pairs, held_out, seed)
    folders.check_new(out)
    digest = data.digest(pairs, progress)
    made_of = {"data": digest, "held_out": held_out, "seed": seed, "fit": method.type, "settings": asdict(method)}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    model = method(parts, folders.Workplace(out, key), device, seed, progress)
    folders.write(out, method.type, model)
    folders.put_prompts(out, (pair.prompt.text for pair in (*parts.train, *parts.stop)))
    card = made_of | {
        "pairs": len(pairs),
        "prompts": {name: len({*data.cluster(part)}) for name, part in vars(parts).items()},
        "base": model.config["base"],
        "licence_of_base": model.config["licence"],
        "accuracy": _accuracies(out, parts, method.base or None, device, progress),
    }
    folders.put(out / folders.CARD, card)
    (out / folders.CHECKPOINT).unlink(missing_ok=True)
    return card


def _accuracies(out: Path, parts: data.Split, base: str | None, device: str, progress: Progress) -> dict[str, Any]:
    """The accuracy of the written model on each part of the pairs, with intervals."""
    scorer = load("fitted", folder=str(out), base=base, device=device)
    of_part = {}
    for name, part in vars(parts).items():
        row = evaluate(part, {"fitted": scorer}, progress=progress)["rewards"]["fitted.score"]
        of_part[name] = {key: row[key] for key in ("accuracy", "with_ties", "missing", "calibration")}
    return of_part
