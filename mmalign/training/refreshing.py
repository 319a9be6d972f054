"""Refresh the fitted reward of a run (`mmalign.rewards.refresh`): new pairs of its images, a refit, a comparison.

    OUT/refreshes.jsonl            a row for each refresh, written last: what it names is there
    OUT/refreshed/000050/          the refresh after 50 iterations: its judged images and pairs, as of `mmalign collect`
    OUT/refreshed/000050/model/    the model that was fitted, as of `mmalign reward fit`

A refresh is a function of the config, the iteration, the averaged adapter and the refreshes before, so that a resumed
run continues with the same reward. One that was interrupted continues: no image is judged twice.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmalign.config.checks import component
from mmalign.errors import BadInput, refusing
from mmalign.evaluation.collect import PAIRS, Pairing, collect
from mmalign.rewards.refresh import LEAST
from mmalign.runs import jsonl
from mmalign.seeds import seed_of
from mmalign.training.session import Session
from reward_models import Prompt, RewardModel, files, pairs as preferences
from reward_models.meaning import meaning
from reward_models.pairs import Pair
from reward_models.training import evaluate
from reward_models.weights import fingerprint

ROWS, FOLDER, MODEL = "refreshes.jsonl", "refreshed", "model"


class Refreshed(BaseModel):
    """A row of `refreshes.jsonl`: the refresh after an `iteration`.

    `images` were judged, `failed` of them without a score; `pairs` of them have unequal scores and are learnt from,
    `held_out` are not. `fitted_to`: all pairs of the refit. `before`, `after`: how many of the held-out pairs the old
    and the new model agree with, ties counted half, None without a refit; `p` of McNemar's test. `replaced`: whether
    the new one is used from here on; `version`: of the one that is; `reason`: why the old one stays.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    iteration: int = Field(ge=1)
    images: int
    failed: int
    pairs: int
    held_out: int
    fitted_to: int = 0
    before: float | None = None
    after: float | None = None
    p: float | None = None
    replaced: bool = False
    version: str
    reason: str = ""


def refresh(run: Session, out: Path, done: int, say: Callable[[str], None]) -> None:
    """Refresh the reward after `done` iterations, or load what was made of it before. The main process makes it, while
    the others wait; all must call it."""
    with run.clock.of("refresh"):
        row = None
        if run.ranks.main:
            row = next((row for row in _rows(out) if row.iteration == done), None) or _made(run, out, done, say)
            row = row.model_dump()
        row = run.ranks.all_gather_object(row, "the refreshed reward")[0]
        _install(run, out, [Refreshed.model_validate(row)])


def reopen(run: Session, out: Path, done: int) -> None:
    """Load the reward that was in force when `done` iterations were finished."""
    if run.refit is not None:
        _install(run, out, [row for row in _rows(out) if row.iteration < done])


def rewind(out: Path, done: int) -> None:
    """Remove the folders of refreshes after more than `done` iterations, which a resumed run makes again."""
    for path in (out / FOLDER).glob("*"):
        if not (path.name.isdecimal() and int(path.name) <= done):
            shutil.rmtree(path)


def since(run: Session) -> dict[str, int]:
    """As a row: after how many iterations the reward in force was fitted, in runs that refresh one."""
    return {} if run.refit is None else {"refresh": run.refit.since}


def _folder(out: Path, iteration: int) -> Path:
    return out / FOLDER / f"{iteration:06d}"


def _rows(out: Path) -> list[Refreshed]:
    """BadInput for a row that is none."""
    try:
        return [Refreshed.model_validate(row) for row in jsonl.rows(out / ROWS)]
    except ValidationError as error:
        raise BadInput(f"{out / ROWS}: not a row of a refresh: {error.errors()[0]['msg']}") from None


def _install(run: Session, out: Path, rows: Sequence[Refreshed]) -> None:
    """Use the last new model of these refreshes. BadInput where it is another one than its row says."""
    row = next((row for row in reversed(rows) if row.replaced), None)
    if row is None:
        return
    folder, name = _folder(out, row.iteration) / MODEL, run.refit.name
    with refusing():
        scorer = run.refit.load(folder)
    if scorer.card.version != row.version:
        raise BadInput(f"{folder}: its version is {scorer.card.version}, and {row.version} in {out / ROWS}")
    run.rewards.scorers[name] = scorer
    run.origin[f"scorer {name}"] = row.version
    run.refit.since = row.iteration


def _made(run: Session, out: Path, done: int, say: Callable[[str], None]) -> Refreshed:
    """Draw, judge, fit and compare; the row, once it is written."""
    settings, folder = run.config.refresh, _folder(out, done)
    learnt, held_out = settings.drawn(run.prompts.all, run.config.seed, done)
    summary = _judged(run, folder, [*learnt, *held_out], done)
    to_learn, to_compare = _sides(folder, learnt) if summary["pairs"] else ([], [])
    old = run.rewards.scorers[run.refit.name]
    counts = {"images": summary["images"], "failed": summary["unscored"]}
    row = {
        "iteration": done,
        **counts,
        "pairs": len(to_learn),
        "held_out": len(to_compare),
        "version": old.card.version,
    }
    pairs = [*_earlier(run, out, done), *to_learn]
    row["reason"] = _reason(run, to_learn, to_compare, pairs)
    if not row["reason"]:
        with refusing():
            run.refit.fit(pairs, folder / MODEL)
            new = run.refit.load(folder / MODEL)
        row |= _compared(old, new, to_compare)
        row["fitted_to"] = len(run.refit.pairs) + len(pairs)
    result = Refreshed.model_validate(row)
    files.append(out / ROWS, result.model_dump())
    files.sync(out / ROWS)
    say(_line(run, result))
    return result


def _judged(run: Session, folder: Path, prompts: Sequence[Prompt], done: int) -> dict[str, Any]:
    """Draw and judge the images of the prompts; the summary of `collect`."""
    c = run.config
    seeds = [seed_of(c.seed, "refresh", done, number) for number in range(c.refresh.seeds)]
    judges = {component(c.refresh.by)[0]: run.refit.judge}
    with run.learner.averaged():
        about = {"adapter": fingerprint(run.policy.adapter(), digits=16)}

        def work(size: int) -> dict[str, Any]:
            return collect(
                run.policy, prompts, judges, seeds, c.refresh.by, c.eval_steps, folder, Pairing("all"), size, about
            ).summary

        return run.fits["batch"](work)


def _sides(folder: Path, learnt: Sequence[Prompt]) -> tuple[list[Pair], list[Pair]]:
    """The pairs of a refresh that are learnt from, and those that are held out."""
    meanings = {meaning(p.text) for p in learnt}
    pairs = preferences.read(folder / PAIRS)
    sides = [[p for p in pairs if (meaning(p.prompt.text) in meanings) is learns] for learns in (True, False)]
    return sides[0], sides[1]


def _earlier(run: Session, out: Path, done: int) -> list[Pair]:
    """The pairs that the refreshes before have learnt from."""
    learnt, _ = run.config.refresh.groups(run.prompts.all, run.config.seed)
    rows = [row for row in _rows(out) if row.iteration < done and row.pairs]
    return [pair for row in rows for pair in _sides(_folder(out, row.iteration), learnt)[0]]


def _reason(run: Session, to_learn: Sequence[Pair], to_compare: Sequence[Pair], pairs: Sequence[Pair]) -> str:
    """Why there is nothing to fit, "" if there is."""
    for some, use in ((to_learn, "to learn from"), (to_compare, "held out")):
        if not some:
            return f"no two images of a prompt {use} have unequal scores"
    prompts = len({meaning(pair.prompt.text) for pair in (*run.refit.pairs, *pairs)})
    return f"pairs of {prompts} prompts; {LEAST} are needed to fit" if prompts < LEAST else ""


def _compared(old: RewardModel, new: RewardModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """How many of the pairs each model agrees with, and whether the new one replaces the old one."""
    result = evaluate(pairs, {"old": old, "new": new})
    before, after = (result["rewards"][f"{name}.score"]["with_ties"]["mean"] for name in ("old", "new"))
    row = {"before": before, "after": after, "p": result["compared"]["old.score ~ new.score"]["p"]}
    if before is None or after is None:
        return row | {"reason": "no score for an image of the held-out pairs"}
    if after <= before:
        return row | {"reason": "the new model is no better on the held-out pairs"}
    return row | {"replaced": True, "version": new.card.version}


def _line(run: Session, row: Refreshed) -> str:
    judged = f"refresh after iteration {row.iteration}: {row.images} images judged"
    judged += f", {row.failed} without a score" if row.failed else ""
    if row.before is None or row.after is None:
        return f"{judged}; {run.refit.name} stays: {row.reason}"
    agreement = f"{row.before:.3f} of {row.held_out} held-out pairs before, {row.after:.3f} after"
    return f"{judged}; {run.refit.name}: {agreement}; " + (f"it stays: {row.reason}" if row.reason else "replaced")
