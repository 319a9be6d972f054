"""The command line. Exit code 0: done; 2: bad input, reported in one line; 1: a failure while running; 143 or 130: a
run that SIGTERM or Ctrl-C stopped and that is saved."""

import os
import sys
from pathlib import Path
from typing import Any

import typer

from mmalign.cli import checks, collect, images, natural, output, parrot, refine, reward, runs, score, train
from mmalign.errors import BadInput, Failed, Orphaned, refusing
from mmalign.runs.signals import Stopped
from reward_models import files

COMMANDS = (
    train.train, train.calibrate, checks.estimate, images.sample, images.evaluate, score.score, refine.refine,
    collect.collect, checks.doctor, score.serve, runs.export, runs.report,
)  # fmt: skip
GROUPS = {
    "reward": (
        reward.__doc__,
        {
            "fit": reward.fit, "experts": reward.experts, "calibrate": reward.calibrate, "eval": reward.evaluate,
            "gaming": reward.gaming, "natural": natural.natural, "rationalise": parrot.rationalise,
            "distil": parrot.distil,
        },
    )
}  # fmt: skip


class _Command(typer.core.TyperCommand):
    """A command whose paths may begin with `~`, the home folder. Torch is imported where it begins its work, and not
    for its help."""

    def invoke(self, ctx: Any) -> Any:
        from mmalign.distributed.launched import use_device
        from mmalign.policy import importing, quiet_imports

        with importing():
            import torch

        quiet_imports()
        use_device()
        torch.set_flush_denormal(True)  # tiny activations in the subnormal range make CPU arithmetic many times slower
        with refusing():
            ctx.params |= {
                name: Path(files.home(str(path))) for name, path in ctx.params.items() if isinstance(path, Path)
            }
        return super().invoke(ctx)


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for command in COMMANDS:
    app.command(cls=_Command)(command)
for group, (text, commands) in GROUPS.items():
    below = typer.Typer(no_args_is_help=True, help=text)
    for name, command in commands.items():
        below.command(name, cls=_Command)(command)
    app.add_typer(below, name=group)


def main() -> None:
    """Run the command line; a user's mistake becomes one line on standard error."""
    os.environ["PYTHONSAFEPATH"] = "1"  # processes that libraries start import nothing from the current folder either
    # threads of torch that wait for each other sleep instead of spinning, which costs others' work their cores; read
    # when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with output.checked():
            app()
    except (BadInput, Failed) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, Orphaned):  # one process of each machine
            output.complain(str(error))
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except OSError as error:
        from mmalign.runs.folder import UNWRITABLE

        if error.errno not in UNWRITABLE:
            raise
        output.complain(f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}")
        sys.exit(1)
    except Stopped as stopped:
        sys.exit(stopped.code)
