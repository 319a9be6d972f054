"""Run a config from first to last and read what it wrote."""

import json
from contextlib import contextmanager

import pytest

from mmalign import run as runs
from mmalign.config import load as configs


def run(settings, resume=False, **changed):
    return runs.train(configs.build(settings | changed, "test"), resume)


@contextmanager
def cut_off(after):
    """A run inside is interrupted, as by Ctrl-C, when it would begin the iteration that follows `after` of them."""
    iterate = runs.iterate

    def stopped(session, done, *rest):
        if done == after:
            raise KeyboardInterrupt
        return iterate(session, done, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "iterate", stopped)
        with pytest.raises(KeyboardInterrupt):
            yield


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
