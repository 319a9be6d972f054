"""The arrows of the design, read from the imports of every module."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "mmalign").rglob("*.py"), *(ROOT / "reward_models").rglob("*.py")])
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
ORDER = (  # of the parts of mmalign: each imports only those before it
    "errors", "activity", "latents", "types", "routes", "seeds", "flow", "credit", "selection", "learn", "extension",
    "sampling", "policy",
    "objectives", "rewards", "data", "distributed", "config", "runs", "evaluation", "pages", "refinement", "reporting",
    "training", "train", "run", "checks", "given", "api", "cli",
)  # fmt: skip
MATHS = ("flow", "credit", "selection", "learn", "extension", "sampling", "objectives")
LORA = {"reward_models.training.lora", "reward_models.training.parrot.student"}  # on image-text models
ABOUT_FILES = ("allowlist", "files", "limits", "model_folders", "lengths", "weights")  # nothing that scores


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def below(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == p or name.startswith(p + ".") for p in packages)}


def modules_of(path: Path) -> set[str]:
    """The modules of the project that a file imports, the most precise name of each."""
    names = imports(path) & MODULES.keys()
    return {name for name in names if not any(other.startswith(name + ".") for other in names)}


@pytest.mark.parametrize("name", MODULES)
def test_a_part_imports_only_those_before_it(name):
    package, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    if package != "mmalign" or part in ("", "__main__"):
        return
    parts = {other.split(".")[1] for other in below(imports(MODULES[name]), "mmalign") if "." in other}
    known = {other for other in parts if f"mmalign.{other}" in MODULES}
    assert known <= {*ORDER[: ORDER.index(part) + 1]}


def test_no_file_imports_in_a_circle():
    graph = {name: modules_of(path) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("name", MODULES)
def test_libraries_stay_where_they_belong(name):
    path, part = MODULES[name], name.split(".")[1:2]
    names = imports(path)
    if name.startswith("reward_models"):
        assert not below(names, "mmalign", "diffusers", "accelerate")
        assert not below(names, "peft") or name in LORA
        return
    if part and part[0] in MATHS:
        assert not below(names, "diffusers", "peft", "transformers", "accelerate", "pydantic")
        assert below(names, "mmalign.policy") <= below(names, "mmalign.policy.protocol")
        one_rule_for_groups = below(names, "reward_models.combine")
        assert below(names, "reward_models") <= one_rule_for_groups | {"reward_models.combine"}
    if part != ["policy"] and part != ["cli"]:
        assert not below(names, "diffusers", "peft")
    if part == ["policy"]:
        allowed = below(names, *(f"reward_models.{module}" for module in ABOUT_FILES))
        assert below(names, "reward_models") <= {"reward_models", *allowed}


def test_a_report_is_made_from_a_folder_alone():
    assert not below(
        {name for path in (ROOT / "mmalign/reporting").glob("*.py") for name in imports(path)}, "mmalign.training"
    )


def test_the_heart_is_short():
    """Read in twenty minutes: 1,200 lines that are not blank."""
    heart = [ROOT / "mmalign/types.py", ROOT / "mmalign/train.py"]
    heart += [path for part in ("flow", "credit", "learn") for path in (ROOT / "mmalign" / part).glob("*.py")]
    assert sum(bool(line.strip()) for path in heart for line in path.read_text().splitlines()) <= 1200


def test_the_schema_and_the_commands_are_short():
    """A config reads in one go; a command parses, calls and prints."""
    assert len((ROOT / "mmalign/config/schema.py").read_text().splitlines()) <= 300
    for path in (ROOT / "mmalign/cli").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path.name}: {node.name}"
