"""What the comparisons of methods compute and set."""

import pytest
import torch
from compare_credits import METHODS, words_of
from compare_regions import VARIANTS
from tiny_worlds import WORLDS
from value_correlation import rows

from mmalign.config.load import load


def test_values_that_agree_have_no_gain_and_those_of_another_prompt_do_not_count():
    prompt = torch.tensor([0, 0, 0, 1, 1, 1])
    before = torch.tensor([0.0, 1.0, 2.0, 5.0, 6.0, 7.0])
    columns = torch.stack([before, before + 3 * prompt, -before, torch.tensor([1.0, 0.0, 1.0, 5.0, 2.0, 5.0])], 1)
    same, shifted, opposite, unrelated = rows(before[:, None].expand(6, 4), columns, prompt)
    deviation = pytest.approx((2 / 3) ** 0.5)
    assert same == (1, 0, deviation)
    assert shifted == (1, 0, deviation)
    assert opposite == (-1, pytest.approx(2 * (2 / 3) ** 0.5), deviation)
    assert unrelated[0] == pytest.approx(0)


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_each_method_and_region_has_a_sound_config_on_either_world(world):
    for overrides in [*METHODS.values(), *VARIANTS.values()]:
        c = load("configs/tiny_branch.yaml", [*words_of(world, overrides), "held_out=null", "out=runs/none"])
        assert c.model == f"assets/{world.model}"
        assert {name.split(".")[0] for name in c.rewards} <= {world.name, world.classes.name, "self"}
