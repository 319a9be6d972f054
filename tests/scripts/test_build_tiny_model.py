"""The builder of the embedded model: resumable, and its product is a pipeline we can drive."""

import build_tiny_model as build
import pytest
import torch
from torch import nn

from mmalign import policy as policies
from mmalign.data import prompts
from mmalign.evaluation import generate


def trained(work, interrupt_at=None):
    torch.manual_seed(0)
    module = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)

    def step_fn(step):
        if step == interrupt_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (module(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    work.mkdir(exist_ok=True)
    build.train("linear", step_fn, {"module": module, "optimizer": optimizer}, 10, work, save_every=3)
    return module.weight


def test_interrupted_training_resumes_to_the_same_weights(tmp_path):
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", interrupt_at=7)
    assert torch.equal(trained(tmp_path / "cut"), whole)


def test_every_word_is_one_token():
    tokenizer = build.new_tokenizer()
    ids = tokenizer('the text "O H"').input_ids
    assert len(ids) == 8
    assert tokenizer("an orange triangle right of a yellow circle").input_ids[0] == tokenizer.bos_token_id
    longest = max(len(tokenizer(build.caption(wants)).input_ids) for wants in build.requests())
    assert longest <= build.MAX_TOKENS


def test_a_small_build_is_a_pipeline(tmp_path):
    """All stages, minutely: a stock pipeline comes out, with prompt files, and it draws something."""
    build.main(tmp_path, tmp_path / "work", images=1, vae_steps=1, steps=1, batch=2, compiled=False)
    policy = policies.load(str(tmp_path / "tiny_sd3"))
    held_out = prompts.read(tmp_path / "prompts" / "validation.jsonl")
    training = prompts.read(tmp_path / "prompts" / "train.jsonl")
    assert len(held_out) >= 300
    assert not {p.text for p in held_out} & {p.text for p in training}
    images, _ = generate.generate(policy, held_out[:2], [[0], [0]], 2, 2)
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()
