"""Compare regional credits and objectives on two-object and position prompts, at equal training time.

    for seed in 0 1 2; do for v in scalar region focused SRUM R-GDPO; do
        OMP_NUM_THREADS=1 python scripts/compare_regions.py run "$v" $seed
    done; done
    python scripts/compare_regions.py table

All have the model, adapter and verifier; the regions are the verifier's map. Evaluations do not count. With `--world
things` all is done on the other embedded world; give it another `--out`.
"""

import json
from pathlib import Path
from typing import Annotated

import compare_credits
import typer
from compare_credits import Captions, Named
from tiny_worlds import SHAPES, World, world_of

from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_files
from reward_models import files

KINDS = ("two_objects", "position")
BRANCH = "watch=[clip]"
IMAGES = (
    "watch=[clip] region=shapes plan=ode kernel=flow_sde credit=null advantage=null seeds=2 prompts_per_iteration=48"
)
VARIANTS = {
    "scalar": BRANCH,
    "region": f"{BRANCH} region=shapes advantage.regional=0.5",
    "focused": f"{BRANCH} region=shapes advantage.regional=0.5 mask=map",
    "SRUM": f"{IMAGES} objective=srum objective.margin=1 learning_rate=5e-5",
    "R-GDPO": f"{IMAGES} objective=rgdpo objective.draws=4 objective.scale=2 learning_rate=4e-4",
}
Out = Annotated[Path, typer.Option(help="folder of the runs")]
app = typer.Typer(add_completion=False)


def prompts(out: Path, world: World, captions: str) -> list[Path]:
    """Files of the prompts of these kinds, for training and evaluation, written below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in ("train", captions):
        lines = files.lines(files.text(locate(f"assets/prompts/{world.prompts}{name}.jsonl")))
        selected = [line for line in lines if json.loads(line)["tag"] in KINDS]
        files.write(out / f"{name}.jsonl", "\n".join(selected) + "\n")
        written.append(out / f"{name}.jsonl")
    return written


@app.command()
def run(
    variant: str,
    seed: int,
    seconds: float = 150.0,
    out: Out = Path("runs/regions"),
    name: Named = SHAPES.name,
    captions: Captions = "test",
) -> None:
    """Train one variant for about `seconds`."""
    world = world_of(name)
    train, held_out = prompts(out, world, captions)
    words = [*compare_credits.words_of(world, VARIANTS[variant]), f"prompts={train}", f"seed={seed}"]
    row = compare_credits.measured(compare_credits.BASE, words, seconds, prompt_files.read(held_out), world)
    compare_credits.write(out / compare_credits.name_of(variant, seed), row)


@app.command()
def table(
    out: Out = Path("runs/regions"),
    figure: Path = Path("docs/figures/regions.png"),
    name: Named = SHAPES.name,
    captions: Captions = "test",
) -> None:
    """Print the table (Markdown) and draw the curves: mean over seeds, and their range."""
    compare_credits.report(out, VARIANTS, 0.7, prompt_files.read(out / f"{captions}.jsonl"), figure, world_of(name))


if __name__ == "__main__":
    app()
