"""What Python users call: `align` fine-tunes a model, `open` does so iteration by iteration; `evaluate`, `best_of_n`,
`refine` and `collect` need no training, and `toward` guides their images. The command line calls the same functions.

- `model`: the hub id or the folder of a diffusers pipeline, or a loaded pipeline
- `prompts`: a list of texts, of objects with `prompt` and ground truth, a `datasets.Dataset`, or the name of a file or
  dataset (`mmalign.data.prompts.read`)
- a reward: a function of images and prompts (`reward_models.functions.FunctionScorer`), a component of a scorer by name
  (`clip.cosine`), or a scorer of one component by name or as an object

Mistakes raise `mmalign.errors.BadInput`, a ValueError, in one line; failures while running `mmalign.errors.Failed`.
"""

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from mmalign import given, policy as policies, run as runs
from mmalign.activity import counted
from mmalign.config import load as configs
from mmalign.config.checks import component
from mmalign.config.paths import locate
from mmalign.data import prompts as prompt_sources
from mmalign.distributed.launched import launched
from mmalign.errors import BadInput, refusing
from mmalign.evaluation import Choose, best_of_n as best, collect as collection, evaluate as evaluation, generate
from mmalign.evaluation.best_of_n import Best
from mmalign.evaluation.collect import Collected, Pairing
from mmalign.evaluation.evaluate import Evaluation
from mmalign.evaluation.toward import Term, Toward
from mmalign.policy.protocol import Policy
from mmalign.refinement import trace
from mmalign.refinement.loop import Settings
from mmalign.refinement.pictures import read_pictures
from mmalign.refinement.trace import Refined
from mmalign.reporting import export, report as reports
from mmalign.run import Training
from mmalign.runs import Form, jsonl, machine
from mmalign.runs.signals import Stop, Stopped, stopping
from mmalign.train import Row
from mmalign.training import values
from mmalign.training.setup import Given
from reward_models.images import to_pil

NOTHING: Mapping[str, Any] = MappingProxyType({})


# ------------------------------------------------------------------------------------------------------------- training


def align(model: Any, prompts: Any, reward: Any, *, config: str | Path = "align", **settings: Any) -> "Run":
    """Fine-tune a model by a reward, and return the run when it is done.

    `model`, `prompts` and rewards are described above; `reward` may also be a list of rewards, which are added, or a
    dict of rewards to weights. `settings` are those of a config (docs/config.md), as plain values or objects, which
    replace those of `config`, a file or a name such as `quickstart`; `held_out` may be prompts too, `watch` a list of
    scorers or functions, and a value of `scorers` a scorer. By default the run is evaluated on 64 of the prompts that
    it trains on, before, in between and after, and its folder is a new one below `runs`. `resume=True` continues the
    run in the folder `out`.

    A loaded pipeline is moved to the run's device and keeps its base weights; it ends with the averaged adapter. Ctrl-C
    ends the run after the iteration: in a notebook it returns what was learnt, in a script KeyboardInterrupt is raised.

        import mmalign

        def redness(images, prompts):  # PIL images, texts
            return [(2 * r - g - b) / 510 for r, g, b in (image.resize((1, 1)).getpixel((0, 0)) for image in images)]

        run = mmalign.align("assets/tiny_sd3", ["a circle", "two squares"], redness)
        run.save_lora("lora")
    """
    run = _begin(model, prompts, reward, config, **settings)
    shown = 0
    try:
        for _ in run:
            shown = run._show_sheets(shown)
    except KeyboardInterrupt:
        if not _interactive():
            raise
    run._show_sheets(shown)
    return run


def open(
    model: Any, prompts: Any, reward: Any, *, config: str | Path = "align", resume: bool = False,
    **settings: Any,
) -> "Run":  # fmt: skip
    """A run as in `align`, loaded and checked, which trains as one iterates over it.

        with mmalign.open("assets/tiny_sd3", ["a circle"], redness) as run:
            for row in run:  # the row of metrics of each iteration
                if row["reward"] > 0.9:
                    break

    What was learnt until then is saved at the end of the block.
    """
    return _begin(model, prompts, reward, config, resume, **settings)


def _begin(
    model: Any, prompts: Any, reward: Any, config: str | Path, resume: bool = False, **settings: Any
) -> "Run":  # fmt: skip
    policies.quiet()
    weights, named = given.rewards_of(reward, given.scorers_of(settings.pop("scorers", {})))
    watched = given.scorers_of(settings.pop("watch", ()))
    training, source = given.source_of(prompts)
    held_out = None
    if settings.get("held_out") is not None:
        held_out, settings["held_out"] = given.source_of(settings["held_out"], "held_out")
    settings |= {
        "model": str(model) if isinstance(model, str | Path) else given.label_of(model),
        "prompts": source, "rewards": weights, "watch": [*watched],
        "scorers": {name: one.settings for name, one in (named | watched).items() if one.settings},
    }  # fmt: skip
    if training is not None:  # a short list needs no setting
        usual = configs.load(config).prompts_per_iteration
        settings.setdefault("prompts_per_iteration", min(usual, len(training)))
    settings.setdefault("out", _fresh(Path("runs/align")))
    objects = {name: one.scorer for name, one in (named | watched).items() if one.scorer is not None}
    pipe = None if isinstance(model, str | Path | Policy) else model
    try:
        with ExitStack() as stack:
            torch.set_flush_denormal(True)  # subnormal activations make CPU arithmetic many times slower
            stack.callback(torch.set_flush_denormal, False)
            policy = model if isinstance(model, Policy) else None
            if pipe is not None:
                policy = stack.enter_context(given.lent(pipe, settings))
            c = configs.load(config, objects=settings)
            given.check_columns(objects.values(), training or prompt_sources.read(locate(c.prompts)))
            handed = Given(policy, objects, training, held_out)
            return Run(stack.enter_context(runs.opened(c, resume, None, handed)), stack.pop_all())
    except BaseException:
        if pipe is not None:
            given.without_adapter(pipe)
        raise


class Run:
    """A run in its folder. Iterating over it trains it and gives the row of metrics of each iteration; a loop that was
    left can be taken up again. `close`, the end of a `with` block, the last iteration and `pipeline` end it: it can
    then be resumed, and the model has the averaged adapter."""

    def __init__(self, training: Training, stack: ExitStack):
        self._training, self._stack, self._stop = training, stack, Stop()
        self._rows, self._ended = training.rows(self._stop), False
        session = training.run
        self._policy, self._learner, self.config = session.policy, session.learner, training.config
        stack.callback(lambda: self._policy.load_adapter(self._learner.ema))

    @property
    def folder(self) -> Path:
        """Its folder: `config.yaml`, `metrics.jsonl`, `evaluations.jsonl`, `images/`, `checkpoints/`."""
        return self._training.out

    def __iter__(self) -> Iterator[Row]:
        while not self._ended and (row := self._next()) is not None:
            yield row

    def _next(self) -> Row | None:
        try:
            with stopping(self._stop):
                row = next(self._rows, None)
        except BaseException as error:
            self._ended = True
            with self._stack:
                if not isinstance(error, Stopped):
                    raise
                interrupted = error.code == 128 + signal.SIGINT
                raise KeyboardInterrupt if interrupted else SystemExit(error.code) from None
        if row is None:
            self.close()
        return row

    def close(self) -> None:
        """Save the run where it stands, and end it."""
        if not self._ended:
            self._ended = True
            with self._stack:
                self._rows.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pipeline(self) -> Any:
        """The stock pipeline with the averaged adapter, named `default`. Reading it ends the run. BadInput for a model
        that is not one of a diffusers pipeline."""
        self.close()
        if not hasattr(self._policy, "pipe"):
            raise BadInput(f"a {type(self._policy).__name__} has no pipeline of diffusers")
        return self._policy.pipe

    @property
    def metrics(self) -> list[Row]:
        """The rows of all iterations so far (docs/metrics.md)."""
        return jsonl.rows(self.folder / "metrics.jsonl")

    @property
    def report(self) -> Path:
        """The page of the run so far, written now by the main process."""
        return reports.write(self.folder) if self._training.run.ranks.main else self.folder / "report.html"

    def evaluate(
        self, prompts: Any = None, rewards: Any = None, *, seeds: int = 2, steps: int | None = None, base: bool = False
    ) -> Evaluation:
        """`seeds` images of each prompt by the averaged adapter, or with `base` by the model without adapter, and their
        scores. By default the prompts are those of the run's evaluations, the scorers those of its rewards and `watch`,
        and the steps its `eval_steps`. The noise depends on the prompt's id and the number of the image alone."""
        session = self._training.run
        wanted = session.held_out if prompts is None else given.prompts_of(prompts)
        if not wanted:
            raise BadInput("prompts: this run has none for evaluation; give some")
        scorers = session.rewards.scorers if rewards is None else given.loaded(given.scorers_of(rewards))
        with self._policy.reference() if base else self._learner.averaged():
            return evaluate(self._policy, wanted, scorers, seeds=seeds, steps=steps or self.config.eval_steps)

    def sample(
        self, prompts: Any, *, seeds: Sequence[int] = (0,), steps: int | None = None, base: bool = False,
        toward: Toward | None = None,
    ) -> list[Image.Image]:  # fmt: skip
        """An image of each prompt from each seed, prompt by prompt, by the averaged adapter or with `base` by the model
        without adapter. A seed gives the noise that a stock pipeline draws from a CPU generator with it. `toward`
        guides the images (`mmalign.toward`)."""
        wanted = given.prompts_of(prompts)
        with self._policy.reference() if base else self._learner.averaged():
            images, _ = generate.generate(
                self._policy, wanted, [seeds] * len(wanted), steps or self.config.eval_steps, self.config.batch,
                toward=toward,
            )  # fmt: skip
        return to_pil(images)

    def save_lora(self, folder: str | Path, format: Form = "diffusers") -> Path:
        """Write the averaged adapter for other programs, with a model card, and read it back; `format` as in
        `mmalign export`. Returns what was written; of many processes the main one writes, and the others return the
        folder. BadInput where it cannot be written."""
        ranks = self._training.run.ranks
        if not ranks.main:
            return Path(folder)
        trained_on = machine.describe(ranks.size, ranks.accelerator.device)
        with self._learner.averaged():
            return export.write(
                self._policy, self.config, self.folder, self._training.done, trained_on, Path(folder), format
            )

    def _show_sheets(self, shown: int) -> int:
        """In a notebook, show the pictures of the evaluations after the first `shown`; returns how many there are."""
        if not _in_notebook():
            return shown
        from IPython.display import Image as Picture, display

        rows = jsonl.rows(self.folder / "evaluations.jsonl")
        for row in rows[shown:]:
            sheet = self.folder / "images" / f"{row['name'] or format(row['iteration'], '06d')}.png"
            print(f"iteration {row['iteration']}")
            display(Picture(filename=str(sheet)))
        return len(rows)


# ---------------------------------------------------------------------------------------------------- without training


def evaluate(
    model: Any, prompts: Any, rewards: Any, *, adapter: given.Adapter = None, seeds: int = 2, steps: int = 10,
    guidance: float | None = None, batch: int = 256, toward: Toward | None = None,
) -> Evaluation:  # fmt: skip
    """Draw `seeds` images of each prompt by ODE and score them. `rewards` are scorers by name, functions or objects:
    one or a list, or a dict by name; all components of each are given. `adapter` is a run, or a LoRA file or folder;
    several by weight, `{path: weight}`, act as a mixture.
    `toward` guides the images (`mmalign.toward`).

        result = mmalign.evaluate("assets/tiny_sd3", ["a red circle", "a blue square"], "clip")
        result.means()  # {"clip.cosine": ..., "diversity": ...}; result.images [N, 3, H, W] float32 in [0, 1]
    """
    wanted, scorers = given.prompts_of(prompts), given.loaded(given.scorers_of(rewards))
    with given.drawing(model, guidance, adapter) as policy:
        given.warn_cut(wanted, policy, *scorers.values())
        return evaluation.evaluate(policy, wanted, seeds, steps, scorers, batch, toward)


def best_of_n(
    model: Any, prompts: Any, reward: Any, seeds: Sequence[int] = (0, 1, 2, 3), steps: int = 10,
    keep: int | None = None, after: int | None = None, *, scorers: Mapping[str, Any] = NOTHING,
    adapter: given.Adapter = None, guidance: float | None = None, batch: int = 64, toward: Toward | None = None,
    value: str | Path | None = None,
) -> Best:  # fmt: skip
    """The image of each prompt with the best reward, of one from each seed. With `keep` only that many of a prompt's
    images, those that look best `after` so many steps, are continued, or those that the value head of a run expects
    most of: `value` is the folder of a run with `credit: value`. `scorers` has objects or settings by name, for a
    reward that is named. `toward` guides the images (`mmalign.toward`).

        result = mmalign.best_of_n("assets/tiny_sd3", ["a red circle"], "clip.cosine", seeds=range(8))
        result.images, result.member, result.score  # [P, 3, H, W]; the index of the seed; its score
    """
    wanted, (weights, chosen) = given.prompts_of(prompts), given.rewards_of(reward, given.scorers_of(scorers))
    if len(weights) > 1:
        raise BadInput(f"reward: {', '.join(weights)}: one is needed to choose by")
    if (keep is None) != (after is None) or (keep is not None and not (keep < len(seeds) and after < steps)):
        raise BadInput(
            f"keep {keep}, after {after}: both or neither, fewer than the {len(seeds)} seeds and the {steps} steps"
        )
    if value is not None and keep is None:
        raise BadInput("value: a value head chooses which images are continued; give keep and after")
    head = None if value is None else values.read(Path(value))
    name, part = component(next(iter(weights)))
    scorer = chosen[name].loaded(name)
    if part not in scorer.names:
        raise BadInput(f"reward {name}.{part}: that scorer gives {', '.join(scorer.names)}")
    with given.drawing(model, guidance, adapter) as policy:
        given.warn_cut(wanted, policy, scorer)
        if head is not None:
            with refusing():
                head.check(policy)
        numbers = [[*seeds]] * len(wanted)
        return best.best_of(policy, wanted, numbers, steps, scorer, part, batch, keep, after, toward, head)


def toward(
    reward: Any, push: float = 0.05, since: float = 0.9, *, batch: int = 8, scorers: Mapping[str, Any] = NOTHING
) -> Toward:
    """Guidance of images by the gradient of a reward, for `evaluate`, `best_of_n`, `refine` and `Run.sample`
    (`mmalign.evaluation.toward.Toward`). The `reward` is a scorer with gradients by name or as an object, which stands
    for its first component, or a component by name; or a mapping of such names to weights, for their sum. `push`: the
    length of each move in units of the latent's root mean square; `since`: the time from which images are guided, from
    1 (noise) to 0; `batch`: images of one backward pass. `scorers` has objects or settings by name.

        mmalign.evaluate("assets/tiny_sd3", ["a red circle"], "clip", toward=mmalign.toward("clip.cosine", push=0.05))
    """
    weights = {reward: 1.0} if isinstance(reward, str) else reward
    if isinstance(weights, Mapping):
        known, loaded = given.scorers_of(scorers), {}
        for name in dict.fromkeys(component(each)[0] for each in weights):
            loaded[name] = known.get(name, given.Named()).loaded(name)
        parts = [(*component(each), weight) for each, weight in weights.items()]
        terms = [Term(loaded[name], part, weight, name) for name, part, weight in parts]
    else:
        terms = [Term(scorer.loaded(name), "", 1.0, name) for name, scorer in given.scorers_of([reward]).items()]
    return Toward(tuple(terms), push, since, batch)


def refine(
    model: Any, prompts: Any = None, critic: Any = "shapes_critic", *, out: str | Path = "refined",
    images: str | Path | None = None, moves: Sequence[str] = ("request", "seed"), by: str = "", good: float = 1.0,
    rounds: int = 4, forwards: float | None = None, patience: int | None = None, cut: float = 0.9,
    strength: float = 1.5, steps: int = 10, guidance: float | None = None, seed: int = 0,
    adapter: given.Adapter = None, batch: int = 64, toward: Toward | None = None,
) -> Refined:  # fmt: skip
    """Draw an image of each prompt, have it criticised, draw again, and keep the best one; nothing is trained. The
    settings are those of `mmalign.refinement.loop.Settings`; `rounds` counts all images of a prompt. Prompts that are
    done in the folder `out` are not done again. With `images`, a folder or table of pictures and their prompts, the
    first images are those. `toward` is the guidance of the move of that name (`mmalign.toward`). Under a launcher each
    process refines its share of the prompts, and all return the whole.

        result = mmalign.refine("assets/tiny_sd3", ["a purple circle and a square"], out="refined")
        result.rows[0]["rounds"], result.summary  # every image with its scores and critique; refined/best has the best
    """
    scorers = given.scorers_of(critic)
    if len(scorers) != 1:
        raise BadInput(f"critic: one is needed, got {', '.join(scorers) or 'none'}")
    if (prompts is None) == (images is None):
        raise BadInput("prompts or images are needed, one of the two")
    [(name, scorer)] = given.loaded(scorers).items()
    by = by or scorer.names[0]
    if by not in scorer.names:
        raise BadInput(f"by {by!r}: {name} gives {', '.join(scorer.names)}")
    rules = Settings(tuple(moves), by, good, rounds, forwards, patience, cut, strength, 1.0, steps, seed)
    rules.check(adapter is not None, toward is not None)
    wanted, pictures = (None if prompts is None else given.prompts_of(prompts)), None
    about = {"critic": name, "version": scorer.card.version, "adapter": str(adapter or "")}
    about |= {"model": model if isinstance(model, str) else given.GIVEN, "images_from": str(images or "")}
    about |= {"toward": str(toward)} if toward else {}
    with launched() as ranks, given.drawing(model, guidance, adapter) as policy:
        if images is not None:
            with refusing():
                wanted, pictures = read_pictures(Path(locate(str(images))), policy.image_size)
        given.warn_cut(wanted, policy, scorer)
        rules = replace(rules, guidance=policy.guidance)
        shown = partial(counted, name="refining", unit="prompts")
        return trace.refine_prompts(
            policy, scorer, wanted, rules, Path(out), batch, pictures, name, about, shown, toward, ranks
        )


def collect(
    model: Any, prompts: Any, rewards: Any, *, seeds: Sequence[int] = (0, 1, 2, 3), by: str = "",
    out: str | Path = "collected", pairs: Choose = "extremes", margin: int | float = 0.0, ties: bool = False,
    steps: int = 10, guidance: float | None = None, adapter: given.Adapter = None, batch: int = 64,
) -> Collected:  # fmt: skip
    """Draw an image of each prompt from each seed, score all, and pair the images of a prompt by the score `by`,
    "scorer.component", by default the first of the `rewards`, which are those of `evaluate`. `pairs`: the best image
    with the worst, or all; images whose scores differ by at most `margin` are left out, or with `ties` are a tie. The
    folder `out` gets the images, `judged_images.jsonl` to train on, and `pairs.jsonl`; prompts that are done there are
    not done again. Under a launcher each process draws its share of the prompts, and all return the whole.

        result = mmalign.collect("assets/tiny_sd3", ["a red circle", "a blue square"], "shapes", by="shapes.partial")
        result.pairs, result.rows, result.summary  # as in the files; collected/images has the images
    """
    wanted, scorers = given.prompts_of(prompts), given.loaded(given.scorers_of(rewards))
    names = [f"{name}.{part}" for name, scorer in scorers.items() for part in scorer.names]
    if not names or (by and by not in names):
        raise BadInput(f"by {by!r}: the rewards give {', '.join(names) or 'nothing'}")
    if len({*seeds}) < len(seeds) or not seeds:
        raise BadInput(f"seeds {[*seeds]}: at least one is needed, and none twice")
    about = {"model": model if isinstance(model, str) else given.GIVEN, "adapter": str(adapter or "")}
    pairing = Pairing(pairs, margin, ties)
    with launched() as ranks, given.drawing(model, guidance, adapter) as policy:
        given.warn_cut(wanted, policy, *scorers.values())
        about |= {"guidance": getattr(policy, "guidance", 1.0)}
        shown = partial(counted, name="collecting", unit="prompts")
        return collection.collect(
            policy, wanted, scorers, seeds, by or names[0], steps, Path(out), pairing, batch, about, shown, ranks
        )


def _fresh(folder: Path) -> Path:
    """A folder that is not there: `folder`, or with a number after it."""
    number = 1
    while (path := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return path


def _interactive() -> bool:
    return hasattr(sys, "ps1") or _in_notebook()


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return bool(shell) and hasattr(shell, "kernel")
