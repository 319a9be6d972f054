"""Datasets of Hugging Face as tables: on the hub, in a folder of data files, or saved by `save_to_disk`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reward_models import limits, tables
from reward_models.tables import Table

NAMED = re.compile(r"hf:(?P<name>[^:]+):(?P<split>[^:\[]+(\[[^\]]*\])?)(:(?P<column>.+))?")  # hf:NAME[/CONFIG]:SPLIT


def read(name: str, split: str) -> Table:
    """The rows of a split of a dataset, NAME or NAME/CONFIG; pictures are {bytes, path}, not decoded. `datasets` 4 and
    later never runs a dataset's code. ValueError for a dataset that cannot be loaded, and from `rows` for more than
    `limits.TEXT` bytes."""
    try:
        import datasets
    except ImportError:
        raise ValueError("datasets of Hugging Face need an extra: pip install 'mmalign[datasets]'") from None
    config = None
    if not Path(name).exists() and name[0] not in "./" and name.count("/") > 1:
        owner, repository, config = name.split("/", 2)
        name = f"{owner}/{repository}"
    try:
        if any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
            if split not in splits:
                raise ValueError(f"no split {split!r}; there are {', '.join(splits)}")
            data = splits[split]
        else:
            data = datasets.load_dataset(name, config, split=split)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{error.__cause__ or error}") from None

    def rows(only: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        chosen = data.select_columns(only) if only else data
        number = size = 0
        for part in chosen.with_format("arrow").iter(tables.MANY):
            size += part.nbytes
            if size > limits.TEXT:
                raise ValueError(f"row {number + 1}: more than {limits.TEXT} bytes so far; take a part of the split")
            for row in part.to_pylist():
                yield number, tables.given(row)
                number += 1

    return Table(data.column_names, "row", rows)
