"""Judging that overlaps the next rollout.

With `overlap`, iteration i rolls out the batch of i + 1 while a thread judges its own, and learns then. A batch is
therefore learnt from one update after it was drawn; the ratio to the density it was drawn with accounts for that. It
pays where judges are slow and elsewhere (a server). A checkpoint holds the adapter that the batch under way was drawn
with; a run that is resumed draws it once more with that.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmalign import prompts as prompt_files
from mmalign.types import Trajectories
from reward_models import Prompt

THREAD = ThreadPoolExecutor(1, thread_name_prefix="judge")


@dataclass(frozen=True)
class Batch:
    """Prompts, their conditioning and walks, the judgement that is to come, and the adapter that walked (with overlap;
    otherwise it is the one in training)."""

    prompts: list[Prompt]
    cond: Any
    paths: Trajectories
    judged: Callable[[], Any]
    adapter: dict[str, Tensor] | None = None


def batch(run, iteration: int, roll_out: Callable, judge_all: Callable) -> Batch:
    """The batch of an iteration; with `overlap` the next one is under way when it returns."""
    own = run.ahead.pop(iteration, None) or begun(run, iteration, roll_out, judge_all)
    if run.config.overlap and iteration + 1 < run.config.iterations:
        run.ahead[iteration + 1] = begun(run, iteration + 1, roll_out, judge_all)
    return own


def begun(run, iteration: int, roll_out: Callable, judge_all: Callable) -> Batch:
    """The batch of an iteration, drawn now; with `overlap` its judgement is under way."""
    c = run.config
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed)
    with run.clock.of("rollout"):
        cond, paths = roll_out(run, prompts, run.levels, iteration)
    if not c.overlap:
        return Batch(prompts, cond, paths, lambda: judge_all(run, paths, prompts, iteration))
    with run.clock.of("decode"):  # here: the policy belongs to this thread
        images = iter([run.policy.decode(part).cpu() for part in paths.ends.split(c.decode_batch)])
    judging: Future = THREAD.submit(judge_all, run, paths, prompts, iteration, lambda _: next(images))
    return Batch(prompts, cond, paths, judging.result, run.policy.adapter())
