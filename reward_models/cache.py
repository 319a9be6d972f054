"""A score cache in one SQLite file, which several processes may share.

The key of a score is the image's 8-bit levels, the prompt (text and ground truth; neither if the scorer ignores the
prompt) and the version on the scorer's card, which changes with its weights and settings. Failures are not cached, so
that they are retried. A scorer that compares the images of a prompt is not cached, because its scores belong to the
group; nor is one that `changes` while it is used.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from reward_models.images import to_uint8
from reward_models.regions import Region
from reward_models.scoring import TEXTS, score_isolated, unfit
from reward_models.types import Images, Infinite, Prompt, RewardModel, Scores, Unusable

FORM = 3  # version of the record format; older records are ignored
WAIT = 60  # seconds for another process to finish writing


class Cached:
    """`scorer` with a cache at `path`. `lookups` counts images, `hits` those that were cached. Unusable if the file
    cannot be used."""

    def __init__(self, scorer: RewardModel, path: str | Path):
        self.scorer, self.names, self.card, self.path = scorer, scorer.names, scorer.card, Path(path)
        self.lookups = self.hits = 0
        with self._open() as store:
            store.execute("PRAGMA journal_mode=WAL")
            store.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, record TEXT) WITHOUT ROWID")

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        if self.card.groupwise or getattr(self.scorer, "changes", False):
            return self.scorer(images, prompts)
        broken = unfit(images)
        keys = [self._key(images[i], prompts[i], i in broken) for i in range(len(images))]
        known = self._load(set(keys))
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        new = [i for key, i in first.items() if key not in known]
        self.lookups += len(keys)
        self.hits += len(keys) - len(new)
        failures = {}
        if new:
            try:
                scores = score_isolated(self.scorer, images[new], [prompts[i] for i in new])
            except Infinite as error:
                infinite = {keys[new[k]] for k in error.rows}
                raise Infinite([i for i, key in enumerate(keys) if key in infinite]) from error
            records = {keys[i]: _record(scores, k) for k, i in enumerate(new)}
            failures = {keys[new[k]]: reason for k, reason in scores.failures.items()}
            self._store({key: record for key, record in records.items() if key not in failures})
            known |= records
        reasons = {i: failures[key] for i, key in enumerate(keys) if key in failures}
        return replace(_scores(self.names, [known[key] for key in keys]), failures=reasons)

    def _key(self, image: torch.Tensor, prompt: Prompt, broken: bool) -> str:
        digest = hashlib.sha256(f"{FORM} {self.card.version} {list(image.shape)}".encode())
        if broken:  # has no 8-bit form; it is neither scored nor cached
            digest.update(image.cpu().contiguous().numpy().tobytes())
        else:
            digest.update(to_uint8(image[None]).cpu().contiguous().numpy().tobytes())
        if self.card.sees_prompt:
            digest.update(json.dumps([prompt.text, prompt.wants], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT)) as store, store:
                yield store
        except sqlite3.Error as error:
            raise Unusable(f"cache {self.path}: {error}") from error

    def _load(self, keys: set[str]) -> dict[str, dict[str, Any]]:
        with self._open() as store:
            rows = (store.execute("SELECT key, record FROM scores WHERE key = ?", (key,)).fetchone() for key in keys)
            return {row[0]: json.loads(row[1]) for row in rows if row}

    def _store(self, records: Mapping[str, dict[str, Any]]) -> None:
        rows = [(key, json.dumps(record)) for key, record in records.items()]
        with self._open() as store:
            store.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)


def _record(scores: Scores, index: int) -> dict[str, Any]:
    return {
        "values": _listed(scores.values[index]),
        "texts": {name: texts[index] for name in TEXTS if (texts := getattr(scores, name))},
        "regions": None if scores.regions is None else [_listed(row) for row in scores.regions[index]],
        "boxes": [asdict(region) for region in scores.boxes[index]] if scores.boxes else [],
    }


def _listed(values: torch.Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _tensor(values: list) -> torch.Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float32)


def _scores(names: tuple[str, ...], records: Sequence[dict[str, Any]]) -> Scores:
    texts = {name: tuple(record["texts"].get(name, "") for record in records) for name in TEXTS}
    grids = [None if row["regions"] is None else torch.stack([*map(_tensor, row["regions"])]) for row in records]
    example = next((grid for grid in grids if grid is not None), None)
    regions = None
    if example is not None:
        regions = torch.stack([torch.full_like(example, torch.nan) if grid is None else grid for grid in grids])
    values = torch.stack([_tensor(record["values"]) for record in records]) if records else torch.zeros(0, len(names))
    boxes = tuple(tuple(Region(**box | {"box": tuple(box["box"])}) for box in record["boxes"]) for record in records)
    texts = {name: column if any(column) else () for name, column in texts.items()}
    return Scores(names, values, regions=regions, boxes=boxes if any(boxes) else (), **texts)
