"""What a policy says that its text encoders read is what they read."""

import pytest
import torch
from tiny_pipelines import SOME

from mmalign import policy as policies


@pytest.mark.parametrize("name", SOME)
def test_a_text_is_read_up_to_where_its_policy_says(folders, name):
    policy = policies.load(folders(name))
    readers = policy.readers()
    encoders = [part for part in policy.pipe.components if part.startswith("text_encoder")]
    assert [reader.name for reader in readers] == [part for part in encoders if getattr(policy.pipe, part) is not None]
    longest = [next(n for n in range(2000) if reader.cuts("a " * (n + 1))) for reader in readers]
    embedded = lambda n: policy.texts(["a " * n])["tokens"]  # noqa: E731
    most = max(longest)
    assert torch.equal(embedded(most + 40), embedded(most + 60))
    assert embedded(most).shape != embedded(most - 1).shape or not torch.equal(embedded(most), embedded(most - 1))


def test_every_family_says_what_it_reads():
    for name, path in policies.POLICIES.items():
        assert "readers" in vars(policies.import_allowed(path, name, ours=True)), name
