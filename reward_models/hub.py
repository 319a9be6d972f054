"""Datasets of Hugging Face as tables: on the hub, in a folder of data files, or saved by `save_to_disk`."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reward_models import limits, tables
from reward_models.tables import Table

NAMED = re.compile(r"hf:(?P<name>[^:]+):(?P<split>[^:\[]+(\[[^\]]*\])?)(:(?P<column>.+))?")  # hf:NAME[/CONFIG]:SPLIT


def read(name: str, split: str) -> Table:
    """The rows of a split of a dataset, NAME or NAME/CONFIG; pictures are {bytes, path}, not decoded. `datasets` 4 and
    later never runs a dataset's code. ValueError for a dataset that cannot be loaded, and from `rows` for more than
    `limits.TEXT` bytes."""
    data = _loaded(name, split, streaming=False)
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


def shards(name: str, split: str) -> list[Iterable[dict[str, Any]]]:
    """The rows of a split as `read` has them, which are fetched as they are read: a `datasets.IterableDataset` of each
    of its files. ValueError for a dataset that cannot be loaded."""
    data = _loaded(name, split, streaming=True)
    data = data if hasattr(data, "num_shards") else data.to_iterable_dataset()
    data = data.decode(False)
    return [data.shard(data.num_shards, number) for number in range(data.num_shards)]


def rows_of(shard: Any, begin: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered rows of one of `shards` from one on, without null fields. ValueError where they cannot be read."""
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(shard.skip(begin), begin):
            yield number, tables.given(row)
    except (DatasetsError, OSError, RuntimeError) as error:
        raise ValueError(" ".join(str(error.__cause__ or error).split())) from None


def _loaded(name: str, split: str, streaming: bool) -> Any:
    """The split of a dataset; one that was saved is never streamed, since it is not read before its rows are."""
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
            return splits[split]
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{error.__cause__ or error}") from None


def _undecoded(feature: Any) -> Any:
    """A feature of a dataset whose pictures are not decoded, at any depth."""
    from datasets import Image, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), feature.length)
    return {name: _undecoded(part) for name, part in feature.items()} if isinstance(feature, dict) else feature
