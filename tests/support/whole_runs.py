"""Run a config from first to last and read what it wrote."""

import json

from mmalign import config as configs, run as runs


def run(settings, resume=False, **changed):
    return runs.train(configs.build(settings | changed, "test"), resume)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
