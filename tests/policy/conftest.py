"""A tiny random pipeline of each family, saved to disk once per run."""

import pytest
import torch
from tiny_pipelines import FAMILIES


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("family")
            FAMILIES[name].build(made[name])
        return str(made[name])

    return folder
