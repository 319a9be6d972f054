"""Which layers a LoRA is put on, of each family."""

import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES
from tiny_policies import opened
from torch import nn

from mmalign.policy import lora, meta
from mmalign.policy.protocol import HoldsAdapters
from mmalign.refinement.velocity import regional_guidance
from reward_models import shipped

SIDES = "to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_qkv_mlp_proj"
OUT = r"to_out(\.0)?|to_add_out"
PROJECTION = re.compile(rf".*\.(attn2?|attention)\.({SIDES}|{OUT})")
BLOCK = re.compile(r"((single_)?transformer_blocks|layers|noise_refiner|context_refiner)\.\d+\.")


def linear(network) -> set[str]:
    return {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def adapted(network) -> set[str]:
    return {name for name, module in network.named_modules() if hasattr(module, "base_layer")}


def blocks(names) -> set[str]:
    return {match[0] for name in names if (match := BLOCK.match(name))}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_projection_of_every_block_is_adapted(folders, name):
    policy = opened(folders, name, 1.0)
    every = linear(policy.pipe.transformer)
    projections = {layer for layer in every if PROJECTION.fullmatch(layer)}
    assert projections == {layer for layer in every if re.search(r"\.(attn2?|attention)\.", layer)}
    policy.attach_lora(4, 8.0, None, seed=0)
    assert adapted(policy.pipe.transformer) == projections
    assert blocks(projections) == blocks(every) != set()
    assert len(policy.adapter()) == 2 * len(projections)


@pytest.mark.parametrize(
    ("architecture", "layers", "of"),
    [
        ("stable_diffusion_3.5_medium", 24 * 8 - 1 + 13 * 4, 24 * 14 - 3 + 13 * 4 + 7),
        ("flux.1_dev", 19 * 8 + 38 * 3, 504),
        ("flux.2_klein_base_4b", 5 * 8 + 20 * 2, 109),
        ("qwen_image", 60 * 8, 846),
        ("z_image", (30 + 2 + 2) * 4, 276),
    ],
)
def test_the_released_models_have_as_many_by_default(architecture, layers, of):
    policy = meta.load(str(shipped.folder("mmalign") / "assets/architectures" / architecture), dtype="bfloat16")
    assert len(linear(policy.pipe.transformer)) == of
    policy.attach_lora(16, 32.0, None, seed=0)
    assert len(adapted(policy.pipe.transformer)) == layers


def test_targets_are_ends_of_names_of_linear_layers_alone():
    """`to_out` is a linear layer's name in one block and a list's in another."""
    listed, plain = (
        {"to_out": nn.ModuleList([nn.Linear(4, 4)])},
        {"to_out": nn.Linear(4, 4), "auto_out": nn.Linear(4, 4)},
    )
    network = nn.ModuleDict({"one": nn.ModuleDict(listed), "two": nn.ModuleDict(plain)})
    assert [*lora.linear(network)] == ["one.to_out.0", "two.to_out", "two.auto_out"]
    assert [layer for layer in lora.linear(network) if lora._ends(layer, "to_out")] == ["two.to_out"]


def test_layers_of_unlike_rank_are_put_in_as_they_are(folders):
    policy = opened(folders, "FLUX.2-klein", 1.0)
    generator = torch.Generator().manual_seed(0)
    layers = lora.linear(policy.pipe.transformer)
    chosen = {"transformer_blocks.0.attn.to_q": 3, "single_transformer_blocks.0.attn.to_out": 5, "norm_out.linear": 5,
              "single_transformer_blocks.1.attn.to_qkv_mlp_proj": 1}  # fmt: skip
    matrices = {
        name: (torch.randn(rank, layers[name].in_features, generator=generator),
               torch.randn(layers[name].out_features, rank, generator=generator))
        for name, rank in chosen.items()
    }  # fmt: skip
    before = torch.get_rng_state()
    policy.insert_lora(matrices)
    assert torch.equal(torch.get_rng_state(), before)
    network = policy.pipe.transformer
    assert adapted(network) == set(chosen)
    for name, (a, b) in matrices.items():
        torch.testing.assert_close(network.get_submodule(name).get_delta_weight("default"), b @ a)
    torch.testing.assert_close(dict(lora.folded(network)), matrices)
    with pytest.raises(ValueError, match=r"norm_out\.linear: a change of shape \[2, 2\], and the model's weight is \["):
        opened(folders, "FLUX.2-klein", 1.0).insert_lora({"norm_out.linear": (torch.ones(1, 2), torch.ones(2, 1))})


def changed(network, name: str, seed: int = 3) -> None:
    """Every matrix of one adapter, disturbed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.parameters(network, name):
            p += 0.3 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_adapter_acts_only_where_it_is_asked_for(folders, name):
    policy = opened(folders, name, 1.0)
    x, t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.9, 0.4])
    cond, index = policy.encode(["a circle", "a square"]), torch.tensor([0, 1])

    def velocity(acts: str | None) -> torch.Tensor:
        with policy.acting(acts), torch.no_grad():
            return policy.velocity(x, t, cond, index)

    policy.attach_lora(4, 8.0, None, seed=0)
    network, base = policy.pipe.transformer, policy.fingerprint()
    changed(network, "default")
    before, off = velocity("default"), velocity(None)
    saved = policy.adapter()
    policy.attach_lora(2, 4.0, None, seed=7, name="reward")
    assert policy.adapters() == ["default", "reward"]
    assert isinstance(policy, HoldsAdapters)
    assert torch.equal(velocity("default"), before)
    assert torch.equal(velocity("reward"), off)  # B = 0
    assert policy.fingerprint() == base
    assert not {*policy.parameters()} & {*policy.parameters("reward")}
    assert policy.trained_besides() == []

    with policy.acting("reward"):
        policy.velocity(x, t, cond, index).square().mean().backward()
        assert all(p.grad is None for p in policy.parameters())
    assert sum(float(p.grad.abs().sum()) for p in policy.parameters("reward") if p.grad is not None) > 0
    changed(network, "reward", 5)
    assert torch.equal(velocity("default"), before)
    assert not torch.equal(velocity("reward"), off)
    assert all(torch.equal(value, saved[each]) for each, value in policy.adapter().items())
    assert [p.requires_grad for p in policy.parameters()] == [True] * len(saved)
    assert not any(p.requires_grad for p in policy.parameters("reward"))

    with policy.reference():
        assert torch.equal(velocity("reward"), velocity("reward"))
        with torch.no_grad():
            assert torch.equal(policy.velocity(x, t, cond, index), off)  # off again after another one has acted
    lora.remove(network, "reward")
    assert policy.adapters() == ["default"]
    assert torch.equal(velocity("default"), before)


def test_an_export_has_the_policy_s_adapter_alone(folders, tmp_path):
    policy = opened(folders, "Stable Diffusion 3", 1.0)
    policy.attach_lora(4, 8.0, None, seed=0)
    changed(policy.pipe.transformer, "default")
    alone = load_file(policy.export(tmp_path / "alone"))
    policy.attach_lora(2, 4.0, ["proj_out"], seed=7, name="reward")
    changed(policy.pipe.transformer, "reward", 5)
    both = load_file(policy.export(tmp_path / "both"))
    assert both.keys() == alone.keys()
    assert all(torch.equal(both[name], alone[name]) for name in both)
    policy.check_export(tmp_path / "both")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_mixture_is_linear_in_its_weights(folders, guidance):
    policy = opened(folders, "Stable Diffusion 3", guidance)
    for number, name in enumerate(("default", "b")):
        policy.attach_lora(2 + number, 4.0, None, seed=number, name=name)
        changed(policy.pipe.transformer, name, number)
    x, t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.9, 0.4])
    cond, index = policy.encode(["a circle", "a square"]), torch.tensor([0, 1])

    @torch.no_grad()
    def velocity(**weights: float) -> torch.Tensor:
        policy.mix(weights)
        return policy.velocity(x, t, cond, index)

    with torch.no_grad(), policy.acting("b"):
        alone = policy.velocity(x, t, cond, index)
    base, a, b = velocity(default=0.0, b=0.0), velocity(default=1.0, b=0.0), velocity(default=0.0, b=1.0)
    with torch.no_grad():
        before = policy.counts["forwards"]
        assert torch.equal(a, velocity(default=1.0))
        one = policy.counts["forwards"] - before
        assert torch.equal(b, alone)
        with policy.reference():
            assert torch.equal(policy.velocity(x, t, cond, index), base)
    assert policy.evaluations == 1
    torch.testing.assert_close(velocity(default=1.0, b=0.5), a + 0.5 * (b - base))
    torch.testing.assert_close(velocity(default=-1.0, b=2.0), base - (a - base) + 2 * (b - base))
    assert policy.evaluations == 3
    assert policy.counts["forwards"] > one > 0
    halved = regional_guidance(policy, torch.ones(policy.latent_shape[1:]), 0.5)
    assert torch.equal(velocity(default=0.5), torch.lerp(base.float(), a.float(), 0.5))
    policy.mix({"default": 1.0})
    with torch.no_grad():
        assert torch.equal(halved(x, t, cond, index), torch.lerp(base.float(), a.float(), 0.5))  # as --strength has it
