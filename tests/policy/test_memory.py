"""Ways to save memory: each acts, and changes nothing else; or is refused."""

from collections import Counter

import pytest
import torch
from run_config import cut_off, rows, run
from tiny_pipelines import FAMILIES, SOME
from torch import nn

from mmalign import policy as policies, train as trainer
from mmalign.config import load as configs
from mmalign.errors import BadInput
from mmalign.seeds import gaussian
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.training.setup import open_session

TEXTS = ["a red circle", "three green squares", "a cross"]


def velocity(policy, texts=TEXTS):
    x = torch.stack([gaussian(policy.latent_shape, i) for i in range(len(texts))])
    with torch.no_grad():
        return policy.velocity(x, torch.linspace(0.9, 0.1, len(texts)), policy.encode(texts), torch.arange(len(texts)))


def opened(settings, **changed):
    return open_session(configs.build(settings | changed, "test"))


# ------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_text_is_embedded_once_in_batches_of_one_size(random_model, monkeypatch, size):
    policy = policies.load(random_model)
    monkeypatch.setattr(type(policy), "together", size)
    batches, texts = [], policy.texts
    policy.texts = lambda some: batches.append([*some]) or texts(some)
    together = policy.encode(TEXTS)
    count = -(-4 // size)
    assert [text for batch in batches for text in batch] == [*TEXTS, "", *[""] * (count * size - 4)]
    assert [len(batch) for batch in batches] == [size] * count
    again = policy.encode([TEXTS[2], TEXTS[0], TEXTS[2]])
    assert len(batches) == count
    for name, value in again.prompts.items():
        assert torch.equal(value, together.prompts[name][[2, 0, 2]])
        assert torch.equal(again.empty[name], together.empty[name])


def test_embeddings_of_the_last_texts_are_kept(random_model):
    policy = policies.load(random_model)
    policy.save_memory(texts=2)
    policy.encode(["a", "b", "c"])
    policy.counts.clear()
    policy.encode(["c"])  # kept with the empty prompt, which every conditioning ends with
    assert policy.counts["texts"] == 0
    policy.encode(["a"])
    assert policy.counts["texts"] == 1
    policy.save_memory(texts=0)
    policy.encode(["a"])
    policy.counts.clear()
    policy.encode(["a"])
    assert policy.counts["texts"] == 2


class Part(nn.Module):
    """A part of a pipeline that writes down where it has been."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def to(self, device):
        self.log.append(str(device))
        return self


def test_parts_are_awake_only_while_they_work(random_model, monkeypatch):
    policy, log = policies.load(random_model), []
    monkeypatch.setattr(type(policy), "together", 1)
    policy.pipe.text_encoder, policy.pipe.text_encoder_2, policy.pipe.vae = Part(log), None, Part(log)
    policy.texts = lambda some: log.append("embed") or {"tokens": torch.zeros(1, 2, 2)}
    policy.unscaled = policy.pixels = lambda x: log.append("decode") or x.expand(-1, 3, -1, -1)
    policy.encode(TEXTS)
    assert log == ["embed"] * 4
    policy.offload = True
    log.clear()
    policy.encode(TEXTS)
    policy.encode(["another"])
    assert log == ["cpu", "embed", "cpu"]  # to where the transformer is, and back
    log.clear()
    policy.pipe.vae.dtype = torch.float32
    policy.decode(torch.zeros(1, 1, 2, 2))
    assert log == ["cpu", "decode", "decode", "cpu"]


def test_moving_off_is_refused_where_there_is_no_gpu(settings):
    with pytest.raises(BadInput, match="offload: the model is on the CPU"):
        opened(settings, offload=True)


# --------------------------------------------------------------------------------------------------- autoencoder


def test_tiles_cover_a_large_image(random_model):
    small, tiled = (policies.load(random_model) for _ in range(2))
    tiled.save_memory(tiling=True)
    x = torch.stack([gaussian((small.latent_shape[0], 32, 32), 0)])  # more than the network draws
    counts = Counter()
    decoder = tiled.pipe.vae.decoder.forward
    tiled.pipe.vae.decoder.forward = lambda z, *rest: counts.update([tuple(z.shape[2:])]) or decoder(z, *rest)
    one, two = small.decode(x), tiled.decode(x)
    assert max(side for shape in counts for side in shape) < 32
    assert one.shape == two.shape
    assert (one - two).abs().mean() < 0.1


def test_tiles_are_refused_where_the_autoencoder_has_none(random_model):
    policy = policies.load(random_model)
    policy.pipe.vae = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="a Linear cannot decode tile by tile"):
        policy.save_memory(tiling=True)


# ------------------------------------------------------------------------------------------------------ transformer


@pytest.mark.parametrize("name", SOME)
def test_weights_of_eight_bits_stay_near(name, tmp_path):
    torch.manual_seed(0)
    FAMILIES[name].build(tmp_path)
    whole, small = (policies.load(str(tmp_path), size=(32, 32), quantize=how) for how in (None, "int8"))
    assert velocity(whole).shape == velocity(small).shape
    off = (velocity(whole) - velocity(small)).norm() / velocity(whole).norm()
    assert 0 < off < 0.1
    assert whole.fingerprint() != small.fingerprint()
    before = velocity(small)
    small.attach_lora(4, 8.0, None, seed=0)
    assert torch.equal(velocity(small), before)
    x, t = torch.stack([gaussian(small.latent_shape, 0)]), torch.full((1,), 0.5)
    small.velocity(x, t, small.encode(["a"]), torch.zeros(1, dtype=torch.long)).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in small.parameters())


def test_a_run_learns_on_eight_bits(settings):
    out = run(settings, quantize="int8", precision="bfloat16", iterations=2)
    assert [row["iteration"] for row in rows(out / "metrics.jsonl")] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in rows(out / "metrics.jsonl"))


@pytest.mark.parametrize("how", ["nf4", "llm_int8"])
def test_bitsandbytes_is_refused_where_there_is_no_gpu(settings, how):
    with pytest.raises(BadInput, match=f"quantize: {how}: .*GPU"):
        opened(settings, quantize=how)


def test_attention_is_computed_by_the_named_back_end(settings, tmp_path):
    FAMILIES["FLUX.1-schnell"].build(tmp_path / "flux")
    settings |= {"model": str(tmp_path / "flux"), "size": (32, 32)}
    plain, math = opened(settings), opened(settings, attention="_native_math")
    names = {module.processor._attention_backend for module in math.policy.pipe.transformer.modules()
             if hasattr(getattr(module, "processor", None), "_attention_backend")}  # fmt: skip
    assert {name.value for name in names} == {"_native_math"}
    torch.testing.assert_close(velocity(math.policy), velocity(plain.policy), atol=1e-5, rtol=1e-4)


def test_attention_that_would_be_ignored_is_refused(settings):
    opened(settings, attention="native")
    with pytest.raises(BadInput, match="attention: _native_math: SD3Transformer2DModel computes"):
        opened(settings, attention="_native_math")


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("xformers", "install `xformers"), ("flash", "install `flash-attn"), ("sdpa", "must be one of")],
)
def test_attention_that_is_not_there_is_refused(settings, backend, reason):
    with pytest.raises(BadInput, match=f"attention: {backend}: .*{reason}"):
        opened(settings, attention=backend)


@pytest.mark.slow
def test_a_compiled_transformer_gives_the_same_velocity(random_model):
    plain, compiled = policies.load(random_model), policies.load(random_model)
    compiled.compile()
    torch.testing.assert_close(velocity(compiled), velocity(plain), atol=1e-5, rtol=1e-4)
    assert all(block._compiled_call_impl for block in compiled.pipe.transformer.transformer_blocks)


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_and_nothing_falls_back(settings, monkeypatch):
    """torch would run what exceeds its limit of recompilations as if it were not compiled."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    losses = []
    for compiled in (False, True):
        run = opened(settings, compile=compiled)
        losses.append([trainer.iterate(run, i)["loss"] for i in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# ------------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("name", SOME)
def test_half_precision_keeps_the_ratio_near_one(name, tmp_path):
    """Times and states stay float32; velocities in batches of another size differ by rounding alone."""
    torch.manual_seed(0)
    FAMILIES[name].build(tmp_path)
    policy = policies.load(str(tmp_path), size=(32, 32), dtype="bfloat16", guidance=FAMILIES[name].guidances[-1])
    assert policy.times(5).dtype == torch.float32
    together = velocity(policy)
    x = torch.stack([gaussian(policy.latent_shape, 1)])
    with torch.no_grad():
        alone = policy.velocity(x, torch.full((1,), 0.5), policy.encode(TEXTS), torch.tensor([1]))
    assert (together[1] - alone[0]).abs().max() < 0.05 * alone.abs().max()
    assert policy.decode(x).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ optimiser


def test_moments_of_eight_bits_learn_and_come_back(settings, tmp_path):
    long = dict(optimizer="adamw8bit", lora_rank=64, iterations=4)  # matrices of fewer than 4096 elements stay float32
    whole = run(settings, **long)
    states = {v.dtype for state in opened(settings, **long).learner.optimizer.state.values() for v in state.values()}
    assert not states
    cut = str(tmp_path / "cut")
    with cut_off(after=2):
        run(settings, **long, out=cut)
    resumed = run(settings, resume=True, **long, out=cut)
    ends = [(out / "checkpoints/000004/ema.safetensors").read_bytes() for out in (whole, resumed)]
    assert ends[0] == ends[1]


# --------------------------------------------------------------------------------------------------------------- memory


def test_work_that_does_not_fit_is_done_again_by_halves():
    tried = []

    def work(size):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("no")
        return size

    fit = AdaptiveBatch(20)
    assert fit(work) == 3
    assert tried == [20, 10, 5, 3]
    assert fit(work) == 3
    with pytest.raises(torch.OutOfMemoryError):
        fit(lambda size: (_ for _ in ()).throw(torch.OutOfMemoryError("never")))


GRPO = {"type": "grpo", "beta": 0.1}


def test_a_run_short_of_memory_ends_with_the_same_adapter(settings, tmp_path, monkeypatch):
    from mmalign.policy.sd3 import SD3Policy

    plain = run(settings, iterations=3, minibatches=2, objective=GRPO)
    network, decode = SD3Policy.network, SD3Policy.decode

    def short(self, x, t, cond):
        if len(x) > (2 if torch.is_grad_enabled() else 3):
            raise torch.OutOfMemoryError("no")
        return network(self, x, t, cond)

    def short_decode(self, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("no")
        return decode(self, x)

    monkeypatch.setattr(SD3Policy, "network", short)
    monkeypatch.setattr(SD3Policy, "decode", short_decode)
    cut = run(settings, iterations=3, minibatches=2, objective=GRPO, out=str(tmp_path / "cut"), held_out=None)
    last = rows(cut / "metrics.jsonl")[-1]
    assert (last["fit/batch"], last["fit/micro_batch"], last["fit/decode_batch"]) == (2, 2, 4)
    from safetensors.torch import load_file

    one, two = (load_file(out / "checkpoints/000003/adapter.safetensors") for out in (plain, cut))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-4)
