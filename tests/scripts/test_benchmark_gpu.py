"""The benchmark of real sizes, on sizes that are not."""

import benchmark_gpu as benchmark
import pytest
import torch

from mmalign import policy as policies


@pytest.mark.parametrize("weights", ["saved", "random"])
def test_it_measures(random_model, weights):
    if weights == "random":
        policy = benchmark.randomly(random_model, 32, 4.5, "cpu")
        assert policy.pipe.transformer.dtype == torch.bfloat16
        assert policy.pipe.vae.device.type == "meta"
    else:
        policy = policies.load(random_model, guidance=4.5)
    policy.attach_lora(2, 4.0, None, 0)
    row = benchmark.measure(policy, steps=3, images=2, micro=2, repeats=1)
    assert all(0 < row[key] < float("inf") for key in ("images_per_second", "seconds_per_step", "share"))
    assert row["transitions_per_step"] == 4
