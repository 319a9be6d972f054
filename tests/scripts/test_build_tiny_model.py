"""The builder of the embedded model: resumable, and its product is a pipeline we can drive."""

from dataclasses import replace

import build_tiny_model as build
import pytest
import tiny_worlds
import torch
from tiny_worlds import (
    MAX_TOKENS,
    SHAPES,
    THINGS,
    WORLDS,
    build_names,
    build_pictures,
    draw_chunk,
    kinds_of,
    new_tokenizer,
)
from torch import nn
from transformers import CLIPTokenizer

from mmalign import policy as policies
from mmalign.config.paths import locate
from mmalign.evaluation import generate
from reward_models import load
from reward_models.things_world import NATURAL


@pytest.fixture(autouse=True)
def _few_captions(monkeypatch):
    monkeypatch.setattr(tiny_worlds, "OF_A_TAG", 1000)
    THINGS.training.cache_clear()
    yield
    THINGS.training.cache_clear()


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


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_every_word_is_one_token(world):
    tokenizer = new_tokenizer(world)
    texts = [p.text.lower().replace('"', ' " ') for part in ("validation", "test") for p in world.held_out(part)]
    ids = tokenizer(texts).input_ids
    assert [len(row) for row in ids] == [2 + len(text.split()) for text in texts]
    assert 2 + max(len(p.text.lower().replace('"', ' " ').split()) for p in world.training()) <= MAX_TOKENS


def test_the_words_of_shapes_are_those_of_the_embedded_model():
    embedded = CLIPTokenizer.from_pretrained(locate("assets/tiny_sd3/tokenizer"))
    assert new_tokenizer(SHAPES).get_vocab() == embedded.get_vocab()


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_pictures_are_right_and_of_training_captions(world, tmp_path):
    pictures, captions = build_pictures(world, tmp_path, 4)
    prompts = [world.training()[i] for i in captions.tolist()]
    assert pictures.shape == (4, 3, world.side, world.side)
    assert load(world.name)(pictures.float() / 255, prompts).values[:, 0].tolist() == [1.0] * 4
    assert not {p.text for p in world.held_out("validation")} & {p.text for p in world.training()}
    again, _ = build_pictures(world, tmp_path, 4)  # from the disk
    assert torch.equal(again, pictures)
    assert torch.equal(torch.from_numpy(draw_chunk(world.name, 0, 4)[0]), pictures)


def test_the_names_of_cells_are_what_the_caption_says(tmp_path):
    pictures, captions = build_pictures(THINGS, tmp_path, 8)
    names = build_names(THINGS, pictures, tmp_path, 8)
    for name, caption in zip(names, captions.tolist(), strict=True):
        nouns, colours, styles = (
            {kinds[number] for number in numbers.unique().tolist()}
            for kinds, numbers in zip(kinds_of(THINGS), name, strict=True)
        )
        wanted = THINGS.training()[caption].wants["include"]
        assert nouns == {"", *(item["class"] for item in wanted)}
        assert colours == {"", *(item.get("color", NATURAL) for item in wanted)}
        assert all(item.get("style", style) == style for item in wanted for style in styles - {""})
        assert ((name > 0).all(0) == (name > 0).any(0)).all()


@pytest.mark.parametrize("world", [THINGS, pytest.param(SHAPES, marks=pytest.mark.slow)], ids=["things", "shapes"])
def test_a_small_build_is_a_pipeline(world, tmp_path, monkeypatch, capsys):
    """All stages, minutely: a stock pipeline comes out, it draws something, and its card has its scores."""
    monkeypatch.setattr(build, "SAMPLER", 1)
    settings = dict(images=4, vae_steps=1, steps=2, cool=1, batch=2, compiled=False, scored=2)
    build.main(tmp_path, tmp_path / "work", world.name, **settings)
    policy = policies.load(str(tmp_path / world.model))
    images, _ = generate.generate(policy, world.held_out("validation")[:2], [[0], [0]], 2, 2)
    assert images.shape == (2, 3, world.side, world.side)
    assert torch.isfinite(images).all()
    assert sum(file.stat().st_size for file in (tmp_path / world.model).rglob("*")) < 25e6
    assert "| all | 0.000 | 0.000 |" in (tmp_path / world.model / "README.md").read_text()
    build.main(tmp_path, tmp_path / "work", world.name, images=4, vae_steps=1, looked=2)
    assert "flow-2.pt:2steps" in "".join(capsys.readouterr().out.split())  # lines are wrapped
    assert (tmp_path / "work/look-1.0.png").exists()
    build.main(
        tmp_path / "on", tmp_path / "work-on", world.name, begin=tmp_path / world.model, **settings | {"steps": 0}
    )
    folders = [tmp_path / world.model, tmp_path / "on" / world.model]
    weights = [file.relative_to(folders[0]) for file in folders[0].rglob("*.safetensors")]
    assert len(weights) == 4
    assert all(len({(folder / name).read_bytes() for folder in folders}) == 1 for name in weights)


def small_flow(work, steps, cool, guided=1.0):
    """The checkpoint after `steps` of a flow of one layer on eight pictures."""
    world = replace(THINGS, layers=1)
    tokenizer, latents = new_tokenizer(world), torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = tokenizer([p.text for p in world.training()[:8]], padding="max_length", return_tensors="pt").input_ids
    names = torch.randint(3, (8, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    work.mkdir(exist_ok=True)
    build.build_flow(world, latents, ids, names, tokenizer, None, work, steps, cool, guided, 4, "cpu", False)
    return torch.load(work / (f"flow-{steps}.pt" if cool else "flow.pt"), weights_only=True)


def test_training_continues_at_the_flat_rate_after_it_was_cooled(tmp_path):
    """Two steps, then two at a falling rate; a third flat step is then the same as without the cooled ones."""
    cut = tmp_path / "cut"
    assert small_flow(cut, 2, 0)["done"] == 2
    cooled, more, whole = small_flow(cut, 4, 2), small_flow(cut, 3, 0), small_flow(tmp_path / "whole", 3, 0)
    assert cooled["done"] == 4
    for key in ("flow", "average"):
        assert all(torch.equal(more[key][name], value) for name, value in whole[key].items())
        assert not torch.equal(cooled[key]["transformer.proj_out.weight"], more[key]["transformer.proj_out.weight"])


def test_guidance_is_learnt_only_where_the_caption_makes_a_difference(tmp_path):
    """A new flow ignores its caption, so its guidance adds nothing to the target; after ten steps it does."""
    for steps, cool, same in ((2, 2, True), (12, 2, False)):
        plain, guided = (small_flow(tmp_path / f"{steps}-{g}", steps, cool, g)["flow"] for g in (1.0, 3.0))
        assert all(torch.equal(guided[name], value) for name, value in plain.items()) == same


def test_a_resumed_build_learns_the_same_guidance(tmp_path, monkeypatch):
    """The teacher of a resumed run is the flow at the start of cooling, not at the interruption."""
    whole = small_flow(tmp_path / "whole", 12, 2, 3.0)
    clip, calls = build.nn.utils.clip_grad_norm_, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return clip(*arguments)

    monkeypatch.setattr(build.nn.utils, "clip_grad_norm_", interrupted)
    monkeypatch.setattr(build, "SAVE_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        small_flow(tmp_path / "cut", 12, 2, 3.0)
    resumed = small_flow(tmp_path / "cut", 12, 2, 3.0)
    assert all(torch.equal(resumed["flow"][name], value) for name, value in whole["flow"].items())


def test_weights_in_half_precision_have_the_gradients_of_the_others():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1)), torch.randn(64, 8)
    gradients = []
    for half in (False, True):
        fast = build.Halved(model, half)
        fast.begin()
        fast.backward(fast.module(x.to(fast.dtype)).float().square().mean())
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
    assert not torch.equal(*gradients)
