"""Commands parse, call and print; what they do can be done from Python."""

import ast
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmalign.cli import app, options
from mmalign.errors import BadInput
from mmalign.evaluation.best_of_n import best_of
from mmalign.evaluation.generate import sample_images
from mmalign.refinement.loop import Settings
from mmalign.refinement.trace import refine_prompts
from mmalign.refinement.velocity import guided_in_boxes
from mmalign.runs.inference import load_policy
from reward_models import Prompt, load
from reward_models.tools.score_files import score_files

FILES = sorted(Path(app.__file__).parent.glob("*.py"))
PROMPTS = [Prompt("a red circle", {}, 3), Prompt("a cross", {}, 5)]


@pytest.fixture(scope="module")
def policy():
    return load_policy("assets/tiny_sd3")


def test_commands_are_short_and_know_nothing_of_the_app():
    names = {command.__name__ for command in app.COMMANDS}
    measured = set()
    for file in FILES:
        tree = ast.parse(file.read_text("utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        assert file.name in ("app.py", "__init__.py") or not any(name.startswith("mmalign.cli.app") for name in modules)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                measured.add(node.name)
                assert node.end_lineno - node.lineno + 1 <= 40, node.name
                assert node.end_lineno - node.body[1].lineno + 1 <= 25, node.name
    assert measured == names


def test_options_are_parsed():
    assert options.parse_seeds("3, 0,7") == [3, 0, 7]
    assert options.parse_boxes(["0,1.5,2,3"]) == [(0.0, 1.5, 2.0, 3.0)]
    assert options.parse_boxes(None) == options.parse_settings(None) == []
    assert options.parse_setting("a:B.key=1e-3") == ("a:B.key=1e-3", "a:B", "key", 1e-3)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (options.parse_seeds, ""),
        (options.parse_seeds, "1,1"),
        (options.parse_seeds, f"{2**63}"),
        (options.parse_seeds, "-1"),
        (options.parse_boxes, ["1,2,3"]),
        (options.parse_boxes, ["1,2,3,4,5"]),
        (options.parse_boxes, ["1,2,3,x"]),
        (options.parse_setting, "clip.model"),
        (options.parse_setting, "model=x"),
        (options.parse_prompt, " "),
    ],
)
def test_what_is_not_an_option_is_refused(parse, text):
    with pytest.raises(BadInput):
        parse(text)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "notes.doc").write_text("no picture")
    return folder


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.csv"])
def test_files_are_scored_from_python(pictures, tmp_path, name):
    warnings, counts = [], []

    def progress(rows, done, total):
        counts.append((done, total))
        return rows

    scorers = {"image_stats": load("image_stats")}
    result = score_files(pictures, scorers, tmp_path / name, warn=warnings.append, progress=progress)
    assert (result.scored, counts, result.summary["images"]) == (3, [(0, 3)], 3)
    assert warnings == [f"left out of {pictures}: 1 x .doc"]
    assert [row["image"] for row in result.rows] == ["0.png", "1.png", "2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", name]
    if name == "scores.jsonl":
        again = score_files(pictures, lambda: scorers, tmp_path / name)
        assert (again.scored, again.rows, again.summary) == (0, result.rows, result.summary)
        Image.new("RGB", (16, 16)).save(pictures / "3.png")
        score_files(pictures, scorers, tmp_path / name, progress=progress)
        assert counts[1:] == [(3, 4)]


def test_scorers_are_loaded_after_the_files_are_checked(tmp_path):
    with pytest.raises(ValueError, match="a folder or a table"):
        score_files(tmp_path / "nowhere", lambda: pytest.fail("loaded"), tmp_path / "s.jsonl")


def test_images_are_sampled_from_python(policy, tmp_path):
    rows = sample_images(policy, PROMPTS, [4, 9], 2, tmp_path)
    assert [Path(row["image"]).name for row in rows] == ["00003-4.png", "00003-9.png", "00005-4.png", "00005-9.png"]
    assert [row["seed"] for row in rows] == [4, 9, 4, 9]
    best = best_of(policy, PROMPTS, [[4, 9]] * 2, 2, load("shapes_critic"), "overall")
    (tmp_path / "best").mkdir()
    for row in best.save(PROMPTS, [4, 9], tmp_path / "best"):
        name = Path(row["image"]).name
        assert (tmp_path / "best" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert guided_in_boxes(policy, 1.0) is None


def test_prompts_are_refined_from_python(policy, tmp_path):
    settings = Settings(steps=3, images=2)
    result = refine_prompts(policy, load("shapes_critic"), PROMPTS, settings, tmp_path / "out")
    assert [row["id"] for row in result.rows] == [3, 5]
    assert result.summary["before"] == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "trace.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red circle", "a cross"]
    again = refine_prompts(policy, load("shapes_critic"), PROMPTS, settings, tmp_path / "out")
    assert again.summary == result.summary | {"before": 2}
    images = {prompt.id: torch.rand(1, 3, *policy.image_size) for prompt in PROMPTS}
    begun = refine_prompts(policy, load("shapes_critic"), PROMPTS, settings, tmp_path / "begun", images=images)
    assert all(row["rounds"][0]["attempt"] is None for row in begun.rows)
