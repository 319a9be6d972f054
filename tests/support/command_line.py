"""The command line in this process."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from unittest.mock import patch

from mmalign.cli import app as cli


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def mmalign(*args, stderr: io.StringIO | None = None) -> Result:
    """The command line in this process: an uncaught exception fails the test as a traceback would fail the user.
    `stderr` may be one that passes for a terminal."""
    out, err = io.StringIO(), stderr or io.StringIO()
    argv = ["mmalign", *map(str, args)]
    as_before = (patch.object(sys, "argv", argv), patch.dict(os.environ))
    with as_before[0], as_before[1], contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())
