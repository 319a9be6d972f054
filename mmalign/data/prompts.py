"""Read prompts from files and datasets, and divide them into the batches of a run."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmalign.data.draws import Draw, Epochs
from mmalign.errors import BadInput
from reward_models import Prompt, files, hub, limits, tables
from reward_models.images import beside
from reward_models.tables import Table

TABLE = re.compile(rf"(?P<name>.+({'|'.join(map(re.escape, tables.ENDINGS))}))(:(?P<column>.+))?", re.IGNORECASE)


def read(source: str | Path) -> list[Prompt]:
    """The prompts of a file or a dataset, in its order.

    - `FILE.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet` (extra `parquet`): a table, see
      `reward_models.tables`; GenEval's metadata is one
    - `hf:NAME[/CONFIG]:SPLIT`: the rows of a dataset on the Hugging Face hub, of a folder of data files, or of one that
      `save_to_disk` wrote (extra `datasets`); a split may be a slice, `train[:1000]`, but not of a saved dataset
    - `FILE.csv:COLUMN`, `hf:NAME[/CONFIG]:SPLIT:COLUMN`: the texts of one column alone
    - `FILE.txt`: a prompt a line, stripped, blank lines left out; a line that begins with `#` is refused, because it
      may be meant as a comment or as a prompt

    An object or row has `prompt`, optionally `id`, and all other fields that are not null are the prompt's ground
    truth. Without an id the number of the line or row is used, from 0. In a column a row without text is left out, and
    a repeated text is the same prompt, numbered by its first row. BadInput in one line for anything else: a blank
    prompt, one with control characters, a file of another type.
    """
    return _complete(lambda: _prompts(str(source)), f"prompts {source}")


def given(items: Iterable[Any], what: str = "prompts") -> list[Prompt]:
    """The prompts that a caller hands over: texts, objects with `prompt` as a row of `read` has them, or `Prompt`s, of
    any iterable of these, such as a list or a `datasets.Dataset`. Texts and objects without `id` are numbered from 0.
    BadInput as in `read`, under the name `what`."""
    return _complete(lambda: (_given(item, number) for number, item in enumerate(items)), what)


def _complete(prompts: Callable[[], Iterator[Prompt]], what: str) -> list[Prompt]:
    try:
        complete = list(islice(prompts(), limits.ROWS + 1))
        if not complete:
            raise ValueError("no prompts in it")
        if len(complete) > limits.ROWS:
            raise ValueError(f"more than {limits.ROWS} prompts")
        if len({p.id for p in complete}) < len(complete):
            raise ValueError("ids repeat; each prompt needs its own")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise BadInput(f"{what}: {reason}") from None
    return complete


def _given(item: Any, number: int) -> Prompt:
    where = f"number {number}"
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return Prompt(_checked(item, where), {}, number)
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: a text, an object with a `prompt`, or a Prompt is needed, got {str(item)[:60]!r}")
    return _of_row(tables.given(dict(item)), number, where, Path())


def _prompts(source: str) -> Iterator[Prompt]:
    if source.startswith("hf:"):
        if (parts := hub.NAMED.fullmatch(source)) is None:
            raise ValueError("a dataset is named hf:NAME[/CONFIG]:SPLIT or hf:NAME[/CONFIG]:SPLIT:COLUMN")
        name = files.home(parts["name"])
        folder = Path(name).absolute() if Path(name).is_dir() else Path()
        return _of_table(hub.read(name, parts["split"]), parts["column"], folder)
    if parts := TABLE.fullmatch(source):
        path = Path(files.home(parts["name"]))
        return _of_table(tables.read(path), parts["column"], path.parent.absolute())
    path = Path(files.home(source))
    files.opened(path).close()  # a missing file is reported before a wrong ending
    if path.suffix.lower() != ".txt":
        raise ValueError(f"a list of prompts is .txt, with a prompt a line, or a table: {', '.join(tables.ENDINGS)}")
    return _of_lines(files.decoded(files.content(path, limits.TEXT)))


def _of_lines(text: str) -> Iterator[Prompt]:
    for number, line in enumerate(files.lines(text)):
        if number == limits.ROWS:
            raise ValueError(f"more than {limits.ROWS} lines")
        if not line.strip():
            continue
        if line.lstrip().startswith("#"):
            raise ValueError(
                f"line {number + 1} begins with #: comments are not allowed, and a prompt that begins with # needs a "
                "table (.jsonl)"
            )
        if "\r" in line:
            raise ValueError(f"line {number + 1} holds a carriage return; lines end with a line feed")
        yield Prompt(_checked(line.strip(), f"line {number + 1}"), {}, number)


def _of_table(table: Table, column: str | None, folder: Path) -> Iterator[Prompt]:
    if table.names is not None and (column or "prompt") not in table.names:
        raise ValueError(f"no column {column or 'prompt'!r}; there are {', '.join(table.names)}")
    if column is None:
        yield from (_of_row(row, number, table.where(number), folder) for number, row in table.rows(None))
        return
    first: dict[str, int] = {}
    for number, row in table.rows([column]):
        text = row.get(column)
        if not isinstance(text, str | None):
            raise ValueError(f"{table.where(number)}: {column!r} holds {type(text).__name__}, not text")
        if text and text.strip():
            first.setdefault(_checked(text.strip(), table.where(number)), number)
    yield from (Prompt(text, {}, number) for text, number in first.items())


def _of_row(row: Mapping[str, Any], number: int, where: str, folder: Path) -> Prompt:
    wants = dict(row)
    if not isinstance(text := wants.pop("prompt", None), str):
        raise ValueError(f"{where}: an object with a `prompt`, a text, is needed")
    given = wants.pop("id", number)
    if (id_ := tables.whole(given)) is None:
        raise ValueError(f"{where}: `id` must be a whole number of 64 bits, got {given!r}")
    try:
        json.dumps(wants, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: invalid ground truth: {error}; name the column of prompts to read it alone"
        ) from None
    return Prompt(_checked(text, where), beside(wants, folder), id_)


def _checked(text: str, where: str) -> str:
    try:
        return tables.wording(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True)
class PromptBatches:
    """The prompts of a run, `size` an iteration, by `draw`. `rates` is what it has learnt of each prompt, by id."""

    all: list[Prompt]
    size: int
    seed: int
    draw: Draw = field(default_factory=Epochs)
    rates: dict[int, float] = field(default_factory=dict)

    def __call__(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration, none twice. BadInput where the file has too few."""
        if self.size > len(self.all):
            raise BadInput(f"prompts_per_iteration: {self.size} requested, the file has {len(self.all)}")
        stage, before = self.draw.stage(iteration)
        rows = [row for rows in self.stages[: stage + 1] for row in rows]
        if self.size > len(rows):
            raise BadInput(f"prompts_per_iteration: {self.size} requested, stage {stage + 1} has {len(rows)}")
        drawn = self.draw([self.all[i].id for i in rows], self.size, iteration - before, self.seed, self.rates)
        return [self.all[rows[i]] for i in drawn]

    @cached_property
    def stages(self) -> list[list[int]]:
        """The rows of the prompts, by the stage from which on they are drawn."""
        return self.draw.order(self.all)

    def weights(self, iteration: int) -> Float[Tensor, "P"] | None:
        """What the advantages of each prompt of an iteration are multiplied by; None: nothing."""
        return torch.tensor([self.draw.weight(p.id, self.rates) for p in self(iteration)]) if self.draw.weigh else None

    def learn(self, iteration: int, reward: Float[Tensor, "N"], prompt: Int[Tensor, "N"]) -> dict[str, float]:
        """Let the draw learn from the rewards of an iteration, after which it can no longer be drawn again; as a row
        for the metrics. `prompt` is the row of each image's prompt. A prompt without a reward (NaN) changes nothing."""
        if not self.draw.learns:
            return {}
        means = {p.id: float(reward[prompt == row].double().nanmean()) for row, p in enumerate(self(iteration))}
        weights = self.weights(iteration)
        weighed = {} if weights is None else {"draw/weight": float(weights.mean())}
        self.draw.learn(self.rates, {id_: mean for id_, mean in means.items() if mean == mean})
        rates = [self.rates.get(p.id, 0.5) for p in self.all]
        return {"draw/known": len(self.rates) / len(self.all), "draw/rate": sum(rates) / len(rates)} | weighed
