"""Judging that overlaps the next rollout.

With `overlap`, iteration i rolls out the batch of i + 1 while a thread judges its own, and learns then. A batch is
therefore learnt from one update after it was drawn; the ratio to the density it was drawn with accounts for that. It
pays where judges are slow and elsewhere (a server). A checkpoint holds the adapter that the batch under way was drawn
with; a run that is resumed draws it once more with that.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from mmalign import prompts as prompt_files
from mmalign.types import Judgement, Trajectories
from reward_models import Prompt

THREAD = ThreadPoolExecutor(1, thread_name_prefix="judge")


@dataclass(frozen=True)
class Batch:
    """This process's prompts, their conditioning, walks and finished images, the judgement that is to come, and the
    adapter that walked (with overlap; otherwise it is the one in training)."""

    prompts: list[Prompt]
    cond: Any
    paths: Trajectories
    images: Tensor
    judged: Callable[[], Judgement]
    adapter: dict[str, Tensor] | None = None


def batch(run, iteration: int, *stages: Callable) -> Batch:
    """The batch of an iteration, by the `stages` roll out, decode and judge; with `overlap` the next one is under way
    when it returns. Only judging leaves this thread, to which the policy belongs."""
    own = run.ahead.pop(iteration, None) or begun(run, iteration, *stages)
    if run.config.overlap and iteration + 1 < run.config.iterations:
        run.ahead[iteration + 1] = begun(run, iteration + 1, *stages)
    return own


def begun(run, iteration: int, roll_out: Callable, decode: Callable, judge_all: Callable) -> Batch:
    """The batch of an iteration, drawn now; with `overlap` its judgement is under way."""
    c = run.config
    prompts = run.ranks.deal(prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed))
    with run.clock.of("rollout"):
        cond, paths = roll_out(run, prompts, run.levels, iteration)
    images = decode(run, paths)
    work = partial(judge_all, run, paths, images, prompts, iteration)
    if not c.overlap:
        return Batch(prompts, cond, paths, images, work)
    return Batch(prompts, cond, paths, images, THREAD.submit(work).result, run.policy.adapter())
