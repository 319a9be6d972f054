"""The commands `train` and `calibrate`."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmalign.cli import output, tables
from mmalign.cli.options import Allow, ConfigFile, Json, Overrides, output_option
from mmalign.errors import BadInput
from mmalign.runs.outputs import check_file
from mmalign.training import Rule

# a calibration samples every step with noise and scores every state, whatever the config does with it
CALIBRATION = [
    "plan=sde", "seeds=2", "kernel={type: scheduled, noise: 1.0}", "credit=gain", "max_forwards=null",
    "max_rewards=null",
]  # fmt: skip

Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest complete checkpoint of the run")]
Out = Annotated[Path, output_option(help="file for the noise of each step; a plot is written beside it")]
Rounds = Annotated[int, typer.Option(min=2, help="rounds of rollouts")]
NoiseRule = Annotated[Rule, typer.Option(help="when noise rises: paper (counts) or z (robust)")]
Step = Annotated[float, typer.Option(min=0, help="change of the noise per round")]
Floor = Annotated[float, typer.Option(min=0, help="least noise of a step")]
Ceiling = Annotated[float, typer.Option(min=0, help="noise of a step above which none rises")]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
    allow: Allow = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a text-to-image model from a config; evaluate before and after; write a report."""
    from mmalign import policy as policies, run as runs
    from mmalign.config import load as configs
    from mmalign.distributed import processes
    from mmalign.reporting import report as reports
    from mmalign.runs import folder

    policies.quiet()
    c = configs.load(config, overrides or [])
    out = runs.train(c, resume, Console(stderr=True, markup=False) if as_json else output.console)
    if not processes.main():
        return
    with folder.failing(out):
        page = reports.write(out)
    summary = reports.summary(out)
    table = [tables.rises(summary)] if summary["rises"] else []
    output.show(summary | {"report": str(page)}, as_json, *table, f"report: {page}")


def calibrate(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = Path("noise.json"),
    rounds: Rounds = 40,
    rule: NoiseRule = "z",
    step: Step = 0.02,
    floor: Floor = 0.05,
    ceiling: Ceiling = 3.0,
    allow: Allow = None,
) -> None:
    """Find the noise each step tolerates (DenseGRPO), for `kernel: scheduled, noise: FILE`, on a config's prompts."""
    from mmalign import policy as policies
    from mmalign.config import load as configs
    from mmalign.training import noise_calibration as calibration, rollout, setup

    policies.quiet()
    _check(out, calibration.ours, step, floor, ceiling)
    c = configs.load(config, [*(overrides or []), *CALIBRATION])
    run = setup.open_session(c)
    if run.ranks.size > 1:
        raise BadInput(f"started as {run.ranks.size} processes; a calibration runs in one")
    rows, levels = [], calibration.start_levels(run.times)
    for row in calibration.run(partial(rollout.step_gains, run), levels, rounds, rule, step, floor, ceiling):
        rows.append(row)
        share = sum(row["better"]) / max(1, sum(row["better"]) + sum(row["worse"]))
        noise = " ".join(f"{level:.2f}" for level in row["noise"])
        output.print_lines(f"round {len(rows)}: gains above 0 {share:.0%}, noise {noise}")
    calibration.save(out, c, run.times, rows, rule)
    calibration.plot(out.with_suffix(".png"), out)
    output.print_lines(f"{out}, {out.with_suffix('.png')}")


def _check(out: Path, ours: Callable[[str], bool], step: float, floor: float, ceiling: float) -> None:
    if out.suffix != ".json" or not out.parent.is_dir():
        raise BadInput(f"--out {out}: a .json file in a folder that exists is needed")
    check_file(out, "--out", ours)
    if not out.exists():  # the plot beside a file of ours is ours
        check_file(out.with_suffix(".png"), "--out")
    if not 0 <= floor <= ceiling or not 0 <= step < math.inf:
        raise BadInput(
            f"--floor {floor:g}, --ceiling {ceiling:g}, --step {step:g}: a floor of at most the ceiling and a finite "
            "step are needed"
        )
