"""Judging that overlaps the next rollout.

With `overlap`, iteration i rolls out the batch of i + 1 while a thread judges its own, and learns then. A batch is
therefore learnt from one update after it was drawn; the ratio to the density it was drawn with accounts for that. It
pays where judges are slow and elsewhere (a server); a run that is resumed draws the batch it was ahead with once more,
from the policy as it is then.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmalign import prompts as prompt_files
from mmalign.types import Trajectories
from reward_models import Prompt

THREAD = ThreadPoolExecutor(1, thread_name_prefix="judge")


@dataclass(frozen=True)
class Batch:
    """Prompts, their conditioning and walks, and the judgement that is to come."""

    prompts: list[Prompt]
    cond: Any
    paths: Trajectories
    judged: Callable[[], Any]


def batch(run, iteration: int, roll_out: Callable, judge_all: Callable) -> Batch:
    """The batch of an iteration; with `overlap` the next one is under way when it returns."""
    own = run.ahead.pop(iteration, None) or _begun(run, iteration, roll_out, judge_all)
    if run.config.overlap and iteration + 1 < run.config.iterations:
        run.ahead[iteration + 1] = _begun(run, iteration + 1, roll_out, judge_all)
    return own


def _begun(run, iteration: int, roll_out: Callable, judge_all: Callable) -> Batch:
    c = run.config
    prompts = prompt_files.batch(run.prompts, c.prompts_per_iteration, iteration, c.seed)
    with run.clock.of("rollout"):
        cond, paths = roll_out(run, prompts, run.levels, iteration)
    if not c.overlap:
        return Batch(prompts, cond, paths, lambda: judge_all(run, paths, prompts, iteration))
    with run.clock.of("decode"):  # here: the policy belongs to this thread
        images = iter([run.policy.decode(part).cpu() for part in paths.ends.split(c.decode_batch)])
    judging: Future = THREAD.submit(judge_all, run, paths, prompts, iteration, lambda _: next(images))
    return Batch(prompts, cond, paths, judging.result)
