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

    pictures = {name: kind for name, feature in data.features.items() if (kind := _undecoded(feature)) != feature}

    def rows(only: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        chosen = data.select_columns(only) if only else data
        if chosen.data.nbytes > limits.TEXT:
            raise ValueError(f"{chosen.data.nbytes} bytes, more than {limits.TEXT}; take a part of the split, [:1000]")
        for name in pictures.keys() & {*chosen.column_names}:
            chosen = chosen.cast_column(name, pictures[name])
        for number, row in enumerate(chosen):
            yield number, tables.given(row)

    return Table(data.column_names, "row", rows)


def _undecoded(feature: Any) -> Any:
    """A feature of a dataset whose pictures are not decoded, at any depth."""
    from datasets import Image, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), feature.length)
    return {name: _undecoded(part) for name, part in feature.items()} if isinstance(feature, dict) else feature
