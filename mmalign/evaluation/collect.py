"""Draw images of many prompts, score them, and pair them, into a folder that the same command continues.

    OUT/settings.json          the settings; another command into the folder must have the same
    OUT/judged_images.jsonl    a row for each image (`mmalign.data.judged_images`), written once the image is there
    OUT/images/                the images, named by prompt and seed
    OUT/pairs.jsonl            pairs of the images of a prompt (`reward_models.pairs`), made from the rows at the end

The images of a prompt are drawn and scored together and apart from those of others. So the files depend neither on
where a command was interrupted nor on how many images fit in a forward, as long as those of a prompt do.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from mmalign.distributed.launched import in_turn
from mmalign.distributed.processes import Ranks
from mmalign.errors import BadInput
from mmalign.evaluation import Choose
from mmalign.evaluation.generate import generate, image_file
from mmalign.policy.protocol import Policy
from mmalign.runs import resumable
from mmalign.runs.folder import ROWS_ARE_WHOLE, failing
from mmalign.runs.outputs import make_folder
from mmalign.runs.resumable import Row
from reward_models import Prompt, RewardModel, limits
from reward_models.images import rounded, to_pil
from reward_models.scoring import score_pictures, unfit

RECORDS, PAIRS = "judged_images.jsonl", "pairs.jsonl"
KEYS = {"image", "prompt", "id", "seed", "wants", "score", "regions", "scores", "failures"}  # of a row, at least


@dataclass(frozen=True)
class Pairing:
    """Which images of a prompt are paired: the best with the worst, or all. Two images whose scores differ by more than
    `margin` are a preference; others are left out, or with `ties` are a tie."""

    choose: Choose = "extremes"
    margin: int | float = 0.0
    ties: bool = False

    def check(self, prompts: int, seeds: int) -> None:
        """BadInput for a value that is out of range, and for more pairs than can be read."""
        if self.choose not in ("extremes", "all"):
            raise BadInput(f"pairs {self.choose!r}: extremes or all is needed")
        if not 0 <= self.margin < float("inf"):
            raise BadInput(f"margin {self.margin}: a number of at least 0 is needed")
        most = prompts * seeds * (seeds - 1) // 2
        if self.choose == "all" and most > limits.PAIRS:
            raise BadInput(f"pairs all: up to {most} pairs, more than {limits.PAIRS}; take fewer prompts or seeds")


EXTREMES = Pairing()


@dataclass(frozen=True)
class Collected:
    """The rows of all images, prompt by prompt and seed by seed, and the pairs, both as in the files; and `summary`:
    the numbers of prompts, images, images without a score, and pairs, and how many prompts were done before."""

    rows: list[Row]
    pairs: list[Row]
    summary: dict[str, Any]


def collect(
    policy: Policy,
    prompts: Sequence[Prompt],
    scorers: Mapping[str, RewardModel],
    seeds: Sequence[int],
    by: str,
    steps: int,
    out: Path,
    pairing: Pairing = EXTREMES,
    batch: int = 64,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[Iterable[Row], int, int], Iterable[Row]] = lambda rows, done, total: rows,
    ranks: Ranks | None = None,
) -> Collected:
    """Draw an image of each prompt from each seed, score all by the scorers, and pair them by the score `by`,
    "scorer.component", into the folder `out`. Prompts that are done there are not done again.

    An image that cannot be scored is a row with the reason, and in no pair. `about` are facts that must be those of the
    folder too, such as the model. `progress` wraps the prompts while they are made and gets how many were done before,
    and how many there are. Of several processes (`ranks`) each draws its share of the prompts, and all return the
    whole. BadInput where the folder holds the work of other settings or prompts; Failed where it
    cannot be written.
    """
    pairing.check(len(prompts), len(seeds))
    versions = {name: scorer.card.version for name, scorer in scorers.items()}
    settings = {"seeds": [*seeds], "steps": steps, "by": by, "scorers": versions}
    make_folder(out)

    def opened() -> dict[tuple[int, int], Row]:
        with failing(out, ROWS_ARE_WHOLE):
            return _open(out, settings | dict(about or {}), prompts, seeds)

    rows = in_turn(ranks, "the rows that are done", opened)
    left = [prompt for prompt in prompts if (prompt.id, seeds[0]) not in rows]
    mine, record = left if ranks is None else ranks.local(left), resumable.part_of(out / RECORDS, ranks)
    drawn = (_collected(policy, prompt, scorers, seeds, by, steps, record, batch) for prompt in mine)
    for some in progress(drawn, len(prompts) - len(left), len(prompts) - len(left) + len(mine)):
        rows |= {(row["id"], row["seed"]): row for row in some}
    if ranks is not None:
        ranks.barrier("the rows of all processes")
        rows = in_turn(ranks, "the rows of all processes", opened)
    groups = [[rows[prompt.id, seed] for seed in seeds] for prompt in prompts]
    pairs = [pair for group in groups for pair in paired(group, pairing)]
    if ranks is None or ranks.main:
        with failing(out, ROWS_ARE_WHOLE):
            resumable.rewrite(out / PAIRS, pairs)
    every = [row for group in groups for row in group]
    unscored = sum(row["score"] is None for row in every)
    counts = {"prompts": len(prompts), "images": len(every), "unscored": unscored, "pairs": len(pairs)}
    return Collected(every, pairs, counts | {"before": len(prompts) - len(left), "out": str(out)})


def _open(
    out: Path, settings: Mapping[str, Any], prompts: Sequence[Prompt], seeds: Sequence[int]
) -> dict[tuple[int, int], Row]:
    """The rows of prompts that are done, by id and seed. Those of a prompt that is not are dropped."""
    if (out / PAIRS).exists() and not (out / "settings.json").exists():
        raise BadInput(f"{out} has a {PAIRS} but no settings.json; choose another --out")
    before = resumable.open_folder(out, settings, prompts, RECORDS, KEYS, "a collection")
    (out / "images").mkdir(exist_ok=True)
    for number, row in enumerate(before, 1):
        fits = row["seed"] in seeds and row["image"] in (None, _image(row["id"], row["seed"]))
        if not (fits and _is_score(row["score"]) and isinstance(row["wants"], dict)):
            raise BadInput(f"{out / RECORDS}, line {number}: not a row of a collection; choose another --out")
    rows = {(row["id"], row["seed"]): row for row in before}
    done = {prompt.id for prompt in prompts if all((prompt.id, seed) in rows for seed in seeds)}
    rows = {key: row for key, row in rows.items() if key[0] in done}
    resumable.rewrite(out / RECORDS, [*rows.values()])
    return rows


def _is_score(score: Any) -> bool:
    return score is None or (isinstance(score, int | float) and not isinstance(score, bool))


def _image(prompt: int, seed: int) -> str:
    return str(image_file(Path("images"), Prompt("", {}, prompt), seed))


def _collected(
    policy: Policy,
    prompt: Prompt,
    scorers: Mapping[str, RewardModel],
    seeds: Sequence[int],
    by: str,
    steps: int,
    record: Path,
    batch: int,
) -> list[Row]:
    """Draw and score the images of a prompt; returns their rows once they are in the file `record`."""
    out = record.parent
    images, _ = generate(policy, [prompt], [seeds], steps, batch)
    broken = unfit(images)
    pictures = [broken.get(i) or rounded(images[i : i + 1]) for i in range(len(images))]
    judged = score_pictures(pictures, [prompt] * len(images), scorers)
    height, width = images.shape[2:]
    rows = []
    with failing(out, ROWS_ARE_WHOLE):
        for seed, picture, scores in zip(seeds, pictures, judged, strict=True):
            name = None if isinstance(picture, str) else _image(prompt.id, seed)
            if name is not None:
                to_pil(picture)[0].save(out / name)
            row = {"image": name, "prompt": prompt.text, "id": prompt.id, "seed": seed, "wants": dict(prompt.wants)}
            row |= {"size": [width, height], "score": scores["scores"][by], "regions": regions(scores["places"], by)}
            rows.append(row | {key: scores[key] for key in ("scores", "failures", "critiques", "requests", "replies")})
        resumable.append(record, rows)
    return rows


def regions(places: Mapping[str, Any], by: str) -> list[dict[str, Any]]:
    """The regions of an image from its `places` by scorer (`reward_models.overlay.record`), in the form of records:
    those of the scorer of `by` or, if it has none, of the first that has."""
    name = by.rpartition(".")[0]
    first = next((boxes for key in (name, *places) if (boxes := places.get(key, {}).get("boxes"))), [])
    return [
        {"box": one["box"], "score": one["credit"], "label": one["label"], "reason": one["reason"]} for one in first
    ]


def paired(rows: Sequence[Row], pairing: Pairing) -> Iterator[Row]:
    """The pairs of the images of one prompt, the better one as `image_a`. Images without a score are in none."""
    scored = [row for row in rows if row["score"] is not None]
    if len(scored) < 2:
        return
    two = combinations(scored, 2)
    if pairing.choose == "extremes":
        best = max(scored, key=lambda row: row["score"])
        two = [(best, min((row for row in scored if row is not best), key=lambda row: row["score"]))]
    for one, other in two:
        a, b = (one, other) if one["score"] >= other["score"] else (other, one)
        gap = a["score"] - b["score"]
        if gap > pairing.margin or pairing.ties:
            chosen = "a" if gap > pairing.margin else "tie"
            prompt = {"id": a["id"], "prompt": a["prompt"]}
            yield a["wants"] | prompt | {"image_a": a["image"], "image_b": b["image"], "chosen": chosen, "gap": gap}
