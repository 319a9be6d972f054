"""The wording rules: names that say nothing, and phrases that are not plain English, are refused.

Run as a test, it checks every file of the repository; `python tests/test_wording.py FILE ...` checks the named files
(the pre-commit hook). Code is checked for names; comments, strings and pages are checked for phrases.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = (".html", ".md", ".py", ".sh", ".txt", ".yaml")
SKIPPED = (
    ".venv",
    ".venv-audit",
    ".git",
    "runs",
    "build",
    "dist",
    "assets/tiny_sd3",
    "assets/tiny_things",
    "assets/architectures/",
)
VERBATIM = ("tests/corpus/", "tests/test_wording.py", "LICENSE")  # input from outside; the rules themselves

NAMES = {
    "asked": "what was asked for: request, names, ...",
    "found": "the thing: row, region, result, ...",
    "kept": "the thing: selected, remaining, ...",
    "own": "the thing: scorer, value, settings, ...",
    "said": "the thing: message, reply, reason, ...",
    "seen": "the thing: scores, images, visited, ...",
    "told": "the thing: message, value, ...",
    "why": "reason",
}

PHRASES = {  # a space matches any white space, line ends and comment signs included
    r"\bwalk(s|ed|ing)?\b": "trajectory, sample, integrate",
    r"\blessons?\b": "training batch",
    r"(?<![Tt]here\s)\b(is|are|was|were) no (?!longer|more\b|less\b|\w+er\b)": "is not a",
    r"\bin vain\b": "without success",
    r"\bas ever\b": "as usual",
    r"\b(anew|afresh)\b": "again",
    r"\bdearer\b": "more expensive",
    r"\bmanieth\b": "n-th",
    r"\bat hand\b": "available",
    r"\bcannot be had\b|\b(was|were|been) had\b|\bhad before\b": "available, cached, missing",
    r"\b(go|goes|going|gone|went) on\b": "continue",
    r"\b[Ww]hat is not\b": "a noun: non-finite values, ...",
    r"\bas (it is|they are|it was|they were)\b(?! (written|read|used|needed|called|loaded|logged))": "unchanged",
    r"\balike\b|\bof unlike\b": "same, equal, different",
    r"\bteach(es)?\b": "carry gradient, train",
    r"\b(dealt|shared out)\b": "distributed, sharded",
    r"\bask(s|ed)? the network\b": "evaluate",
    r"\btold\b": "reported, passed, given",
    r"\b(is|are|be|was|were) said\b|\band said\b": "reported",
    r"\b(is|are|was|were|be|stay|stays|not) whole\b": "complete, intact",
    r"\b(by place|at places of)\b": "regional, per position",
    r"(?:^|[.:;] |\n\n)Of (a|an|the|many|each|all|what) \w": "the usual word order",
    r", for (it|they|there|this|that|nothing) (is|are|was|were|ha(s|ve)|may|would|will|can|do(es)?)\b": "because",
}

ALLOWED = {  # file: phrases that are right there
}


def files() -> list[Path]:
    """Every text file of the repository that is written by hand, relative to its root."""
    paths = (path.relative_to(ROOT) for path in sorted(ROOT.rglob("*")) if path.suffix in SUFFIXES and path.is_file())
    return [path for path in paths if checked(path)]


def checked(path: Path) -> bool:
    name = path.as_posix()
    by_hand = not name.startswith((*SKIPPED, *VERBATIM)) or (path.name == "README.md" and name.startswith("assets/"))
    return by_hand and ".egg-info" not in name


def problems(path: Path) -> Iterator[str]:
    """One line for each banned name and phrase of a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".py":
        for line, name in sorted(bound_names(ast.parse(text))):
            if name in NAMES:
                yield f"{path}:{line}: name {name!r}: {NAMES[name]}"
    prose = {
        ".py": python_prose,
        ".md": markdown_prose,
        ".txt": str,
        ".html": str,
        ".sh": hash_comments,
        ".yaml": hash_comments,
    }
    readable = prose[path.suffix](text)
    for phrase, better in PHRASES.items():
        for match in re.finditer(phrase.replace(" ", r"[\s#]+"), readable, re.MULTILINE):
            words = " ".join(match.group().split())
            if words not in ALLOWED.get(path.as_posix(), ()):
                yield f"{path}:{readable.count(chr(10), 0, match.start()) + 1}: {words!r}: {better}"


def bound_names(tree: ast.AST) -> set[tuple[int, str]]:
    """Line and name of every variable, parameter, attribute, function and class that is bound."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add((node.lineno, node.id if isinstance(node, ast.Name) else node.attr))
        elif isinstance(node, ast.arg):
            names.add((node.lineno, node.arg))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add((node.lineno, node.name))
    return names


def python_prose(text: str) -> str:
    """Comments and strings of several words, in their lines; all else is blank."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    lines = [""] * (text.count("\n") + 2)
    for token in tokens:
        if token.type in kinds and " " in token.string:
            for number, line in enumerate(token.string.split("\n"), token.start[0]):
                lines[number - 1] += " " + re.sub(r"`[^`]*`", "`_`", line)
    return "\n".join(lines)


def markdown_prose(text: str) -> str:
    """A page without its code."""
    without_blocks = re.sub(r"^```.*?^```", lambda block: "\n" * block.group().count("\n"), text, flags=re.M | re.S)
    return re.sub(r"`[^`]*`", lambda code: "`_`" + "\n" * code.group().count("\n"), without_blocks)


def hash_comments(text: str) -> str:
    return "\n".join(line.partition("#")[2] for line in text.split("\n"))


@pytest.mark.parametrize("path", files(), ids=str)
def test_wording(path):
    assert list(problems(path)) == []


if __name__ == "__main__":
    paths = [Path(name).resolve().relative_to(ROOT) for name in sys.argv[1:]] or files()
    lines = [line for path in paths if path.suffix in SUFFIXES and checked(path) for line in problems(path)]
    print(*lines, sep="\n", end="\n" if lines else "")
    sys.exit(bool(lines))
