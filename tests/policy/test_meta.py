"""The figures of a model without weights are those of the loaded one."""

import shutil
from functools import partial

import pytest
import torch
from tiny_pipelines import FAMILIES, SOME
from torch import nn

from mmalign import policy as policies
from mmalign.policy import loading, meta
from mmalign.policy.pipeline import Conditioning
from reward_models import shipped

ALL = pytest.mark.parametrize("name", SOME)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of a family, its loaded policy's folder and one with the configs alone."""
    made = {}

    def pair(name):
        if name not in made:
            torch.manual_seed(0)
            full, bare = (tmp_path_factory.mktemp(kind) for kind in ("full", "bare"))
            FAMILIES[name].build(full)
            ignored = shutil.ignore_patterns("*.safetensors", "*.bin", "tokenizer*", "merges*", "vocab*")
            shutil.copytree(full, bare, ignore=ignored, dirs_exist_ok=True)
            made[name] = str(full), str(bare)
        return made[name]

    return pair


@ALL
def test_sizes_times_and_parameters_are_the_loaded_models(pairs, name):
    full, bare = pairs(name)
    size = FAMILIES[name].sizes[1]
    real, weightless = policies.load(full, size=size), meta.load(bare, size=size)
    assert type(real) is type(weightless)
    assert (real.latent_shape, real.image_size) == (weightless.latent_shape, weightless.image_size)
    assert torch.equal(real.times(7), weightless.times(7))
    assert meta.weights(real) == meta.weights(weightless)
    for policy in (real, weightless):
        policy.attach_lora(4, 8.0, None, seed=0)
    assert [p.shape for p in real.parameters()] == [p.shape for p in weightless.parameters()]
    assert all(p.is_meta and p.dtype == torch.float32 for p in weightless.parameters())


@ALL
def test_texts_have_the_shapes_of_the_loaded_models(pairs, name):
    full, bare = pairs(name)
    real, weightless = policies.load(full), meta.load(bare)
    prompts = real.encode(["a red circle"]).prompts
    shapes = {**real.text_shapes()}
    assert prompts.keys() == shapes.keys() == loading.placeholder_texts(weightless, 1).keys()
    for key, value in prompts.items():
        if "mask" in prompts and key in ("mask", "tokens"):  # as long as the text
            assert value.shape[1] <= shapes[key][0]
            assert value.shape[2:] == shapes[key][1:]
        else:
            assert value.shape[1:] == shapes[key]


def allocated(work) -> int:
    """The most bytes above those at the start that the CPU's allocator gave out at once, as torch's profiler saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(torch.tensor(changes).cumsum(0).max())


@pytest.mark.slow  # alone in its process: what others left there is in the allocator's figures too
@ALL
def test_the_peak_is_the_allocators(pairs, monkeypatch, name):
    """Within a factor 1.3: kernels of the CPU have workspaces of their own, which weigh at these sizes."""
    full, bare = pairs(name)
    settings = {"guidance": FAMILIES[name].guidances[-1], "size": FAMILIES[name].sizes[0]}
    real, weightless = policies.load(full, **settings), meta.load(bare, **settings)
    for policy in (real, weightless):
        policy.attach_lora(4, 8.0, None, seed=0)
    monkeypatch.setattr(weightless, "text_shapes", real.text_shapes)  # tiny tokenizers have short limits
    texts = {
        key: torch.ones(value.shape, dtype=torch.long) if key == "mask" else torch.randn(value.shape)
        for key, value in loading.placeholder_texts(real, 1).items()
    }
    x, t, index = torch.randn(1, *real.latent_shape), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long)

    def work(learn):
        with torch.set_grad_enabled(learn):
            v = real.velocity(x, t, Conditioning(texts, texts), index)
            if learn:
                v.sum().backward()

    counts = {}
    for kind in ("rollout", "replay", "checkpointing"):
        for policy in (real, weightless):
            policy.save_memory(gradients=kind == "checkpointing")
        for p in real.parameters():
            p.grad = torch.zeros_like(p)  # gradients of parameters are not part of it
        counts[kind] = meta.peak(weightless, learn=kind != "rollout")
        assert 1 / 1.3 < counts[kind] / allocated(partial(work, kind != "rollout")) < 1.3
    assert counts["rollout"] < counts["checkpointing"] < counts["replay"]
    assert all(p.grad is None for p in weightless.parameters())


BILLIONS = {
    "stabilityai/stable-diffusion-3.5-medium": {"transformer": 2.24, "text_encoder_2": 0.695, "text_encoder_3": 4.76},
    "black-forest-labs/FLUX.1-dev": {"transformer": 11.90, "text_encoder": 0.123, "text_encoder_2": 4.76},
    "black-forest-labs/FLUX.2-klein-base-4B": {"transformer": 3.88, "text_encoder": 4.02},
    "black-forest-labs/FLUX.2-klein-4B": {"transformer": 3.88, "text_encoder": 4.02},
    "Qwen/Qwen-Image": {"transformer": 20.43, "text_encoder": 8.29},
    "Tongyi-MAI/Z-Image": {"transformer": 6.15, "text_encoder": 4.02},
    "Tongyi-MAI/Z-Image-Turbo": {"transformer": 6.15, "text_encoder": 4.02},
}


@pytest.mark.parametrize("hub", meta.ARCHITECTURES)
def test_the_shipped_architectures_have_the_published_sizes(hub):
    folder = shipped.folder("mmalign") / "assets" / "architectures" / meta.ARCHITECTURES[hub]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json"}
    policy = meta.load(str(folder), dtype="bfloat16")
    assert policy.image_size == (1024, 1024)
    assert all(
        p.is_meta for part in policy.pipe.components.values() if isinstance(part, nn.Module) for p in part.parameters()
    )
    sizes = meta.weights(policy)
    for part, billions in BILLIONS[hub].items():
        assert sizes[part] / 1e9 == pytest.approx(billions, rel=0.005)
    times = policy.times(10)
    assert times[0] == 1
    assert times[-1] == 0
    assert bool((times[1:] < times[:-1]).all())


def test_a_model_that_loads_itself_is_refused():
    with pytest.raises(ValueError, match="loads itself"):
        meta.load("own_policy:Mine")
