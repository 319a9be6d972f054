"""The code blocks of pages: their kind, what they need beside this repository, and their commands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"^ *<!-- needs: (.+) -->$")


@dataclass(frozen=True)
class Block:
    """`kind`: the word behind the fence; "" stands for commands. `needs`: of the comment before it, "" without one."""

    page: Path
    line: int
    kind: str
    needs: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.stem}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, without comments; a `\\` at the end of a line continues it. In a `console` a
        command follows `$ ` and its output is below."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.kind == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))] if self.runs else []

    @property
    def runs(self) -> bool:
        return self.kind in ("", "sh", "console")

    @property
    def output(self) -> list[str]:
        """The words of the output that a `console` shows."""
        return re.sub(r"^\$ .*", "", self.text.replace("\\\n", " "), flags=re.MULTILINE).split()


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        before = text[: match.start()].splitlines()
        mark = MARK.match(before[-1]) if before else None
        body = "\n".join(line.removeprefix(match[1]) for line in match[3].splitlines())
        yield Block(page, len(before) + 1, match[2], mark[1] if mark else "", body)


def indented(page: Path) -> list[str]:
    """Lines that Markdown shows as code because they are indented, not fenced."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [line for line in re.findall(r"\n\n( {4,}\S.*)", text) if not MARK.match(line)]
