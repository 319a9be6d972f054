"""Batch the images of many callers: a bounded queue, and one thread that runs the scorers.

Images that do not depend on each other share a batch, even from different callers. A `groupwise` scorer gets one
caller's images at a time, because ids of different callers' prompts may be equal by chance. An image that cannot be
read or scored gets a reason, and the others are scored.
"""

import base64
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from threading import Condition, Thread
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from reward_models import limits
from reward_models.images import from_base64, from_pil
from reward_models.regions import Region
from reward_models.scoring import each, score_isolated, score_pictures
from reward_models.service import schema
from reward_models.types import Images, Prompt, RewardModel, Scores

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # the beginning of a PNG file, before width and height
READERS = 4  # decoding threads


@dataclass(eq=False)
class Shot:
    """One image: its PNG in base64, the number of pixels in its header, its decoded picture (RGB) or the reason for a
    failure, and its results as in `score_pictures`, with `places` as in `_places`."""

    png: str
    prompt: Prompt
    pixels: int
    picture: Future[Image.Image | str] | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    critiques: dict[str, str] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)
    replies: dict[str, str] = field(default_factory=dict)
    places: dict[str, tuple[Float[Tensor, "a b"] | None, Sequence[Region]]] = field(default_factory=dict)

    def details(self) -> dict[str, schema.Details]:
        """By scorer, for those that gave any."""
        return {name: self._details(name) for name in {**self.requests, **self.replies, **self.places}}

    def _details(self, name: str) -> schema.Details:
        grid, boxes = self.places.get(name, (None, ()))
        return schema.Details(
            request=self.requests.get(name, ""),
            reply=self.replies.get(name, ""),
            map=None if grid is None else [[None if v != v else v for v in row] for row in grid.tolist()],
            boxes=[schema.Region(**asdict(region) | {"box": [*map(float, region.box)]}) for region in boxes],
        )


@dataclass(eq=False)
class Job:
    """One caller's images, and the names of the requested scorers. `done` is set when all of them have finished."""

    shots: list[Shot]
    scorers: Sequence[str]
    done: Future[None] = field(default_factory=Future)

    @property
    def pixels(self) -> int:
        return sum(shot.pixels for shot in self.shots)


class Batcher:
    """The queue and its thread.

    A batch has the jobs that arrive within `wait` seconds, in order of arrival: at most `batch` images with
    `limits.TOGETHER` pixels, or one larger job. At most `queue` images with `limits.QUEUED` pixels wait. `watch` is
    called with the jobs of each batch after they are scored.
    """

    def __init__(
        self,
        scorers: Mapping[str, RewardModel],
        batch: int,
        wait: int | float,
        queue: int,
        watch: Callable[[Sequence[Job]], None],
    ):
        self.scorers = {name: Isolated(scorer, batch) for name, scorer in scorers.items()}
        self.batch, self.wait, self.queue, self.watch = batch, wait, queue, watch
        self.jobs: deque[Job] = deque()
        self.waiting, self.pixels, self.closed, self.changed = 0, 0, False, Condition()
        self.readers = ThreadPoolExecutor(READERS)
        self.thread = Thread(target=self._work, daemon=True)  # a scorer that hangs must not keep the process alive
        self.thread.start()

    def submit(self, job: Job) -> bool:
        """Whether the job was accepted: the queue has room and is not closed."""
        with self.changed:
            full = self.waiting + len(job.shots) > self.queue or self.pixels + job.pixels > limits.QUEUED
            if self.closed or full:
                return False
            self.jobs.append(job)
            self.waiting += len(job.shots)
            self.pixels += job.pixels
            self._read_ahead()
            self.changed.notify()
        return True

    def close(self) -> None:
        """Let the thread end once the queue is empty."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def _work(self) -> None:
        while batch := self._next():
            jobs = [job for job in batch if job.done.set_running_or_notify_cancel()]  # skips cancelled callers
            try:
                self._score(jobs)
                self.watch(jobs)
            except Exception as error:  # this thread must never end
                for job in jobs:
                    job.done.set_exception(error)
            else:
                for job in jobs:
                    job.done.set_result(None)

    def _next(self) -> list[Job]:
        """The jobs of the next batch; empty when the queue is closed and empty."""
        with self.changed:
            self.changed.wait_for(lambda: self.jobs or self.closed)
            self.changed.wait_for(lambda: self.waiting >= self.batch or self.closed, self.wait)
            batch = [self.jobs.popleft() for _ in range(self._first_batch())]
            self.waiting -= sum(len(job.shots) for job in batch)
            self.pixels -= sum(job.pixels for job in batch)
            self._read_ahead()
        return batch

    def _first_batch(self) -> int:
        """The number of waiting jobs in the next batch."""
        number = images = pixels = 0
        for job in self.jobs:
            images, pixels = images + len(job.shots), pixels + job.pixels
            if number and (images > self.batch or pixels > limits.TOGETHER):
                break
            number += 1
        return number

    def _read_ahead(self) -> None:
        """Decode the next batch while one is scored, but no more, because pictures take up to 10,000 times the memory
        of their PNG."""
        for job in islice(self.jobs, self._first_batch()):
            for shot in job.shots:
                shot.picture = shot.picture or self.readers.submit(decode, shot.png, shot.pixels)

    def _score(self, jobs: Sequence[Job]) -> None:
        for name, scorer in self.scorers.items():
            requesting = [job for job in jobs if name in job.scorers]
            for batch in [[job] for job in requesting] if scorer.card.groupwise else [requesting]:
                shots = [shot for job in batch for shot in job.shots]
                decoded = [shot.picture.result() for shot in shots]
                pictures = [picture if isinstance(picture, str) else from_pil([picture]) for picture in decoded]
                rows = score_pictures(pictures, [shot.prompt for shot in shots], {name: scorer}, _places)
                for shot, row in zip(shots, rows, strict=True):
                    for result, columns in row.items():
                        getattr(shot, result).update(columns)


def _places(
    maps: Float[Tensor, "N a b"] | None, boxes: Sequence[Sequence[Region]], size: tuple[int, int], count: int
) -> list[tuple[Float[Tensor, "a b"] | None, Sequence[Region]] | None]:
    """The map and the regions of each image; None for an image without either."""
    each: list[tuple[Any, Sequence[Region]]] = [
        (None if maps is None else maps[i], boxes[i] if boxes else ()) for i in range(count)
    ]
    return [None if grid is None and not regions else (grid, regions) for grid, regions in each]


class Isolated:
    """A scorer whose failures affect no other caller. If images do not depend on each other, those that fail are found
    by halving, as in `each`, in batches of `batch` images or `limits.AT_ONCE` pixels."""

    def __init__(self, scorer: RewardModel, batch: int):
        self.scorer, self.batch, self.names, self.card = scorer, batch, scorer.names, scorer.card

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        score = partial(score_isolated, self.scorer)
        if self.card.groupwise:
            return score(images, prompts)
        fitting = limits.AT_ONCE // images[0, 0].numel() if len(images) else 1
        return each(images, prompts, self.names, score, max(1, min(self.batch, fitting)))


def shot_of(png: str, prompt: Prompt, most: int) -> Shot:
    """An image as received. One with more than `most` pixels in its header, or that is not ASCII, is dropped at
    once."""
    width, height = promised(png)
    if width * height > most:
        reason = f"cannot be read: {width} x {height} pixels, more than the {most} allowed"
    elif not png.isascii():
        reason = "cannot be read: base64 must be ASCII"
    else:
        return Shot(png, prompt, width * height)
    refused: Future[Image.Image | str] = Future()
    refused.set_result(reason)
    return Shot("", prompt, 0, refused)


def promised(png: str) -> tuple[int, int]:
    """Width and height in the header of a base64 PNG; 0, 0 if it is not a PNG header."""
    try:
        head = base64.b64decode(png[:32], validate=True)
    except ValueError:
        return 0, 0
    return struct.unpack(">II", head[16:]) if len(head) == 24 and head.startswith(PNG) else (0, 0)


def decode(png: str, pixels: int) -> Image.Image | str:
    """The picture in a base64 PNG, or the reason for a failure, such as more than the `pixels` in its header."""
    try:
        return from_base64(png, pixels)
    except ValueError as error:
        return str(error)
