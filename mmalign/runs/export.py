"""Export the averaged adapter of a run for other programs, and verify the export."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmalign import policy as policies
from mmalign.config import secrets
from mmalign.config.schema import Config
from mmalign.errors import BadInput, Failed, refusing
from mmalign.runs import Form
from mmalign.runs.inference import load_policy
from mmalign.runs.outputs import make_folder


def export_run(run: Path, out: Path, form: Form = "diffusers") -> Path:
    """Write the averaged adapter of a run's newest checkpoint, or of that checkpoint, into the folder `out`; returns
    what was written (`mmalign.policy.export.FORMATS`). BadInput where the model's weights are not those of the run;
    Failed where the export, read back, does not give the policy's velocity."""
    policies.quiet()
    from mmalign.runs import adapters, state as states

    c, newest = adapters.saved(run)
    policy, state = load_policy("", None, newest), states.read(newest)[1]
    if not c.quantize and state.made["model"] != policy.fingerprint():  # weights are exported unquantised
        raise BadInput(f"the weights of {c.model} are not those that {run} was trained on")
    return write(policy, c, run, state.iteration, out, form)


def write(policy: Any, c: Config, run: Path, iteration: int, out: Path, form: Form) -> Path:
    """Write the adapter of a policy in memory, after `iteration` of a run with the config `c`. As `export_run`."""
    make_folder(out)
    with refusing():
        path = policy.export(out, form, header(c, policy.times(c.steps).tolist(), iteration))
    try:
        policy.check_export(out, form)
    except ValueError as error:
        raise Failed(str(error)) from None
    return path


def header(c: Config, sigmas: list[float], iteration: int) -> dict[str, str]:
    """The facts about a run in the header of an exported file; paths and secrets are left out of the config."""
    config = secrets.public(c.model_dump(mode="json"))
    return {
        "version": version("mmalign"), "base_model": config["model"], "iteration": str(iteration),
        "steps": str(c.steps), "precision": c.precision, "sigmas": json.dumps(sigmas), "config": json.dumps(config),
    }  # fmt: skip
