"""Every recipe in configs/: it loads, its prompts are there, its rewards exist, and two iterations of it run on the
tiny pipeline of its family, scaled down in nothing but size."""

import json
import re
from dataclasses import fields
from pathlib import Path
from zlib import crc32

import pytest
import torch
import yaml
from chats import chatting, completion, picture
from judge_texts import FULL
from run_config import rows
from tiny_pipelines import FAMILIES
from tiny_scorers import settings as tiny_settings

from mmalign import run as runs
from mmalign.checks import estimate
from mmalign.config import load as configs, paths
from mmalign.config.schema import Config
from mmalign.credit import Gain
from mmalign.data import prompts as prompt_files
from mmalign.policy import meta
from mmalign.sampling.plans import Branch, Ode, Window
from reward_models.scorers.geneval import GenEval
from reward_models.scorers.ocr import Ocr

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
MODELS = {  # a recipe's model -> its family
    "stabilityai/stable-diffusion-3.5-medium": "Stable Diffusion 3",
    "black-forest-labs/FLUX.1-dev": "FLUX.1-dev",
    "Qwen/Qwen-Image": "Qwen-Image",
    "Tongyi-MAI/Z-Image": "Z-Image",
}
RECIPES = [name for name, path in CONFIGS.items() if configs.load(path).model in MODELS]
DECIDES = {
    "size", "prompts_per_iteration", "seeds", "guidance", "steps", "plan", "kernel", "credit", "advantage", "loss",
    "objective", "lora_rank", "lora_alpha", "learning_rate", "weight_decay", "max_grad_norm", "minibatches", "ema",
    "eval_steps", "precision",
}  # fmt: skip
METHODS = {"kernel": "noise", "advantage": "scale", "loss": "clip"}  # and of each the setting that decides
OF_STEPS = {"kernel", "credit", "loss"}  # these decide where stochastic steps are trained on
BLIND = {"geneval": GenEval, "ocr": Ocr}  # they find nothing in what random weights draw


# --------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "align"])  # evaluated on what it trains on
def test_a_recipe_is_complete_and_its_prompts_are_apart(name):
    c = configs.load(CONFIGS[name])
    train, held_out = (prompt_files.read(paths.locate(path)) for path in (c.prompts, c.held_out))
    assert c.model in MODELS or (ROOT / c.model).is_dir()
    assert len(train) >= 300
    assert len(train) >= c.prompts_per_iteration
    assert len(held_out) >= 100
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert c.out == f"runs/{name}"
    assert set(c.scorers) <= {*c.trained, *c.watch}


@pytest.mark.parametrize("name", RECIPES)
def test_what_decides_a_result_stands_in_the_file(name):
    """Not left to defaults, which may change; and the file says that it was not run."""
    text = CONFIGS[name].read_text()
    values = yaml.safe_load(text)
    objective = configs.load(CONFIGS[name]).objective
    idle = (set() if objective.stochastic else OF_STEPS) | ({"advantage"} - objective.uses)
    assert set(values) >= DECIDES - idle
    assert all(setting in values[method] for method, setting in METHODS.items() if method not in idle)
    assert "not run" in " ".join(text.replace("#", "").lower().split())


# ------------------------------------------------------------------------------------------------------ what is run


class Bright:
    """In place of a scorer that sees nothing in noise: the same components, each of them how bright the image is."""

    def __init__(self, name: str, names: list[str]):
        from reward_models import Card

        self.names, self.card = tuple(names), Card(name, licence="Apache-2.0", low=0, high=1)

    def __call__(self, images, prompts):
        from reward_models.scoring import each

        return each(images, prompts, self.names, lambda x, _: x.mean((1, 2, 3))[:, None].repeat(1, len(self.names)))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """The tiny pipeline of a family, built once."""
    known: dict[str, str] = {}

    def of(family: str) -> str:
        if family not in known:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("model")
            FAMILIES[family].build(folder)
            known[family] = str(folder)
        return known[family]

    return of


@pytest.fixture(scope="session")
def judge_server():
    """A server that gives all aspects of a picture one score, drawn by its pixels."""

    def answer(request):
        score = 1 + 3 * (crc32(picture(request).tobytes()) % 31) / 30
        return completion(re.sub(r"Score: \S+", f"Score: {score:.1f}", FULL))

    with chatting(answer) as (url, _):
        yield url


@pytest.fixture(scope="session")
def tiny_judges(tmp_path_factory, judge_server):
    """Settings of a recipe's scorer with which it is small and here; its components are those of the real class."""
    known: dict[str, dict] = {}

    def of(name: str, given: dict) -> dict:
        if name == "rational":
            return given | {"url": judge_server}
        if name in BLIND:
            return {"scorer": f"{__name__}:Bright", "name": name, "names": BLIND[name].names}
        if name not in known:
            known[name] = tiny_settings(name, tmp_path_factory.mktemp("scorer") / name)
        return known[name]

    return of


def first_lines(path: str, number: int, out: Path) -> str:
    lines = Path(paths.locate(path)).read_text().splitlines()[:number]
    out.write_text("\n".join(lines) + "\n")
    return str(out)


def scaled_plan(plan) -> dict[str, int]:
    few = {"children": min(plan.children, 3), "every": 1}
    return {name: value for name, value in few.items() if name in {field.name for field in fields(plan)}}


def scaled(c: Config, folder: Path, model: str, judges) -> Config:
    """The recipe with everything but its size: fewer prompts, trajectories and iterations, images of 32 px, scorers of
    a few thousand weights. Plan, kernel, steps, credit, loss, objective and the rule of combining stay."""
    small = dict(
        model=model,
        size=(32, 32),
        prompts=first_lines(c.prompts, 4, folder / "train.jsonl"),
        held_out=first_lines(c.held_out, 2, folder / "held_out.jsonl"),
        out=str(folder / "run"),
        scorers={name: judges(name, c.scorers.get(name, {})) for name in (*c.trained, *c.watch)},
        iterations=2,
        prompts_per_iteration=2,
        rollout_parts=min(c.rollout_parts, 2),
        seeds=min(c.seeds, 2),
        plan=c.model_dump()["plan"] | scaled_plan(c.plan),
        minibatches=1,
        lora_rank=2,
        lora_alpha=2 * c.lora_alpha / c.lora_rank,
        precision="float32",
        offload=False,
        batch=128,
        micro_batch=128,
        decode_batch=128,
        eval_every=0,
        eval_seeds=1,
        eval_steps=2,
        checkpoint_every=2,
    )
    return configs.build(c.model_dump() | small, "scaled")


def all_states(c: Config) -> bool:
    return isinstance(c.credit, Gain) and c.credit.states == "all"


def expected(c: Config, iteration: int) -> tuple[list[int], int, int]:
    """In closed form: the stochastic steps of an iteration, the rows learnt and the images scored."""
    starts = c.prompts_per_iteration * c.seeds
    if isinstance(c.plan, Ode):
        return [], starts * getattr(c.objective, "draws", 1), starts
    if isinstance(c.plan, Branch):
        routes = len(c.plan.steps) * c.plan.children
        return [*c.plan.steps], starts * routes, starts * routes
    steps, routes = [*range(c.steps - 1)], c.plan.children
    if isinstance(c.plan, Window):
        first = c.plan.steps[0] + (iteration if c.plan.moves == "progressive" else 0)
        steps = [first + k for k in range(c.plan.steps[1] - c.plan.steps[0])]
    images = c.steps if all_states(c) else 1  # the last but one is completed by the trajectory itself
    return steps, starts * routes * len(steps), starts * routes * images


def of_steps(c: Config, row: dict, noisy: list[int], iteration: int) -> None:
    """What an iteration on stochastic steps must show, on policy."""
    assert (row["kl/" + str(noisy[0])] >= 0) if c.objective.beta else ("kl" not in row)
    assert [f"gain/{k}" in row for k in noisy] == [all_states(c)] * len(noisy)
    assert abs(row["ratio"] - 1) < 1e-6
    assert row["clipped_low"] == row["clipped_high"] == 0


def of_images(c: Config, row: dict, noisy: list[int], iteration: int) -> None:
    """What an iteration on noised images must show: the policy that draws them has fallen behind where it lags, and
    the adapter leaves the model without it."""
    starts, rows, lags = c.prompts_per_iteration * c.seeds, row["transitions"], c.objective.lag.most > 0
    assert row["forwards"] == starts * c.steps + rows * (1 + lags)  # of the model without adapter, and the lagging one
    assert row["replay_forwards"] == rows
    assert {f"error/{k}" for k in range(c.objective.draws)} <= set(row)
    assert (row["moved"] > 0) == (c.objective.lag.at(iteration - 1) > 0)
    assert (row["drift"] > 0) == (iteration > 0)
    if "ratio" in row:
        assert abs(row["ratio"] - 1) < 1e-6
        assert row["clipped_low"] == row["clipped_high"] == 0


def of_graph(c: Config, row: dict, noisy: list[int], iteration: int) -> None:
    """What an iteration with a gradient through the reward must show: an image a row, each scored once more."""
    starts, replayed = c.prompts_per_iteration * c.seeds, row["transitions"] * c.objective.way.width
    assert row["forwards"] == starts * c.steps
    assert row["replay_forwards"] == 2 * replayed  # of the model without adapter too
    assert row["rewards_in_graph"] == row["transitions"] * len(c.trained)
    assert row["graded"] == 1
    assert row["reward_in_graph"] == pytest.approx(row["reward"], abs=0.01)  # the images are those of the rollout
    assert (row["drift"] > 0) == (iteration > 0)


def kind(c: Config):
    return of_steps if c.objective.stochastic else of_graph if c.objective.decoded else of_images


@pytest.mark.parametrize("name", RECIPES)
def test_two_iterations_of_a_recipe(name, tmp_path, tiny_models, tiny_judges):
    recipe = configs.load(CONFIGS[name])
    c = scaled(recipe, tmp_path, tiny_models(MODELS[recipe.model]), tiny_judges)
    out = runs.train(c)
    result = rows(out / "metrics.jsonl")
    assert len(result) == 2
    for iteration, row in enumerate(result):
        assert all(value == value and abs(value) != float("inf") for value in row.values()), row
        steps, transitions, images = expected(c, iteration)
        noisy = sorted(int(key.removeprefix("std/")) for key in row if key.startswith("std/"))
        if isinstance(c.plan, Window) and c.plan.moves == "random":  # each prompt has its window
            first, stop = c.plan.steps
            assert set(noisy) <= set(range(first, c.steps // 2 + stop - first - 1))
        else:
            assert noisy == steps
        assert row["transitions"] == transitions
        assert row["rewards"] - row.get("rewards_in_graph", 0) == images * len(c.trained)
        assert row["group_std"] > 0
        assert row["grad_norm"] > 0
        assert row["failed"] == 0
        assert ("saturated_groups" in row) == (c.advantage is not None and c.advantage.saturated is not None)
        kind(c)(c, row, noisy, iteration)
    before, after = rows(out / "evaluations.jsonl")
    assert {*recipe.rewards} <= set(before)
    assert set(recipe.watch) <= {key.partition(".")[0] for key in after}
    assert json.loads((out / "credit.jsonl").read_text().splitlines()[0])


# ------------------------------------------------------------------------------------------- at its real size


@pytest.fixture(scope="module")
def peaks():
    return {}


# what a forward of the larger families keeps takes ten seconds each to follow
LARGE = ("flux_mixgrpo_hps", "qwen_image_ocr", "z_image")


@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.slow) if k in LARGE else k for k in RECIPES])
def test_every_recipe_is_estimated(name, peaks, monkeypatch):
    """With its real schedule and sizes, from configs alone. What a forward keeps, which takes seconds to follow, is
    asked once for a model, size and guidance."""
    real = meta.peak

    def peak(policy, learn):
        key = (type(policy), policy.latent_shape, policy.true_guidance, learn)
        if key not in peaks:
            peaks[key] = real(policy, learn=learn)
        return peaks[key]

    monkeypatch.setattr(meta, "peak", peak)
    c = configs.load(CONFIGS[name])
    result = estimate.estimate(c, gpus=8)
    assert sum(rank["prompts"] for rank in result["ranks"]) == c.prompts_per_iteration
    assert result["run"]["rewards"] == sum(rank["rewards"] for rank in result["run_ranks"]) > 0
    assert result["memory"]["device"]["total"] < 80 * 2**30
