"""The configuration of a run: flat YAML 1.2, complete in itself, checked before anything is loaded.

Every field has a default that works on the embedded model. A file states what it changes; `key=value` on the command
line changes it once more. Methods (plan, kernel, credit, objective, loss, combination, mask, draw, selection) own their
settings: they are dataclasses from the tables of their packages, and what they need is asked of them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator, model_validator

from mmalign.config import checks
from mmalign.config.checks import component
from mmalign.config.methods import one_of, settings
from mmalign.credit import CREDITS, Branch as BranchCredit, Mix
from mmalign.data.draws import DRAWS, Epochs
from mmalign.extension import EXTENSIONS
from mmalign.learn.loss import LOSSES, Clipped
from mmalign.objectives import OBJECTIVES, Grpo
from mmalign.objectives.advantage import Advantage
from mmalign.objectives.masks import MASKS
from mmalign.rewards.combination import COMBINATIONS, Sum
from mmalign.rewards.refresh import Refresh
from mmalign.rewards.terms import AtLeast, Reward
from mmalign.sampling.kernels import KERNELS, FlowSde
from mmalign.sampling.plans import PLANS, Branch
from mmalign.selection import SELECTIONS
from mmalign.selection.scouts import Scouts
from reward_models import files
from reward_models.combine import Ramp

RESUMABLE = ("out", "max_skips", "max_failed", "patience")  # where a run is and when it stops: its resumption may say
TRAINING, TRAINING_MOST = "training", 64  # `held_out` that means training prompts, and how many of them at most
# in a checkpoint only where they are not the default: older ones lack them
LATER = ("draw", "extend", "refresh", "scouts", "select")


def _used(name: str, default: Any, text: str) -> Any:
    """A field that has its default where the objective uses it, and null elsewhere."""
    return Field(default_factory=lambda data: default if name in data["objective"].uses else None, description=text)


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    # what is trained, on what
    model: str = Field("assets/tiny_sd3", description="folder or hub id of a diffusers pipeline")
    prompts: str = Field(
        "assets/prompts/train.jsonl",
        description="training prompts: .txt (one a line), a table (.jsonl, .json, .csv, .tsv, .parquet) or "
        "hf:NAME[/CONFIG]:SPLIT, a dataset of Hugging Face or a folder of one; a row has `prompt`, maybe `id`, and "
        "ground truth; with :COLUMN after it that is read alone, each text once",
    )
    draw: one_of(DRAWS, "draw") = Field(
        Epochs(),
        description="which prompts an iteration takes: epochs, shuffled; by pass_rate, mixed ones most; or in stages, "
        "easy ones first",
    )
    held_out: str | None = Field(
        "assets/prompts/validation.jsonl",
        description="prompts for evaluation, named in the same way; training: 64 at most of the training prompts, "
        "evenly spaced, which shows learning but not how far it carries; null for none",
    )
    rewards: dict[str, float | Ramp | Reward] = Field(
        {"shapes.strict": 0.5, "shapes.partial": 0.5},
        description="scorer.component: weight, or {start, end, over: linear or cosine} to move it over the run, or "
        "{weight, density: step or end}, where end scores finished images alone; with records only shown at evaluation",
    )
    combine: one_of(COMBINATIONS, "combination") = Field(
        Sum(), description="how rewards become one: sum, product, gate, mrn, gdpo, potential, experts, directed"
    )
    reference: str | None = Field(
        None, description="file of `mmalign evaluate --reference`: rewards in its standard deviations above its means"
    )
    at_least: dict[str, AtLeast] = Field(
        {}, description="scorer.component: {bound, rate}; its mean is held at the bound by a multiplier that moves"
    )
    watch: list[str] = Field([], description="scorers shown at evaluation beside the rewards, never trained on")
    scorers: dict[str, dict[str, Any]] = Field(
        {}, description="settings of scorers by name; with `scorer: NAME` among them the name is your own"
    )
    refresh: settings(Refresh, optional=True) = Field(
        None, description="fit a reward of type `fitted` again during the run, to images that a judge has scored"
    )
    cache: str | None = Field(None, description="file of cached scores, shared between runs; created if missing")
    records: str | None = Field(
        None, description="JSONL of judged images to learn from instead of sampling, for objectives that take it"
    )
    out: str = Field(
        "runs/quickstart", min_length=1, description="the run's folder; must be new, or the same run resumed"
    )
    seed: int = Field(0, ge=0)

    # rollout
    iterations: int = Field(100, ge=1)
    prompts_per_iteration: int = Field(8, ge=1, description="P, of all ranks together")
    seeds: int = Field(1, ge=1, le=10_000, description="S, starting noises per prompt")
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance in rollout, replay and evaluation; 1 = none"
    )
    steps: int = Field(8, ge=2, le=1000, description="T, denoising steps of the rollout")
    plan: one_of(PLANS, "plan") = Field(
        Branch(), description="which steps are stochastic: ode, sde, window, branch, tree"
    )
    kernel: one_of(KERNELS, "kernel") = Field(
        FlowSde(), description="how a stochastic step draws: flow_sde, dance_sde, cps, ddim, scheduled, and its noise"
    )
    max_forwards: int | None = Field(
        None, ge=1, description="network forwards of one iteration, replay included; the plan is thinned to fit"
    )
    max_rewards: int | None = Field(
        None, ge=1, description="images scored in one iteration, times reward scorers; the plan is thinned to fit"
    )
    rollout_parts: int = Field(
        1, ge=1, description="parts of the prompts: each is sampled while the one before is scored; for slow judges"
    )
    scouts: settings(Scouts, optional=True) = Field(
        None, description="sample only the most contrastive of many starting noises in full; null: all of `seeds`"
    )
    extend: one_of(EXTENSIONS, "extension", optional=True) = Field(
        None,
        description="further trajectories by what the judged ones show: frontier branches again, salvage cuts and "
        "draws the rest again, revise draws under a critic's request; null: none",
    )
    batch: int = Field(
        128,
        ge=1,
        description="rows of one forward at most; affects speed, and rounding, which can change a reward that "
        "jumps (jpeg_size, strict verdicts, ocr); halved when memory runs out",
    )
    decode_batch: int = Field(
        32, ge=1, description="images decoded at once in training; as above; 1 is what diffusers calls slicing"
    )

    # credit and learning
    objective: one_of(OBJECTIVES, "objective") = Field(
        Grpo(),
        description="what is learnt from a rollout: grpo (policy gradient), or from its images: nft, awm, "
        "advantage_flow, rft, dpo, online_dpo, srum, rgdpo; or from a differentiable reward: backprop; or a sum; "
        "outcome makes a reward model of the adapter",
    )
    credit: one_of(CREDITS, "credit", optional=True, total=Mix) = _used(
        "credit", BranchCredit(), "rewards to advantages: terminal, branch, gain, value, renorm, prl, implicit; or a "
        "list of these, each with a `weight` as in rewards, which are added",
    )  # fmt: skip
    loss: one_of(LOSSES, "loss", optional=True) = _used(
        "loss", Clipped(), "clipped (PPO), guard or masked, and its clip"
    )
    advantage: settings(Advantage, optional=True) = _used("advantage", Advantage(), "unit and bounds of advantages")
    select: one_of(SELECTIONS, "selection", optional=True) = Field(
        None,
        description="which of a prompt's images are learnt from: extremes, the most contrastive; prof, those "
        "whose process and outcome agree; null: all",
    )
    mask: one_of(MASKS, "mask", optional=True) = Field(
        None, description="train only where the region's map has an opinion (map), or where the prompt acts (prompt)"
    )
    max_kl: PositiveFloat | None = Field(
        None,
        description="KL divergence to the model without adapter (metric `kl`) above which the run is saved, evaluated "
        "and ended; with beta 0 measuring it takes another forward for each row replayed; null: no limit",
    )
    dead_spread: float = Field(
        0.0,
        ge=0,
        description="a group whose standard deviation is at most this is dead: advantage 0, counted; with 0, one that "
        "differs by rounding alone (1.2e-7 of its largest reward)",
    )
    region: str | None = Field(None, description="scorer whose map credits positions of the image; null: none")
    region_grid: tuple[Annotated[int, Field(ge=1, le=1024)], Annotated[int, Field(ge=1, le=1024)]] | None = Field(
        None, description="cells of the grid that regional credit is taken on; null: latent positions"
    )
    lora_rank: int = Field(16, ge=1, le=4096)
    lora_alpha: float = Field(32.0, gt=0)
    lora_targets: list[str] | None = Field(
        None, min_length=1, description="names of linear layers; null: the attention projections"
    )
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="iterations of linear warm-up")
    cooldown: int = Field(0, ge=0, description="iterations of linear decay to 0 at the end")
    epochs: int = Field(1, ge=1, description="passes over an iteration's transitions")
    minibatches: int = Field(1, ge=1, description="optimiser steps per pass")
    micro_batch: int = Field(
        128,
        ge=1,
        description="rows of one forward and backward at most; affects speed and rounding; halved when memory runs out",
    )
    reuse: bool = Field(
        False, description="learn from the rollout's own forwards, whose activations are held: no replay forwards"
    )
    max_grad_norm: float = Field(1.0, gt=0)
    ema: float = Field(0.9, ge=0, lt=1, description="decay of the averaged adapter that evaluation and export use")

    # evaluation and record
    eval_every: int = Field(25, ge=0, description="iterations between evaluations; 0: only before and after")
    eval_prompts: int | None = Field(None, ge=1, description="held-out prompts used between start and end; null: all")
    eval_seeds: int = Field(2, ge=1, le=10_000, description="images per held-out prompt before and after")
    eval_siblings: int = Field(
        1, ge=1, le=10_000,
        description="images per held-out prompt in between; from 2 on, how trained and watched scorers agree is "
        "measured there too",
    )  # fmt: skip
    eval_steps: int = Field(10, ge=1, le=1000)
    checkpoint_every: int = Field(25, ge=1, description="iterations between checkpoints; each evaluation has its own")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints kept, beside the best one")
    keep_best: str | None = Field(
        None, description="scorer.component whose highest held-out mean keeps its checkpoint; null: the first reward"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="experiment trackers that also receive the metrics, through accelerate"
    )
    patience: PositiveFloat = Field(1800.0, description="seconds that a rank waits for the others before the run ends")
    max_failed: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of images without a score, in an iteration or an evaluation, above which the run stops",
    )
    max_skips: int = Field(
        0,
        ge=0,
        description="optimiser steps left out in a row, for a loss, gradient, latent, image or reward that is not "
        "finite, before the run stops; 0: it stops at the first",
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit: moments in 8 bits, a quarter of the memory; needs bitsandbytes (extra gpu)"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the frozen weights; adapters, times, states and densities are float32"
    )
    quantize: Literal["int8", "llm_int8", "nf4"] | None = Field(
        None,
        description="weights of the transformer below the adapter: int8 (torchao), or llm_int8 and nf4 (bitsandbytes, "
        "needs a GPU); null: as `precision` says",
    )
    attention: str | None = Field(
        None, description="diffusers' attention back end: native, xformers, flash, sage, ...; null: as loaded"
    )
    offload: bool = Field(False, description="keep idle text encoders and autoencoder in main memory; needs a GPU")
    vae_tiling: bool = Field(False, description="decode large images tile by tile: less memory, faint seams possible")
    text_cache: int = Field(1000, ge=0, description="prompts whose embeddings are cached in main memory (LRU); 0: none")
    size: tuple[Annotated[int, Field(ge=8, le=16384)], Annotated[int, Field(ge=8, le=16384)]] | None = Field(
        None, description="height and width of images in pixels; null: the model's own"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, about a third more time"
    )
    compile: bool = Field(False, description="torch.compile the blocks of the transformer")

    @field_validator("model", "prompts", "held_out", "reference", "cache", "records", "out")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return files.home(value) if isinstance(value, str) else value

    @property
    def weights(self) -> dict[str, float | Ramp]:
        """Those of the rewards."""
        return {name: each.weight if isinstance(each, Reward) else each for name, each in self.rewards.items()}

    @property
    def at_end(self) -> tuple[str, ...]:
        """The rewards of finished images alone."""
        return tuple(k for k, each in self.rewards.items() if isinstance(each, Reward) and each.density == "end")

    @property
    def late(self) -> tuple[str, ...]:
        """The scorers that are shown finished images alone."""
        others = {component(name)[0] for name in {*self.rewards, *self.at_least} - {*self.at_end}}
        return tuple(name for name in self.trained if name not in others)

    @property
    def trained(self) -> tuple[str, ...]:
        """The scorers whose components are rewards or constraints."""
        return tuple({component(name)[0]: None for name in (*self.rewards, *self.at_least)})

    @property
    def judging(self) -> tuple[str, ...]:
        """All scorers: those that are trained on, watched, or needed for a refresh alone."""
        judge = () if self.refresh is None else (component(self.refresh.by)[0],)
        return tuple(dict.fromkeys((*self.trained, *self.watch, *judge)))

    @property
    def measures_kl(self) -> bool:
        """Whether a replayed row takes a forward of the model without adapter, too."""
        return any(part.measures(self) for part in self.objective.summands)

    @property
    def best_by(self) -> str | None:
        """The component whose held-out mean chooses the best checkpoint: none that a refresh changes."""
        changing = None if self.refresh is None else self.refresh.scorer
        watched = [self.refresh.by] if self.refresh is not None and component(self.refresh.by)[0] in self.watch else []
        steady = (name for name in (*self.rewards, *watched) if component(name)[0] != changing)
        return self.keep_best or next(steady, None)

    @model_validator(mode="after")
    def _check(self):
        checks.check(self)
        return self
