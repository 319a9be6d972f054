"""Export the averaged adapter of a run for other programs, with a model card, and verify the export."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmalign import policy as policies
from mmalign.config import secrets
from mmalign.config.schema import Config
from mmalign.errors import BadInput, Failed, refusing
from mmalign.runs import Form
from mmalign.runs.inference import load_policy
from mmalign.runs.outputs import check_file


def export_run(run: Path, out: Path, form: Form = "diffusers") -> Path:
    """Write the averaged adapter of a run's newest checkpoint, or of that checkpoint, into the folder `out`, with a
    model card (`mmalign.reporting.card`); returns the file or folder (`mmalign.policy.export.FORMATS`). BadInput where
    the model's weights are not those of the run, and where another README.md would be lost; Failed where the export,
    read back, does not give the policy's velocity."""
    policies.quiet()
    from mmalign.runs import adapters, state as states

    c, newest = adapters.saved(run)
    _check(out, form)
    policy, state = load_policy("", None, newest), states.read(newest)[1]
    _check_model(policy, c, state, run)
    return write(policy, c, newest.parents[1], state.iteration, state.machine, out, form, named=newest == run)


def export_sum(weights: Mapping[str, float], out: Path, form: Form = "diffusers", model: str = "") -> Path:
    """Write one adapter whose change of the model's weights is the weighted sum of those of runs, checkpoints and LoRA
    files, into the folder `out`; returns the file or folder. Their ranks add up. A sum of changes of weights is another
    model than a sum of velocities (`mmalign sample --adapter A=1 --adapter B=0.5`). It has no model card. `model`: the
    base model of LoRA files, which do not name it. BadInput as in `export_run`, and where the adapters disagree in
    model, precision, guidance or size; Failed as there."""
    policies.quiet()
    from mmalign.runs import adapters, state as states

    if not any(weights.values()):
        raise BadInput(f"--adapter: the weights {[*weights.values()]} leave no adapter; one other than 0 is needed")
    _check(out, form)
    policy = load_policy(model, None, weights)
    for path in map(Path, weights):
        if adapters.is_run(path):
            c, newest = adapters.saved(path)
            _check_model(policy, c, states.read(newest)[1], path)
    with refusing():
        policy.merge(dict(zip(policy.adapters(), weights.values(), strict=True)))
    named = [(secrets.public(str(Path(path).absolute())), weight) for path, weight in weights.items()]
    precision = str(policy.pipe.transformer.dtype).removeprefix("torch.")
    return _written(
        policy, out, form, {"version": version("mmalign"), "precision": precision, "sum": json.dumps(named)}
    )


def _check_model(policy: Any, c: Config, state: Any, run: Path) -> None:
    """BadInput where the model's weights are not those that a run was trained on."""
    if not c.quantize and state.made["model"] != policy.fingerprint():  # weights are exported unquantised
        raise BadInput(f"the weights of {c.model} are not those that {run} was trained on")


def _written(policy: Any, out: Path, form: Form, about: Mapping[str, str]) -> Path:
    """The export of a policy, read back."""
    with refusing():
        path = policy.export(out, form, about)
    try:
        policy.check_export(out, form)
    except ValueError as error:
        raise Failed(str(error)) from None
    return path


def write(
    policy: Any, c: Config, run: Path, iteration: int, machine: Mapping[str, Any] | None, out: Path, form: Form,
    named: bool = False,
) -> Path:  # fmt: skip
    """`export_run` of a policy in memory, which has the averaged adapter after an `iteration` of the run in the folder
    `run`; `machine` is what it was trained on, `named` whether the iteration was chosen by name."""
    from mmalign.reporting import card

    _check(out, form)
    path = _written(policy, out, form, header(c, policy.times(c.steps).tolist(), iteration))
    size = dict(zip(("height", "width"), policy.image_size, strict=True))
    exported = card.Exported(
        form, path, run, c, iteration, named=named, machine=machine, pipeline=type(policy.pipe).__name__,
        absent=policy.absent(policy.pipe.config), settings=size | policy.stock_settings(1), tag=policy.tag,
    )  # fmt: skip
    with refusing():
        card.write(exported)
    return path


def _check(out: Path, form: Form) -> None:
    """BadInput where a README.md that was not written here would be lost."""
    from mmalign.reporting import base_model, card

    check_file((out / "merged" if form == "merged" else out) / base_model.CARD, "--out", card.ours)


def header(c: Config, sigmas: list[float], iteration: int) -> dict[str, str]:
    """The facts about a run in the header of an exported file; paths and secrets are left out of the config."""
    config = secrets.public(c.model_dump(mode="json"))
    return {
        "version": version("mmalign"), "base_model": config["model"], "iteration": str(iteration),
        "steps": str(c.steps), "precision": c.precision, "sigmas": json.dumps(sigmas), "config": json.dumps(config),
    }  # fmt: skip
