"""Refine many prompts into a folder, and continue after an interruption.

    OUT/settings.json    the settings; another run into the folder must have the same
    OUT/trace.jsonl      a line for each finished prompt, with all its rounds
    OUT/images/          every image, named by prompt and round; OUT/best/ the best one of each prompt

A prompt is done when its line is complete; its images are written before.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.distributed.launched import in_turn
from mmalign.distributed.processes import Ranks
from mmalign.evaluation.toward import Toward
from mmalign.policy.protocol import Policy
from mmalign.refinement.loop import Refinement, Settings, refine
from mmalign.runs import resumable
from mmalign.runs.folder import ROWS_ARE_WHOLE, failing
from mmalign.runs.outputs import make_folder
from reward_models import Prompt, RewardModel, files, overlay
from reward_models.images import to_pil

Row = dict[str, Any]
KEYS = {"id", "prompt", "wants", "rounds", "best", "stopped", "forwards"}  # of a row


@dataclass(frozen=True)
class Refined:
    """The rows of all prompts in order, and their `summary`."""

    rows: list[Row]
    summary: dict[str, Any]


def refine_prompts(
    policy: Policy,
    critic: RewardModel,
    prompts: Sequence[Prompt],
    settings: Settings,
    out: Path,
    batch: int = 64,
    images: Mapping[int, Float[Tensor, "1 3 H W"]] | None = None,
    name: str = "critic",
    about: Mapping[str, Any] | None = None,
    progress: Callable[[Iterable[Row], int, int], Iterable[Row]] = lambda rows, done, total: rows,
    toward: Toward | None = None,
    ranks: Ranks | None = None,
) -> Refined:
    """Refine prompts (`mmalign.refinement.loop.refine`) into the folder `out`, `batch` at a time. Prompts that are done
    there are not done again.

    `images` by prompt id are begun from, where given. `about` are facts that must be those of the folder too, such as
    the model. `progress` wraps the rows while they are made and gets how many prompts were done before, and how many
    there are. `toward` is the guidance of the move of that name. Of several processes (`ranks`) each refines its share
    of the prompts, and all return the whole. BadInput where the folder holds the work of other settings or prompts;
    Failed where it cannot be written.
    """
    make_folder(out)

    def opened() -> dict[int, Row]:
        with failing(out, ROWS_ARE_WHOLE):
            return open_folder(out, asdict(settings) | dict(about or {}), prompts)

    rows = in_turn(ranks, "the rows that are done", opened)
    left = [prompt for prompt in prompts if prompt.id not in rows]

    def refined(some: Sequence[Prompt]) -> list[Refinement]:
        first = None if images is None else torch.cat([images[prompt.id] for prompt in some])
        return refine(policy, critic, some, settings, batch, first, name, toward)

    mine, record = left if ranks is None else ranks.local(left), resumable.part_of(out / "trace.jsonl", ranks)
    for row in progress(_run(mine, batch, refined, record), len(rows), len(rows) + len(mine)):
        rows[row["id"]] = row
    if ranks is not None:
        ranks.barrier("the rows of all processes")
        rows = in_turn(ranks, "the rows of all processes", opened)
    ordered = [rows[prompt.id] for prompt in prompts]
    result = summary(ordered, settings.by or critic.names[0]) | {"before": len(prompts) - len(left), "out": str(out)}
    usage = getattr(getattr(critic, "judge", None), "usage", None)
    return Refined(ordered, result | ({} if usage is None else {"judge": dict(usage)}))


def _run(
    left: Sequence[Prompt], batch: int, refined: Callable[[Sequence[Prompt]], list[Refinement]], record: Path
) -> Iterator[Row]:
    """Refine `batch` prompts at a time; yields their rows once they are in the file `record`."""
    out = record.parent
    for start in range(0, len(left), batch):
        refinements = refined(left[start : start + batch])
        with failing(out, ROWS_ARE_WHOLE):
            rows = [save(refinement, out) for refinement in refinements]
            resumable.append(record, rows)
        yield from rows


def open_folder(out: Path, settings: Mapping[str, Any], prompts: Sequence[Prompt]) -> dict[int, Row]:
    """The rows of prompts that are done, by id, in a folder that is made if it is missing. BadInput if it holds the
    work of other settings or prompts."""
    rows = resumable.open_folder(out, settings, prompts, "trace.jsonl", KEYS, "a refinement")
    for name in ("images", "best"):
        (out / name).mkdir(exist_ok=True)
    return {row["id"]: row for row in rows}


def save(refinement: Refinement, out: Path) -> Row:
    """Write the images of a refinement; returns its row."""
    prompt, rounds = refinement.prompt, []
    for number, one in enumerate(refinement.rounds):
        name = f"images/{prompt.id:05d}-{number}.png"
        picture = to_pil(one.image[None])[0]
        picture.save(out / name)
        if number == refinement.best:
            picture.save(out / "best" / f"{prompt.id:05d}.png")
        rounds.append(
            {
                "image": name,
                "from": one.parent if one.parent >= 0 else None,
                "moves": one.moves,
                "attempt": asdict(one.attempt) if one.attempt else None,
                "scores": {key: None if value != value else round(value, 6) for key, value in one.scores.items()},
                "critique": one.critique,
                "revised": one.request,
                "failure": one.failure,
                "places": overlay.record(None, one.regions, tuple(one.image.shape[1:])),
                "forwards": one.forwards,
            }
        )
    row = {"id": prompt.id, "prompt": prompt.text, "wants": dict(prompt.wants), "rounds": rounds}
    return row | {"best": refinement.best, "stopped": refinement.stopped, "forwards": refinement.forwards}


def summary(rows: Sequence[Row], by: str) -> dict[str, Any]:
    """Mean score of the first image and of the best one, over prompts that have both; the images and forwards it took;
    how many prompts stopped for each reason."""
    both = [(_score(row, 0, by), _score(row, row["best"], by)) for row in rows]
    scored = [(first, best) for first, best in both if first is not None and best is not None]
    reasons = Counter(row["stopped"].split(":")[0].split(" in ")[0] for row in rows)
    return {
        "prompts": len(rows),
        "first": sum(first for first, _ in scored) / len(scored) if scored else None,
        "best": sum(best for _, best in scored) / len(scored) if scored else None,
        "gained": sum(best > first for first, best in scored),
        "unscored": len(rows) - len(scored),
        "images": sum(len(row["rounds"]) for row in rows),
        "forwards": round(sum(row["forwards"] for row in rows)),
        "stopped": dict(sorted(reasons.items())),
    }


def _score(row: Row, number: int, by: str) -> float | None:
    return row["rounds"][number]["scores"][by]


def pairs(rows: Sequence[Row], by: str, folder: str) -> list[Row]:
    """The best and the worst image of each prompt whose scores differ, as a choice between two pictures below `folder`,
    which `mmalign score` reads."""
    choices = []
    for row in rows:
        scored = [k for k in range(len(row["rounds"])) if _score(row, k, by) is not None]
        if not scored:
            continue
        worst = min(scored, key=lambda k: _score(row, k, by))
        if _score(row, worst, by) < _score(row, row["best"], by):
            best, other = (os.path.join(folder, row["rounds"][k]["image"]) for k in (row["best"], worst))
            images = {"image_a": best, "image_b": other}
            gap = _score(row, row["best"], by) - _score(row, worst, by)
            prompt = {"id": row["id"], "prompt": row["prompt"]}
            choices.append(row["wants"] | prompt | images | {"chosen": "a", "gap": gap})
    return choices


def requests(rows: Sequence[Row], by: str) -> list[Row]:
    """The requests that made a better image than the prompt itself did, as prompts."""
    better = []
    for row in rows:
        best = row["rounds"][row["best"]]["attempt"]
        first = _score(row, 0, by)
        if best and best["request"] != row["prompt"] and first is not None and _score(row, row["best"], by) > first:
            better.append(row["wants"] | {"id": row["id"], "prompt": best["request"], "first": row["prompt"]})
    return better


def export(rows: Sequence[Row], file: Path) -> None:
    """Write JSON lines."""
    files.write(file, "".join(json.dumps(row) + "\n" for row in rows))
