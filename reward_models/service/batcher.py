"""Images of many callers, scored together: a bounded queue, and one thread that runs the scorers.

Images that do not depend on each other share a batch, whoever sent them. A `groupwise` scorer is shown one caller's
images at a time, since ids of different callers' prompts may be equal by chance. What cannot be read or scored has a
reason instead, and the others are scored.
"""

import base64
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from threading import Condition, Thread

from PIL import Image

from reward_models import limits
from reward_models.images import from_base64, from_pil
from reward_models.scoring import each, score_isolated, score_pictures
from reward_models.types import Images, Prompt, RewardModel, Scores

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # how the file begins, before its width and height
READERS = 4  # threads that decode


@dataclass(eq=False)
class Shot:
    """One image: its PNG in base64, how many pixels its header promises, its picture (RGB), or why there is none, once
    somebody reads it, and what has been found: see `score_pictures`."""

    png: str
    prompt: Prompt
    pixels: int
    picture: Future[Image.Image | str] | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    critiques: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Job:
    """One caller's images, and the names of the scorers asked. `done` is set when all of them have answered."""

    shots: list[Shot]
    scorers: Sequence[str]
    done: Future[None] = field(default_factory=Future)

    @property
    def pixels(self) -> int:
        return sum(shot.pixels for shot in self.shots)


class Batcher:
    """The queue and its thread.

    A batch is what came within `wait` seconds, in order of arrival: at most `batch` images of `limits.TOGETHER` pixels,
    or one larger job alone. At most `queue` images of `limits.QUEUED` pixels wait. `watch` is called with the jobs of
    each batch once they are scored.
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
        """Whether the job was taken: there was room in the queue, and somebody there to empty it."""
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
        """Let the thread end when nothing waits any more."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def _work(self) -> None:
        while taken := self._next():
            jobs = [job for job in taken if job.done.set_running_or_notify_cancel()]  # some callers may have left
            try:
                self._score(jobs)
                self.watch(jobs)
            except Exception as error:  # nothing may end this thread
                for job in jobs:
                    job.done.set_exception(error)
            else:
                for job in jobs:
                    job.done.set_result(None)

    def _next(self) -> list[Job]:
        """The jobs of the next batch; none when there will be no more."""
        with self.changed:
            self.changed.wait_for(lambda: self.jobs or self.closed)
            self.changed.wait_for(lambda: self.waiting >= self.batch or self.closed, self.wait)
            taken = [self.jobs.popleft() for _ in range(self._first_batch())]
            self.waiting -= sum(len(job.shots) for job in taken)
            self.pixels -= sum(job.pixels for job in taken)
            self._read_ahead()
        return taken

    def _first_batch(self) -> int:
        """How many of the jobs that wait are scored together next."""
        number = images = pixels = 0
        for job in self.jobs:
            images, pixels = images + len(job.shots), pixels + job.pixels
            if number and (images > self.batch or pixels > limits.TOGETHER):
                break
            number += 1
        return number

    def _read_ahead(self) -> None:
        """Have the next batch decoded while one is scored; but no more, for pictures take up to 10,000 times their
        PNG."""
        for job in islice(self.jobs, self._first_batch()):
            for shot in job.shots:
                shot.picture = shot.picture or self.readers.submit(decode, shot.png, shot.pixels)

    def _score(self, jobs: Sequence[Job]) -> None:
        for name, scorer in self.scorers.items():
            asking = [job for job in jobs if name in job.scorers]
            for together in [[job] for job in asking] if scorer.card.groupwise else [asking]:
                shots = [shot for job in together for shot in job.shots]
                read = [shot.picture.result() for shot in shots]
                pictures = [own if isinstance(own, str) else from_pil([own]) for own in read]
                found = score_pictures(pictures, [shot.prompt for shot in shots], {name: scorer})
                for shot, own in zip(shots, found, strict=True):
                    shot.scores |= own["scores"]
                    shot.failures |= own["failures"]
                    shot.critiques |= own["critiques"]


class Isolated:
    """A scorer that costs no caller a score because of another's image or prompt. Where images do not depend on each
    other, those it fails on are found by halving, as `each` does it, `batch` or `limits.AT_ONCE` pixels at a time."""

    def __init__(self, scorer: RewardModel, batch: int):
        self.scorer, self.batch, self.names, self.card = scorer, batch, scorer.names, scorer.card

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        look = partial(score_isolated, self.scorer)
        if self.card.groupwise:
            return look(images, prompts)
        fitting = limits.AT_ONCE // images[0, 0].numel() if len(images) else 1
        return each(images, prompts, self.names, look, max(1, min(self.batch, fitting)))


def shot(png: str, prompt: Prompt, most: int) -> Shot:
    """An image as it was sent. One of more than `most` pixels by its header, or in no ASCII, is let go of at once."""
    width, height = promised(png)
    if width * height > most:
        why = f"cannot be read: {width} x {height} pixels, more than the {most} allowed"
    elif not png.isascii():
        why = "cannot be read: only ASCII stands for base64"
    else:
        return Shot(png, prompt, width * height)
    refused: Future[Image.Image | str] = Future()
    refused.set_result(why)
    return Shot("", prompt, 0, refused)


def promised(png: str) -> tuple[int, int]:
    """Width and height by the header of a base64 PNG; 0, 0 where it is no such header."""
    try:
        head = base64.b64decode(png[:32], validate=True)
    except ValueError:
        return 0, 0
    return struct.unpack(">II", head[16:]) if len(head) == 24 and head.startswith(PNG) else (0, 0)


def decode(png: str, pixels: int) -> Image.Image | str:
    """The picture in a base64 PNG, or why there is none, such as more than the `pixels` that were promised."""
    try:
        return from_base64(png, pixels)
    except ValueError as error:
        return str(error)
