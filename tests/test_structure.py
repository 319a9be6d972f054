"""The arrows of the design, read from the imports of every module."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "mmalign").rglob("*.py"), *(ROOT / "reward_models").rglob("*.py")])


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def below(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == p or name.startswith(p + ".") for p in packages)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    names, place = imports(path), path.relative_to(ROOT).parts
    if place[0] == "reward_models":
        assert not below(names, "mmalign", "diffusers", "peft", "accelerate")
    elif place[1] in ("flow", "credit", "learn", "objectives"):
        allowed = ("mmalign.types", "mmalign.flow", "mmalign.learn.loss", f"mmalign.{place[1]}")
        assert below(names, "mmalign") <= below(names, *allowed)
        assert not below(names, "diffusers", "peft", "transformers", "accelerate", "pydantic")
        assert below(names, "reward_models") <= below(
            names, "reward_models.combine"
        )  # one rule for groups, in torch alone
    if place[:2] != ("mmalign", "policy") and path.name != "cli.py":
        assert not below(names, "diffusers", "peft")
    if place[:2] == ("mmalign", "policy"):
        about_files = ("allowlist", "files", "limits", "model_folders", "lengths", "weights")  # nothing that scores
        allowed = below(names, *(f"reward_models.{name}" for name in about_files))
        assert below(names, "reward_models") <= {"reward_models", *allowed}


def test_the_heart_is_short():
    """Read in twenty minutes: about 1,200 lines."""
    heart = [ROOT / "mmalign/types.py", ROOT / "mmalign/train.py", *(ROOT / "mmalign/flow").glob("*.py")]
    heart += [*(ROOT / "mmalign/credit").glob("*.py"), *(ROOT / "mmalign/learn").glob("*.py")]
    assert sum(len(path.read_text().splitlines()) for path in heart) <= 1300
