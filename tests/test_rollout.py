"""Parts of a batch, put together, are the batch."""

from dataclasses import fields

import torch

from mmalign.flow import plan as plans
from mmalign.flow.sample import sample
from mmalign.latents import Room
from mmalign.policy.gaussian import GaussianFlow
from mmalign.rewards.judge import joined, score
from mmalign.sampling.kernels import FlowSde
from mmalign.seeds import gaussian, seed_of
from mmalign.training.rollout import stacked
from reward_models import Card, Prompt, Scores
from reward_models.regions import Region

PROMPTS = [Prompt(text, id=i) for i, text in enumerate(["a dog", "a cat", "a cow", "a bird", "a fish"])]


def test_walks_drawn_in_parts_are_those_drawn_together():
    flow = GaussianFlow()
    cond, t = flow.encode(["0.5", "-1.0", "0.25"]), flow.times(5)
    plan = plans.branch(t, FlowSde(), [0, 2], 3)

    def drawn(prompts, room=None):
        starts = [(p, m) for p in prompts for m in range(2)]
        noise = torch.stack([gaussian(flow.latent_shape, seed_of(item)) for item in starts])

        def draw(start, *key):
            return gaussian(flow.latent_shape, seed_of(starts[start], *key))

        return sample(flow.velocity, noise, cond, torch.tensor([p for p, _ in starts]), plan, draw, batch=1, room=room)

    whole = drawn([0, 1, 2])
    room = Room.of(len(whole.x), len(whole.finals), whole.columns, flow.latent_shape)
    third = [slice(0, len(values) // 3) for values in (whole.x, whole.finals)]
    rest = [slice(len(values) // 3, None) for values in (whole.x, whole.finals)]
    parts = stacked([drawn([0], room.part(*third)), drawn([1, 2], room.part(*rest))], room)
    pairs = [(whole, parts, field.name) for field in fields(whole) if field.name != "tree"]
    pairs += [(whole.tree, parts.tree, field.name) for field in fields(whole.tree)]
    for first, second, name in pairs:
        one, two = getattr(first, name), getattr(second, name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, name


class Telling:
    """Fails for cats; says something, and where, of prompts that are in `of`."""

    names, card = ("long", "odd"), Card("telling")

    def __init__(self, of):
        self.of = of

    def __call__(self, images, prompts):
        values = torch.tensor([[len(p.text), p.id % 2] for p in prompts]).float()
        failures = {i: "a cat" for i, p in enumerate(prompts) if "cat" in p.text}
        values[[*failures]] = torch.nan
        about = [p.text if p.text in self.of else "" for p in prompts]
        if not any(about):
            return Scores(self.names, values, failures=failures)
        return Scores(
            self.names, values, failures=failures, regions=images.mean(1),
            critiques=tuple(f"of {text}" if text else "" for text in about),
            requests=tuple(f"not {text}" if text else "" for text in about),
            boxes=tuple((Region((0, 0, 1, 2), 1.0, text),) if text else () for text in about),
        )  # fmt: skip


def test_images_seen_in_parts_are_those_seen_together():
    images = torch.rand(5, 3, 4, 4)
    scorers = {"all": Telling([p.text for p in PROMPTS]), "few": Telling(["a bird"]), "none": Telling([])}
    whole = score(images, PROMPTS, scorers)
    parts = joined([score(images[rows], PROMPTS[rows], scorers) for rows in (slice(0, 2), slice(2, 4), slice(4, 5))])
    for name, values in whole.parts.items():
        torch.testing.assert_close(parts.parts[name], values, equal_nan=True, atol=0, rtol=0)
    assert parts.failures == whole.failures == {1: "none: a cat"}
    assert (parts.boxes, parts.critiques, parts.requests) == (whole.boxes, whole.critiques, whole.requests)
    assert [*parts.maps] == [*whole.maps] == ["all", "few"]
    assert torch.equal(parts.maps["all"], whole.maps["all"])
    assert torch.equal(parts.maps["few"][2:4], whole.maps["few"][2:4])
    assert parts.maps["few"][[0, 1, 4]].isnan().all()  # not asked for there, and so no opinion
