"""Images of many callers, scored together: a bounded queue, and one thread that runs the scorers.

Images that do not depend on each other share a batch, whoever sent them. A `groupwise` scorer is shown one caller's
images at a time, since ids of different callers' prompts may be equal by chance. What cannot be read or scored has a
reason instead, and the others are scored.
"""

import base64
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from threading import Condition, Thread

from PIL import Image

from reward_models.images import from_pil
from reward_models.scoring import Picture, asked, each, score_pictures
from reward_models.types import Images, Prompt, RewardModel, Scores

READERS = 4  # threads that decode


@dataclass(eq=False)
class Shot:
    """One image: its PNG in base64, its picture, or why there is none, once somebody reads it, and what has been found:
    see `score_pictures`."""

    png: str
    prompt: Prompt
    picture: Future[Picture | str] | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    critiques: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Job:
    """One caller's images, and the names of the scorers asked. `done` is set when all of them have answered."""

    shots: list[Shot]
    scorers: Sequence[str]
    done: Future[None] = field(default_factory=Future)


class Batcher:
    """The queue and its thread.

    A batch is what came within `wait` seconds, in order of arrival: at most `batch` images, or one larger job alone.
    At most `queue` images wait. One of more than `pixels` pixels is not read. `watch` is called with the jobs of each
    batch once they are scored.
    """

    def __init__(
        self,
        scorers: Mapping[str, RewardModel],
        batch: int,
        wait: int | float,
        queue: int,
        pixels: int,
        watch: Callable[[Sequence[Job]], None],
    ):
        self.scorers = {name: Isolated(scorer, batch) for name, scorer in scorers.items()}
        self.batch, self.wait, self.queue, self.pixels, self.watch = batch, wait, queue, pixels, watch
        self.jobs: deque[Job] = deque()
        self.waiting, self.closed, self.changed = 0, False, Condition()
        self.readers = ThreadPoolExecutor(READERS)
        self.thread = Thread(target=self._work, daemon=True)  # a scorer that hangs must not keep the process alive
        self.thread.start()

    def submit(self, job: Job) -> bool:
        """Whether the job was taken: there was room in the queue, and somebody there to empty it."""
        with self.changed:
            if self.closed or self.waiting + len(job.shots) > self.queue:
                return False
            self.jobs.append(job)
            self.waiting += len(job.shots)
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
            taken, count = [], 0
            while self.jobs and (not taken or count + len(self.jobs[0].shots) <= self.batch):
                taken.append(self.jobs.popleft())
                count += len(taken[-1].shots)
            self.waiting -= count
            self._read_ahead()
        return taken

    def _read_ahead(self) -> None:
        """Have the next batch decoded while one is scored; but no more, for pictures take up to 100 times their PNG."""
        count = 0
        for job in self.jobs:
            if count >= self.batch:
                return
            count += len(job.shots)
            for shot in job.shots:
                shot.picture = shot.picture or self.readers.submit(decode, shot.png, self.pixels)

    def _score(self, jobs: Sequence[Job]) -> None:
        for name, scorer in self.scorers.items():
            asking = [job for job in jobs if name in job.scorers]
            for together in [[job] for job in asking] if scorer.card.groupwise else [asking]:
                shots = [shot for job in together for shot in job.shots]
                pictures = [shot.picture.result() for shot in shots]
                found = score_pictures(pictures, [shot.prompt for shot in shots], {name: scorer})
                for shot, own in zip(shots, found, strict=True):
                    shot.scores |= own["scores"]
                    shot.failures |= own["failures"]
                    shot.critiques |= own["critiques"]


class Isolated:
    """A scorer that costs no caller a score because of another's image or prompt. Where images do not depend on each
    other, those it fails on are found by halving, as `each` does it, `batch` at a time."""

    def __init__(self, scorer: RewardModel, batch: int):
        self.scorer, self.batch, self.names, self.card = scorer, batch, scorer.names, scorer.card

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        look = partial(asked, self.scorer)
        return look(images, prompts) if self.card.groupwise else each(images, prompts, self.names, look, self.batch)


def decode(png: str, pixels: int) -> Picture | str:
    """The picture in a base64 PNG, or why there is none, such as more than `pixels` pixels."""
    try:
        with Image.open(BytesIO(base64.b64decode(png, validate=True)), formats=["PNG"]) as picture:
            if picture.width * picture.height > pixels:  # so far only the header has been read
                raise ValueError(f"{picture.width} x {picture.height} pixels, more than the {pixels} allowed")
            return from_pil([picture])
    except Exception as error:  # broken files raise almost anything
        return f"cannot be read: {' '.join(str(error).split())}"
