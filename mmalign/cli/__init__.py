"""The command line: `mmalign COMMAND`."""

from mmalign.cli.app import main

__all__ = ["main"]
