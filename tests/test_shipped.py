"""Files that come with the project are found from any folder; what lies in the current folder comes first."""

from pathlib import Path

import pytest

from mmalign.config import load as configs
from mmalign.config.paths import config, locate
from mmalign.errors import BadInput
from reward_models import shipped

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "path", ["assets/tiny_sd3", "assets/prompts/train.jsonl", "./assets/pictures", "configs/accelerate/ddp.yaml"]
)
def test_a_shipped_file_is_located(path):
    assert Path(locate(path)) == ROOT / path


def test_a_column_stays_with_its_table():
    assert locate("assets/prompts/train.jsonl:prompt") == f"{ROOT}/assets/prompts/train.jsonl:prompt"


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "docs",
        "pyproject.toml",
        "tests/test_shipped.py",
        "assets/none",
        "assets-owner/model",
        "hf:assets/x:train",
    ],
)
def test_nothing_else_is(path):
    assert locate(path) == path


def test_what_lies_here_comes_first(here):
    mine = here / "assets/prompts/train.jsonl"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert locate("assets/prompts/train.jsonl") == "assets/prompts/train.jsonl"
    assert locate("assets/prompts/train.jsonl:prompt") == "assets/prompts/train.jsonl:prompt"
    assert locate("assets/prompts/test.jsonl") == f"{ROOT}/assets/prompts/test.jsonl"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart", "configs/quickstart.yaml"])
def test_a_config_is_named(name, here):
    assert config(name) == ROOT / "configs/quickstart.yaml"
    (here / "quickstart").mkdir()  # a run or a folder of that name is not a config
    assert config(name) == ROOT / "configs/quickstart.yaml"
    assert configs.load(name) == configs.load(ROOT / "configs/quickstart.yaml")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("quickstart.yaml", "quickstart"),
        ("quickstart.yaml", "quickstart.yaml"),
        ("quickstart", "quickstart"),
        ("mine.yaml", "mine"),
        ("mine.yml", "mine.yml"),
        ("folder/mine.yaml", "folder/mine"),
    ],
)
def test_a_config_that_lies_here_comes_first(file, name, here):
    (here / file).parent.mkdir(exist_ok=True)
    (here / file).touch()
    assert config(name) == Path(file)


def test_an_unknown_name_gets_the_known_ones_nearest_first():
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    for wrong, right in (("quikstart", "quickstart"), ("tiny_brunch.yaml", "tiny_branch"), ("z-image", "z_image")):
        with pytest.raises(BadInput, match=f"^{wrong}: no such file, .* nearest first: {right}, ") as refused:
            config(wrong)
        assert sorted(str(refused.value).split("nearest first: ")[1].split(", ")) == names


def test_a_missing_path_is_left_to_its_reader():
    assert config("configs/none.yaml") == Path("configs/none.yaml")
    with pytest.raises(BadInput, match=r"^configs/none\.yaml: No such file"):
        configs.load("configs/none.yaml")


def test_an_installed_package_has_its_files_inside(here, monkeypatch):
    (here / "with_files/assets").mkdir(parents=True)
    (here / "assets").mkdir()  # another package's, beside it
    (here / "with_files/__init__.py").touch()
    monkeypatch.syspath_prepend(here)
    assert shipped.folder("with_files") == here / "with_files"
    assert shipped.folder("mmalign") == shipped.folder("reward_models") == ROOT
