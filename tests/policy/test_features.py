"""Features of a value head: what a block of each family's network makes of a state, at no forward more."""

import pytest
import torch
from tiny_pipelines import FAMILIES
from tiny_policies import TEXTS, opened

from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.policy.protocol import Observable
from mmalign.seeds import gaussian


@pytest.mark.parametrize("name", [n for n in FAMILIES if "distilled" not in n and "schnell" not in n])
@pytest.mark.parametrize("guided", [False, True])
def test_features_cost_no_forward_and_change_nothing(folders, name, guided):
    """Of every family: the trajectories are the same, and features depend on a state alone, not on its batch."""
    guidances = FAMILIES[name].guidances
    policy = opened(folders, name, guidances[-1] if guided else guidances[0])
    assert isinstance(policy, Observable)
    start = torch.stack([gaussian(policy.latent_shape, i) for i in range(len(TEXTS))])
    cond, index, plan = policy.encode(TEXTS), torch.arange(len(TEXTS)), plans.ode(policy.times(2))
    plain = sample(policy.velocity, start, cond, index, plan)
    before = policy.counts["forwards"]
    with policy.observed() as features:
        paths = sample(policy.velocity, start, cond, index, plan, features=features)
        assert policy.counts["forwards"] == 2 * before
        alone = sample(policy.velocity, start[1:2], policy.encode(TEXTS[1:2]), index[:1], plan, features=features)
    assert torch.equal(paths.finals, plain.finals)
    assert paths.features.shape[:2] == (3, 2)
    assert bool(paths.features.isfinite().all())
    torch.testing.assert_close(paths.features[1], alone.features[0], atol=2e-4, rtol=1e-3)
    assert float((paths.features[0] - paths.features[1]).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="blocks: \\[99\\]"), policy.observed([99]):
        pass
