"""Where prompts come from, and the order in which a run meets them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.config import BadInput
from mmalign.flow.sample import seed_of
from reward_models import Prompt
from reward_models.images import beside

HUB = re.compile(r"hf:(?P<name>[^:]+):(?P<split>[^:\[]+(\[[^\]]*\])?)(:(?P<column>.+))?")
PARQUET = re.compile(r"(?P<name>.+\.parquet)(:(?P<column>.+))?")

# the columns of a table, and its rows with the columns asked for alone
Table = tuple[list[str], Callable[[list[str]], Iterable[dict[str, Any]]]]


def read(source: str | Path) -> list[Prompt]:
    """The prompts of a file or a dataset, in its order.

    - `FILE.jsonl`: an object a line, as in GenEval's metadata
    - `FILE.parquet`: a row each (extra `parquet`)
    - `hf:NAME[/CONFIG]:SPLIT`: a row each of a dataset on the Hugging Face hub, of a folder of data files, or of one
      that `save_to_disk` wrote (extra `datasets`); a split may be a slice, `train[:1000]`, but not of a saved one
    - `FILE.parquet:COLUMN`, `hf:NAME[/CONFIG]:SPLIT:COLUMN`: the texts of one column and nothing else
    - any other file: text, a prompt a line, blank lines left out

    An object or row has `prompt`, perhaps `id`, and all else that is not null is the prompt's ground truth. What has no
    id is numbered by its line or row, from 0. In a column a row without text is left out, and a text that comes again
    is the same prompt, numbered by the first of its rows. Raises BadInput in one line for anything else.
    """
    source = str(source)
    try:
        prompts = list(_prompts(source))
        if not prompts:
            raise ValueError("no prompts in it")
        if len({p.id for p in prompts}) < len(prompts):
            raise ValueError("ids repeat; each prompt needs its own")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise BadInput(f"prompts {source}: {reason}") from None
    return prompts


def _prompts(source: str) -> Iterator[Prompt]:
    if source.startswith("hf:"):
        if (parts := HUB.fullmatch(source)) is None:
            raise ValueError("a dataset is named hf:NAME[/CONFIG]:SPLIT or hf:NAME[/CONFIG]:SPLIT:COLUMN")
        folder = Path(parts["name"]).absolute() if Path(parts["name"]).is_dir() else Path()
        return _of_table(_dataset(parts["name"], parts["split"]), parts["column"], folder)
    if parts := PARQUET.fullmatch(source):
        return _of_table(_parquet(parts["name"]), parts["column"], Path(parts["name"]).parent.absolute())
    return _of_lines(Path(source))


def _of_lines(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(path.read_text().splitlines()):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield Prompt(line.strip(), {}, number)
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number + 1} is no JSON object: {error}") from None
        yield _of_row(row, number, f"line {number + 1}", path.parent.absolute())


def _of_table(table: Table, column: str | None, folder: Path) -> Iterator[Prompt]:
    names, rows = table
    if (column or "prompt") not in names:
        raise ValueError(f"no column {column or 'prompt'!r}; there are {', '.join(names)}")
    if column is None:
        yield from (_of_row(row, n, f"row {n + 1}", folder) for n, row in enumerate(rows(names)))
        return
    first: dict[str, int] = {}
    for number, row in enumerate(rows([column])):
        text = row[column]
        if not isinstance(text, str | None):
            raise ValueError(f"row {number + 1}: {column!r} holds {type(text).__name__}, not text")
        if text and text.strip():
            first.setdefault(text.strip(), number)
    yield from (Prompt(text, {}, number) for text, number in first.items())


def _of_row(row: Any, number: int, where: str, folder: Path) -> Prompt:
    wants = _given(row)
    if not isinstance(wants, dict) or not isinstance(text := wants.pop("prompt", None), str):
        raise ValueError(f"{where}: an object with a `prompt`, a text, is needed")
    given = wants.pop("id", number)
    try:
        name = int(given)
    except (OverflowError, TypeError, ValueError):
        name = None
    if name is None or not -(2**63) <= name < 2**63 or (isinstance(given, float) and name != given):
        raise ValueError(f"{where}: `id` must be a whole number of 64 bits, got {given!r}")
    try:
        json.dumps(wants)
    except TypeError as error:
        raise ValueError(f"{where}: no ground truth: {error}; name the column of prompts to read it alone") from None
    return Prompt(text, beside(wants, folder), name)


def _given(value: Any) -> Any:
    """The value without fields that are null: a table has every field in every row."""
    if isinstance(value, dict):
        return {key: _given(own) for key, own in value.items() if own is not None}
    return [_given(own) for own in value] if isinstance(value, list) else value


def _parquet(name: str) -> Table:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'mmalign[parquet]'") from None
    file = ParquetFile(name)
    return file.schema_arrow.names, lambda columns: file.read(columns).to_pylist()


def _dataset(name: str, split: str) -> Table:
    """A split of a dataset. `datasets` 4 and later runs no code that comes with one."""
    try:
        import datasets
    except ImportError:
        raise ValueError("datasets of Hugging Face need an extra: pip install 'mmalign[datasets]'") from None
    config = None
    if not Path(name).exists() and name[0] not in "./" and name.count("/") > 1:
        owner, own, config = name.split("/", 2)
        name = f"{owner}/{own}"
    try:
        if any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
            if split not in splits:
                raise ValueError(f"no split {split!r}; there are {', '.join(splits)}")
            found = splits[split]
        else:
            found = datasets.load_dataset(name, config, split=split)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{error.__cause__ or error}") from None
    return found.column_names, found.select_columns


def batch(prompts: list[Prompt], size: int, iteration: int, seed: int) -> list[Prompt]:
    """The prompts of one iteration: epochs of all prompts, each shuffled by its own seed, cut into whole batches.

    A function of its arguments alone, so a resumed run needs no cursor; a batch never holds a prompt twice. What is
    left over at the end of an epoch is dropped, another remainder each time. Raises BadInput for a batch beyond the
    file.
    """
    if size > len(prompts):
        raise BadInput(f"prompts_per_iteration: {size} asked for, the file has {len(prompts)}")
    epoch, slot = divmod(iteration, len(prompts) // size)
    order = np.random.default_rng(seed_of(seed, "prompts", epoch)).permutation(len(prompts))
    return [prompts[i] for i in order[slot * size : (slot + 1) * size]]
