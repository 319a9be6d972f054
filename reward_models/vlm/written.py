"""What a judge writes once per prompt, such as criteria or a description, kept in memory and in a JSONL file.

Several processes may share the file: each reads what the others have written before it asks, and where two have written
for the same prompt, both use the row that comes first.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from reward_models import files, limits
from reward_models.images import to_uint8
from reward_models.types import Unusable
from reward_models.vlm import replies
from reward_models.vlm.types import Picture, Reply

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Subject:
    """What the judge writes about: the text of a prompt, and the picture that belongs to it, if there is one."""

    text: str
    picture: Picture | None = None

    @cached_property
    def key(self) -> tuple[str, str]:
        """The text, and the SHA-256 of the picture's size and 8-bit levels, "" without a picture."""
        if self.picture is None:
            return self.text, ""
        levels = to_uint8(self.picture[None])[0].cpu().contiguous()
        digest = hashlib.sha256(f"{list(levels.shape)}".encode() + levels.numpy().tobytes())
        return self.text, digest.hexdigest()


class Written(Generic[Value]):
    """A value for each subject: `known` has them by key. `what` names them in the file and in messages. `file`: JSONL,
    read now and extended, or None. `parse` reads a reply and `read` a value of the file; both raise ValueError. `show`
    gives the JSON of a value. With `revised`, the last row of a subject counts when the file is opened, not the first.
    ValueError, in one line that begins with the name of the `scorer`, for a file that cannot be read."""

    def __init__(
        self,
        scorer: str,
        what: str,
        file: str | None,
        parse: Callable[[Reply], Value],
        read: Callable[[Any], Value],
        show: Callable[[Value], Any],
        revised: bool = False,
    ):
        self.scorer, self.what, self.file = scorer, what, Path(file) if file else None
        self.parse, self.read, self.show, self.revised = parse, read, show, revised
        self.known: dict[tuple[str, str], Value] = {}
        self.lines = 0
        self._read_on(opening=True)

    def of(
        self, subjects: Sequence[Subject], ask: Callable[[Sequence[Subject]], Sequence[Reply]]
    ) -> list[Value | ValueError]:
        """The value of each subject, or why there is none. `ask` puts those that are not known to the judge, each of
        them once. A failure is not kept, so that it is tried again. Unusable if the file cannot be read or extended."""
        missing = {subject.key: subject for subject in subjects if subject.key not in self.known}
        if missing:
            self._read_on()
            missing = {key: subject for key, subject in missing.items() if key not in self.known}
        failures: dict[tuple[str, str], ValueError] = {}
        if missing and len(self.known) + len(missing) > limits.WRITTEN:
            reason = f"{len(self.known)} prompts have their {self.what}; no more than {limits.WRITTEN} are kept"
            failures, missing = dict.fromkeys(missing, ValueError(reason)), {}
        new: dict[tuple[str, str], Value] = {}
        answers = ask([*missing.values()]) if missing else []
        for key, reply in zip(missing, answers, strict=True):
            try:
                if reply.failure:
                    raise ValueError(reply.failure)
                new[key] = self.parse(reply)
            except ValueError as error:
                begins = f"; the reply begins {replies.excerpt(reply.text)}" if reply.text else ""
                failures[key] = ValueError(replies.printable(f"no {self.what} could be written: {error}{begins}"))
        if new:
            self._append(new)
            self._read_on()
            self.known = new | self.known
        return [failures[key] if (key := subject.key) in failures else self.known[key] for subject in subjects]

    def revise(self, subject: Subject, value: Value) -> None:
        """Replace the value of a subject."""
        self.known[subject.key] = value
        self._append({subject.key: value})

    def _append(self, values: dict[tuple[str, str], Value]) -> None:
        if self.file is None:
            return
        rows = [
            {"prompt": text, **({"picture": picture} if picture else {}), self.what: self.show(value)}
            for (text, picture), value in values.items()
        ]
        try:
            files.append(self.file, *rows)
        except OSError as error:
            raise Unusable(f"{self.scorer}: {self.file}: {error.strerror}") from None

    def _read_on(self, opening: bool = False) -> None:
        """Take the rows that are new in the file; those of a known subject change nothing. A line without an end is one
        that another process is writing, except at the `opening`."""
        if self.file is None or not self.file.exists():
            return
        fresh: dict[tuple[str, str], Value] = {}
        number = self.lines
        try:
            text = files.text(self.file)
        except ValueError as error:
            raise Unusable(f"{self.scorer}: {error}") from None
        whole = text[: text.rfind("\n") + 1]
        if opening and whole != text:
            raise Unusable(f"{self.scorer}: {self.file}: the last line has no end; complete or remove it")
        for number, line in enumerate(files.lines(whole)[self.lines :], self.lines + 1):
            try:
                if line.strip():
                    row = files.parsed(line)
                    key, value = (row["prompt"], row.get("picture", "")), self.read(row[self.what])
                    if not all(isinstance(part, str) for part in key):
                        raise ValueError("prompt and picture: texts are needed")
                    fresh[key] = value if self.revised else fresh.get(key, value)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
                raise Unusable(f"{self.scorer}: {self.file}: line {number}: {reason}") from None
        self.lines = number
        self.known = fresh | self.known
