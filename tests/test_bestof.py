"""The best of N: which, what it costs, and what to expect of k."""

import json
from itertools import combinations
from statistics import mean

import pytest
import torch
from typer.testing import CliRunner

from mmalign import policy as policies
from mmalign.cli.app import app
from mmalign.config.paths import locate
from mmalign.errors import BadInput
from mmalign.evaluation import generate
from mmalign.evaluation.best_of_n import best_of, curve, expected_best
from reward_models import Card, Prompt, Scores, load

PROMPTS = [Prompt("a circle and a square", {}, 0), Prompt("a red cross", {}, 1), Prompt("two blue squares", {}, 2)]
SEEDS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def policy():
    return policies.load(locate("assets/tiny_sd3"), dtype="float32", device="cpu", guidance=1.0)


def test_the_expected_best_of_k_is_the_mean_over_all_choices():
    scores = torch.tensor([0.3, -1.0, 0.7, 0.7, 2.0])
    wanted = [mean(max(item) for item in combinations(scores.tolist(), k)) for k in range(1, 6)]
    assert expected_best(scores) == pytest.approx(wanted)
    assert expected_best(torch.tensor([torch.nan, 1.0, 3.0])) == [2.0, 3.0]
    assert curve(torch.tensor([[0.0, 1.0], [2.0, 2.0], [torch.nan, torch.nan]])) == [1.25, 1.5]


def test_the_best_is_the_plain_sample_with_the_best_score(policy):
    scorer = load("shapes_critic")
    results = best_of(policy, PROMPTS, SEEDS, 5, scorer, "overall", batch=4)
    images, of = generate.generate(policy, PROMPTS, SEEDS, 5, 64)
    scores = scorer(images, [PROMPTS[i] for i in of.tolist()]).column("overall").view(3, 6)
    torch.testing.assert_close(results.scores, scores)
    assert torch.equal(results.score, scores.max(1).values)
    torch.testing.assert_close(
        results.images, images.view(3, 6, 3, 32, 32)[torch.arange(3), scores.argmax(1)], atol=1e-4, rtol=0
    )
    assert (results.forwards, results.judgements) == (3 * 6 * 5, 18)


def test_pruning_goes_on_with_those_that_look_best_at_the_cost_it_says(policy):
    scorer = load("shapes_critic")
    results = best_of(policy, PROMPTS, SEEDS, 5, scorer, "overall", survivors=2, after=3)
    assert (results.forwards, results.judgements) == (3 * (6 * 4 + 2 * 2), 3 * (6 + 2))
    assert (~results.scores.isnan()).sum(1).tolist() == [2, 2, 2]
    whole = best_of(policy, PROMPTS, SEEDS, 5, scorer, "overall")
    had = ~results.scores.isnan()
    torch.testing.assert_close(results.scores[had], whole.scores[had])


class Half:
    """No score for every second image."""

    names = ("one",)
    card = Card("half", low=0, high=1)

    def __call__(self, images, prompts):
        values = torch.arange(len(images)).float()[:, None]
        values[::2] = torch.nan
        return Scores(self.names, values, failures=dict.fromkeys(range(0, len(images), 2), "away"))


def test_an_image_without_a_score_is_not_the_best(policy):
    results = best_of(policy, PROMPTS, SEEDS, 3, Half(), "one")
    assert results.member.tolist() == [5, 5, 5]
    assert sorted(results.failures) == list(range(0, 18, 2))
    alone = best_of(policy, PROMPTS[:1], [[1]], 3, Half(), "one")
    assert alone.score.isnan().all()
    assert alone.member.tolist() == [0]


def invoke(*arguments):
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def test_on_the_command_line(tmp_path):
    request = [
        "a circle and a square",
        "--seeds",
        "0,1,2,3",
        "--steps",
        4,
        "--best",
        "shapes_critic.overall",
        "--out",
        tmp_path,
    ]
    result = invoke(*request, "--json")
    assert result.exit_code == 0, result.output
    message = json.loads(result.stdout.splitlines()[-1])
    assert len(message["images"]) == 1
    assert message["images"][0]["score"] == pytest.approx(message["expected_best"][-1])
    assert message["forwards"] == 16
    assert len(list(tmp_path.glob("*.png"))) == 1
    pruned = json.loads(invoke(*request, "--keep", 1, "--after", 2, "--json").stdout.splitlines()[-1])
    assert pruned["forwards"] == 4 * 3 + 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--best", "clip"], "scorer.component is needed"),
        (["--best", "clip.beauty"], "that scorer gives cosine"),
        (["--best", "clip.cosine", "--keep", "1"], "both or neither"),
        (["--best", "clip.cosine", "--keep", "3", "--after", "2"], "fewer than the 2 seeds"),
        (["--keep", "1", "--after", "2"], "belong to --best"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, says, tmp_path):
    result = invoke("a circle", "--seeds", "0,1", *arguments, "--out", tmp_path / "out")
    assert isinstance(result.exception, BadInput)
    assert says in str(result.exception)
