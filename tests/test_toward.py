"""Guidance at sampling by the gradient of a scorer: the closed form of a linear reward, and no guidance to the bit."""

import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import mmalign
from mmalign import policy as policies
from mmalign.cli.app import app
from mmalign.errors import BadInput, Failed
from mmalign.evaluation.evaluate import noise_seed
from mmalign.evaluation.generate import generate
from mmalign.evaluation.toward import Term, Toward, moved
from mmalign.flow.plan import ode
from mmalign.flow.sample import sample
from mmalign.policy.gaussian import GaussianFlow
from mmalign.refinement.redraw import Attempt, Base, draw
from mmalign.seeds import gaussian
from reward_models import Card, Prompt, Scores, load
from reward_models.cache import Cached
from reward_models.images import from_file, to_uint8

CAPTIONS = ["a red circle left of a green square", "two blue triangles", "a purple cross", "a yellow circle"]


class Linear:
    """The reward a . image; `other` ignores the image."""

    names, card = ("linear", "other"), Card("linear")

    def __init__(self, a=None, problem=""):
        self.a = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(7)) if a is None else a
        self.problem = problem

    def in_graph(self, images, prompts):
        if self.problem:
            raise ValueError(self.problem)
        value = (images * self.a).flatten(1).sum(1)
        return torch.stack([value, torch.ones_like(value)], 1)

    def __call__(self, images, prompts):
        return Scores(self.names, self.in_graph(images, prompts))


def walked(flow, velocity, steps=6):
    start = torch.stack([gaussian(flow.latent_shape, i) for i in range(3)])
    return sample(velocity, start, flow.encode(["0.5"]), torch.zeros(3, dtype=torch.long), ode(flow.times(steps)))


def guided(flow, **settings):
    toward = Toward((Term(settings.pop("scorer", Linear()), settings.pop("component", "")),), **settings)
    return walked(flow, toward.guided(flow, flow.velocity, [Prompt("0.5")]))


def at(flow, velocity, t):
    x = torch.stack([gaussian(flow.latent_shape, i) for i in range(len(t))])
    return x, velocity(x, torch.tensor(t), flow.encode(["0.5"]), torch.zeros(len(t), dtype=torch.long))


def test_a_latent_moves_along_its_gradient_by_its_length():
    x0 = torch.stack([torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), -1.0), torch.ones(3, 4, 4)])
    gradient = torch.zeros_like(x0)
    gradient[0, 1, 2, 3], gradient[1, 0, 0, 0] = 1e-9, -5.0
    result = moved(x0, gradient, 0.25)
    step = torch.zeros_like(x0)
    step[0, 1, 2, 3], step[1, 0, 0, 0] = 0.25 * 2 * math.sqrt(48), -0.25 * math.sqrt(48)
    torch.testing.assert_close(result - x0, step, rtol=1e-6, atol=1e-6)
    assert torch.equal(result[2], x0[2])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_linear_reward_moves_the_prediction_along_its_direction(batch):
    flow, reward, t = GaussianFlow(), Linear(), [0.5, 0.6, 0.61, 0.9]
    toward = Toward((Term(reward),), push=0.3, since=0.6, batch=batch)
    x, plain = at(flow, flow.velocity, t)
    _, v = at(flow, toward.guided(flow, flow.velocity, [Prompt("0.5")]), t)
    time = torch.tensor(t)[:, None, None, None]
    before, after = x - time * plain, x - time * v
    unit = reward.a / reward.a.norm()
    wanted = before[:2] + 0.3 * before[:2].flatten(1).norm(dim=1)[:, None, None, None] * unit
    torch.testing.assert_close(after[:2], wanted, rtol=0, atol=1e-5)
    assert torch.equal(v[2:], plain[2:])  # earlier than 0.6
    assert flow.counts["decodes"] == 2


def test_a_sum_moves_along_the_weighted_sum_of_the_directions():
    """Each scorer sees an image once, however many of its components act; a cache does not hide gradients."""
    one, two = Linear(), Linear(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(8)))
    flow, calls = GaussianFlow(), []
    two.in_graph = lambda images, prompts: calls.append(len(images)) or Linear.in_graph(two, images, prompts)
    terms = (Term(one, "linear", 2.0, "one"), Term(two, "linear", -0.5, "two"), Term(two, "other", 3.0, "two"))
    toward = Toward(terms, push=0.3, since=1.0)
    gradient = toward.gradient(flow, torch.zeros(2, *flow.latent_shape), [Prompt("0.5")] * 2)
    torch.testing.assert_close(gradient * 8, (2 * one.a - 0.5 * two.a).expand(2, -1, -1, -1), rtol=1e-5, atol=1e-6)
    assert calls == [2]
    assert str(toward) == f"2 one.linear {one.card.version} + -0.5 two.linear {two.card.version} + " + (
        f"3 two.other {two.card.version}, push 0.3, from 1"
    )


def test_gradients_behind_a_cache_are_taken(tmp_path):
    scorer = Linear()
    assert Term(Cached(scorer, tmp_path / "scores.db")).scorer is scorer


@pytest.mark.parametrize("none", [{"push": 0.0}, {"since": 0.0}, {"since": 0.1}])
def test_no_guidance_is_the_plain_ode_to_the_bit_and_decodes_nothing(none):
    flow = GaussianFlow()
    plain = walked(flow, flow.velocity)
    same = guided(flow, **{"push": 0.5, "since": 0.5, **none})
    assert torch.equal(same.finals, plain.finals)
    assert not flow.counts["decodes"]


def test_a_reward_that_ignores_the_image_changes_nothing():
    flow = GaussianFlow()
    plain = walked(flow, flow.velocity)
    assert torch.equal(guided(flow, component="other", push=0.5, since=1.0).finals, plain.finals)


def test_states_before_the_guidance_are_unchanged_and_the_last_step_ends_at_the_moved_latent():
    flow, reward = GaussianFlow(), Linear()
    plain = walked(flow, flow.velocity)
    late = guided(flow, scorer=reward, push=0.2, since=0.2)  # times 1, 5/6, ..., 1/6: the last step alone
    assert torch.equal(late.x[:, :-1], plain.x[:, :-1])
    torch.testing.assert_close(late.finals, moved(plain.finals, reward.a.expand_as(plain.finals), 0.2))


class Signed(Linear):
    """Up or down the direction, as the ground truth of the prompt says."""

    def in_graph(self, images, prompts):
        signs = torch.tensor([float(prompt.wants["sign"]) for prompt in prompts])
        return super().in_graph(images, prompts) * signs[:, None]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_each_image_goes_toward_the_score_for_its_prompt(batch):
    flow, reward, signs = GaussianFlow(), Signed(), (1, -1, 0)
    prompts = [Prompt("0.5", {"sign": sign}, number) for number, sign in enumerate(signs)]
    plain, owner = generate(flow, prompts, [[0, 1]] * 3, 6, batch)
    images, _ = generate(flow, prompts, [[0, 1]] * 3, 6, batch, toward=Toward((Term(reward),), push=0.1, since=0.2))
    rise = ((images - plain) * reward.a).flatten(1).sum(1)
    assert rise.sign().tolist() == [signs[i] for i in owner.tolist()]


TERM = {"scorer": Linear(), "component": "", "weight": 1.0}


def terms_of(settings):
    return (Term(*settings),)


def test_bad_guidance_is_one_line():
    for settings, line in (
        ({"push": -1.0}, "push -1.0: a number from 0"),
        ({"push": math.nan}, "push nan: a number from 0"),
        ({"since": 1.5}, "from 1.5: a time from 1"),
        ({"component": "nothing"}, "linear.nothing: that scorer gives linear, other"),
        ({"batch": 0}, "at least one latent"),
        ({"scorer": load("jpeg_size")}, "toward jpeg_size: jpeg_size has no gradients"),
        ({"weight": 0.0}, "linear.linear: weight 0.0: a number other than 0"),
        ({"weight": math.nan}, "weight nan: a number other than 0"),
        ({"terms": (Term(Linear()), Term(Linear(), "linear", 2.0))}, "a component is there twice"),
    ):
        term = [settings.pop(key, default) for key, default in TERM.items()]
        with pytest.raises(BadInput, match=line):
            Toward(settings.pop("terms", None) or terms_of(term), **settings)


def test_a_prompt_that_cannot_be_scored_ends_the_sampling_in_one_line():
    with pytest.raises(Failed, match=r"toward linear: it names no picture"):
        guided(GaussianFlow(), scorer=Linear(problem="it names no\npicture"), push=0.5)
    with pytest.raises(Failed, match=r"linear.linear or its gradient not finite; prompts: 0 '0.5'"):
        guided(GaussianFlow(), scorer=Linear(torch.full((3, 4, 4), math.nan)), push=0.5)


# ------------------------------------------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def embedded():
    return policies.load("assets/tiny_sd3", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompts():
    return [Prompt(text, {}, number) for number, text in enumerate(CAPTIONS)]


def drawn(policy, prompts, toward=None, batch=64):
    return generate(policy, prompts, [[0, 1]] * len(prompts), 6, batch, toward=toward)[0]


def test_clip_rises_by_its_guidance_and_the_batch_changes_no_image(embedded, prompts):
    clip = load("clip")
    repeated = [prompt for prompt in prompts for _ in range(2)]
    plain = drawn(embedded, prompts)
    images = drawn(embedded, prompts, Toward((Term(clip),)))
    assert (clip(images, repeated).values - clip(plain, repeated).values).mean() > 0.01
    assert torch.equal(images, drawn(embedded, prompts, Toward((Term(clip),))))
    others = drawn(embedded, prompts, Toward((Term(clip),), batch=1), 3)
    assert (images - others).norm() < 2e-6 * images.norm()  # a forward rounds by its rows; 4e-7 without guidance
    assert torch.equal(drawn(embedded, prompts, Toward((Term(clip),), push=0.0)), plain)


def test_on_the_command_line(tmp_path):
    def sampled(*options):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        line = ["sample", CAPTIONS[0], "--steps", "4", "--out", str(out), "--json", *options]
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 0, result.output
        return (out / "00000-0.png").read_bytes()

    plain = sampled()
    assert sampled("--toward", "clip", "--push", "0") == plain
    guided = sampled("--toward", "clip.cosine")
    assert guided != plain
    assert sampled("--toward", "clip=1", "--toward", "image_stats.brightness=0.5") not in (plain, guided)
    assert sampled("--toward", "clip", "--set", "clip.batch=1", "--from", "0.9", "--best", "shapes_critic.overall") == (
        guided
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["sample", "a circle", "--push", "1"], "--push and --from belong to --toward"),
        (["sample", "a circle", "--toward", "clip", "--from", "2"], "from 2.0: a time"),
        (["sample", "a circle", "--toward", "clip.beauty"], "toward clip.beauty: that scorer gives cosine"),
        (["sample", "a circle", "--toward", "jpeg_size"], "toward jpeg_size: jpeg_size has no gradients"),
        (["sample", "a circle", "--toward", "clip=much"], "--toward 'clip=much' must look like scorer.component"),
        (["sample", "a circle", "--toward", "clip", "--toward", "clip.cosine=2"], "a component is there twice"),
        (["refine", "a circle", "--toward", "clip"], "moves: toward goes along the gradient of a scorer"),
        (["refine", "a circle", "--moves", "toward"], "moves: toward goes along the gradient of a scorer"),
        (["evaluate", "--toward", "clip", "--reference", "r.json"], "leave out --toward"),
    ],
)
def test_mistakes_on_the_command_line(line, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, line)
    assert isinstance(result.exception, BadInput)
    assert says in str(result.exception)


def test_every_python_function_takes_it(embedded, prompts):
    toward = mmalign.toward("clip")
    images = drawn(embedded, prompts[:1], toward)
    best = mmalign.best_of_n(embedded, prompts[:1], "clip.cosine", [0, 1], 6, toward=toward)
    assert torch.equal(best.images[0], images[best.member[0]])
    both = mmalign.toward({"clip.cosine": 1.0, "image_stats.brightness": 0.5})
    assert not torch.equal(drawn(embedded, prompts[:1], both), images)
    result = mmalign.evaluate(embedded, prompts[:1], "clip", seeds=1, steps=6, toward=mmalign.toward(load("clip")))
    seed = noise_seed(prompts[0], 0)
    assert torch.equal(result.images, generate(embedded, prompts[:1], [[seed]], 6, 1, toward=toward)[0])
    with pytest.raises(BadInput, match=r"toward redness: .* has no gradients"):
        mmalign.toward(redness)


def redness(images, prompts):
    return [0.0] * len(images)


def test_a_move_of_refine_goes_toward_the_first_prompt(embedded, prompts, tmp_path):
    toward = mmalign.toward("clip", push=0.1)
    moves = {"moves": ["toward"], "good": 2.0, "rounds": 2, "steps": 6, "by": "overall", "toward": toward}
    result = mmalign.refine(embedded, prompts[:2], out=tmp_path / "out", **moves)
    for row, prompt in zip(result.rows, prompts[:2], strict=True):
        first, second = row["rounds"]
        assert [*second["moves"]] == ["toward"]
        assert (first["attempt"]["toward"], second["attempt"]["toward"]) == (False, True)
        assert second["forwards"] == first["forwards"] == 6
        images = generate(embedded, [prompt], [[second["attempt"]["seed"]]], 6, 1, toward=toward)[0]
        assert torch.equal(to_uint8(images)[0], to_uint8(from_file(tmp_path / "out" / second["image"]))[0])
    with pytest.raises(BadInput, match="toward"):
        mmalign.refine(embedded, prompts[:2], out=tmp_path / "out", **moves | {"toward": mmalign.toward("clip")})


def test_only_what_is_redrawn_moves(embedded, prompts):
    known = torch.randn(embedded.latent_shape, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(embedded.latent_shape[1:])
    mask[:4] = 1
    attempt = Attempt(prompts[0].text, 1, 1.0, toward=True)
    latents, _ = draw(embedded, [attempt], [Base(known, mask)], 6, 1, mmalign.toward("clip", 0.1), prompts[:1])
    plain, _ = draw(embedded, [replace(attempt, toward=False)], [Base(known, mask)], 6, 1)
    torch.testing.assert_close(latents[0, :, 4:], known[:, 4:])
    assert (latents - plain)[0, :, :4].abs().mean() > 0.01
