"""The configuration of a run: flat YAML 1.2, complete in itself, read at the top and gone below.

Every field has a default that works on the embedded model. A file states what it changes; `key=value` on the command
line changes it once more. An unknown key is refused with the nearest name, and so is an option that cannot act.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    field_validator,
    model_validator,
)

from mmalign.config.secrets import _secret_in
from reward_models import files
from reward_models.combine import Ramp

MOST = 10**7  # states of an iteration's walks
SMALLEST, LARGEST = 1e-12, 1e6  # of the numbers of a config that are not 0
Rule = Literal["paper", "z"]  # of the noise calibration
Layout = Literal["mmalign", "geneval", "t2i_compbench"]  # of the folder that evaluation writes
POLICY_GRADIENT = (  # what acts on steps of walks alone
    "credit", "baseline", "compare", "control", "score_states", "advantage_scale", "advantage_floor", "advantage_clip",
    "saturated",
    "region_weight", "whole_weight", "ratio_over", "focus", "weighting", "loss", "clip", "beta", "max_kl",
)  # fmt: skip
ANEW = ("out", "max_skips", "max_failed", "patience")  # where a run lies and when it stops: its resumption may say
SAMPLING = (
    "kernel", "noise", "window", "branch_steps", "children", "max_forwards", "max_rewards", "cache", "rollout_parts",
)  # fmt: skip


def component(reward: str) -> tuple[str, str]:
    """The name of a scorer and of its component, of `scorer.component`. A module's dots come before its colon
    (`my.module:Scorer.part`); a component may have its own (`remote.clip.cosine`)."""
    module, colon, rest = reward.rpartition(":")
    scorer, _, part = rest.partition(".")
    return module + colon + scorer, part


class AtLeast(BaseModel):
    """A constraint: mean score at least `bound`, in raw units; `rate` of the multiplier per iteration and unit."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    bound: float
    rate: PositiveFloat = 0.1


def first_without_weight(rewards: Mapping[str, float | Ramp], iterations: int) -> int | None:
    """The first iteration, from 0, in which all weights are 0. A ramp passes 0 once at most."""
    steady = [weight for weight in rewards.values() if not isinstance(weight, Ramp)]
    ramps = [weight for weight in rewards.values() if isinstance(weight, Ramp)]
    if any(steady):
        return None
    last = max(1, iterations - 1)
    passed = [
        bisect_left(range(iterations), True, key=lambda i: (ramp.end - ramp.start) * ramp.at(i / last) >= 0)
        for ramp in ramps
    ]
    places = sorted({0, iterations - 1, *passed})
    return next((i for i in places if i < iterations and not any(ramp.at(i / last) for ramp in ramps)), None)


def _floats(value: Any) -> Iterator[float]:
    """The numbers with a fraction in a setting, at any depth."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, Ramp | BaseModel):
        yield from map(float, [value.start, value.end] if isinstance(value, Ramp) else [value.bound, value.rate])
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(part)


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
    held_out: str | None = Field(
        "assets/prompts/held_out.jsonl", description="prompts for evaluation, named in the same way; null for none"
    )
    rewards: dict[str, float | Ramp] = Field(
        {"shapes.strict": 0.5, "shapes.partial": 0.5},
        description="scorer.component: weight, or {start, end, over: linear or cosine} to move it over the run; "
        "with records just shown at evaluation",
    )
    combine: Literal["sum", "product", "gate", "mrn", "gdpo"] = Field(
        "sum",
        description="how rewards become one: sum; product of powers; gate: one times (1 + the others); "
        "mrn: normalise in groups, then add; gdpo: the same, then whiten over the batch",
    )
    gate: str | None = Field(None, description="combine gate: the scorer.component that opens it")
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
    cache: str | None = Field(None, description="file of scores had before, shared between runs; made if not there")
    records: str | None = Field(
        None, description="objective srum, rgdpo: JSONL of judged images to learn from instead of sampling"
    )
    out: str = Field(
        "runs/quickstart", min_length=1, description="the run's folder; must be new, or the same run resumed"
    )
    seed: int = Field(0, ge=0)

    # rollout
    iterations: int = Field(100, ge=1)
    prompts_per_iteration: int = Field(8, ge=1, description="P")
    seeds: int = Field(1, ge=1, le=10_000, description="S, starting noises per prompt")
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance in rollout, replay and evaluation; 1 = none"
    )
    steps: int = Field(8, ge=2, le=1000, description="T, denoising steps of the rollout")
    plan: Literal["ode", "sde", "window", "branch"] = "branch"
    kernel: Literal["flow_sde", "dance_sde", "cps", "ddim", "scheduled"] = "flow_sde"
    noise: PositiveFloat | list[NonNegativeFloat] | str = Field(
        0.7, description="the kernel's parameter a, eta or g: one, one for each step, or a file of `mmalign calibrate`"
    )
    window: tuple[int, int] | None = Field(
        None, description="plan window: first stochastic step, and the first after it"
    )
    window_moves: Literal["progressive", "random"] | None = Field(
        None,
        description="plan window: progressive: a step later every `window_every` iterations, and from its start again "
        "after the last; random: each prompt's group draws its own, which lies in the first half of the steps; null: "
        "it stays",
    )
    window_every: int | None = Field(None, ge=1, description="window_moves progressive: iterations at one place")
    branch_steps: list[int] | None = Field(None, min_length=1, description="plan branch: the steps that branch")
    children: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="plan branch: children per branching state; plan window: routes that part where it begins",
    )
    score_states: Literal["all"] | Annotated[list[int], Field(min_length=1)] | None = Field(
        None,
        description="states shown to the rewards by completing them: all that credit needs, or these steps' states",
    )
    completion: Annotated[int, Field(ge=1, le=1000)] | list[Annotated[int, Field(ge=1, le=1000)]] | None = Field(
        None, description="ODE steps of a completion at most, or of each in score_states; null: all that remain"
    )
    max_forwards: int | None = Field(
        None, ge=1, description="network forwards of one iteration, replay included; the plan is thinned to fit"
    )
    max_rewards: int | None = Field(
        None, ge=1, description="images scored in one iteration, times reward scorers; same"
    )
    rollout_parts: int = Field(
        1, ge=1, description="parts of whole prompts, each drawn while the one before is judged; for slow judges"
    )
    batch: int = Field(
        128,
        ge=1,
        description="rows of one forward at most; speed, and rounding, which a reward that jumps (jpeg_size, strict "
        "verdicts, ocr) can turn into another reward; halved where memory does not suffice",
    )
    decode_batch: int = Field(
        32, ge=1, description="images decoded at once in training; the same; 1 is what diffusers calls slicing"
    )

    # credit and learning
    objective: Literal["grpo", "srum", "rgdpo"] = Field(
        "grpo", description="policy gradient; SRUM's weighted flow matching; preference of regions (R-GDPO)"
    )
    draws: int | None = Field(None, ge=1, le=10_000, description="srum, rgdpo: noises and times an image is learnt at")
    alpha_range: tuple[float, float] | None = Field(
        None, description="srum: rewards of the whole image that make its weight 0 and 1"
    )
    background: float | None = Field(None, ge=-1, le=1, description="srum: credit of places without an opinion")
    anchor: float | None = Field(None, ge=0, description="srum: weight of the plain flow-matching error")
    margin: float | None = Field(
        None, ge=0, description="srum: error up to which bad places are pushed away; 0 leaves them out"
    )
    preference_scale: PositiveFloat | None = Field(None, description="rgdpo: scale of the error's change (DPO's beta)")
    intra_weight: float | None = Field(
        None, ge=0, description="rgdpo: weight of right against wrong regions of one image"
    )
    credit: Literal["terminal", "branch", "gain"] = "branch"
    baseline: Literal["state", "prompt"] | None = Field(None, description="credit branch: whom a step is compared with")
    compare: Literal["step", "walk"] | None = Field(
        None, description="credit gain: with siblings' gains at the same step, or at all steps"
    )
    control: Annotated[float, Field(ge=0, le=1)] | Literal["fit"] | None = Field(
        None, description="credit gain: share of the value before a step that is subtracted; null: all of it"
    )
    advantage_scale: Literal["group", "batch", "none"] = Field(
        "group",
        description="unit of advantages: standard deviation of the group, of all groups, or the reward's own unit",
    )
    advantage_floor: float = Field(0.0, ge=0, description="least size of that unit, in units of the reward")
    dead_spread: float = Field(
        0.0,
        ge=0,
        description="a group whose standard deviation is no more than this is dead: advantage 0, counted; so is, with "
        "0 too, one that differs by no more than rounding (1.2e-7 of its largest reward)",
    )
    saturated: float | None = Field(
        None, description="a group whose mean reward is at least this is left out: advantage 0, counted; null: none is"
    )
    advantage_clip: float = Field(5.0, gt=0, description="bound of advantages, in that unit")
    region: str | None = Field(
        None, description="scorer whose map credits places of the image beside the whole; null: none"
    )
    region_weight: float | None = Field(None, gt=0, description="region: weight of a place's own advantage")
    whole_weight: float | None = Field(None, ge=0, description="region: weight of the whole image's advantage")
    region_grid: tuple[Annotated[int, Field(ge=1, le=1024)], Annotated[int, Field(ge=1, le=1024)]] | None = Field(
        None, description="region: cells of the grid that credit and ratio are taken on; null: latent positions"
    )
    ratio_over: Literal["cell", "credit"] = Field(
        "cell", description="the ratio of each cell, or one for all cells of an image with the same advantage"
    )
    focus: Literal["map", "prompt"] | None = Field(
        None,
        description="learn only where the region's map has an opinion, or where the prompt moves the velocity most",
    )
    focus_share: float | None = Field(None, gt=0, le=1, description="focus prompt: share of positions learnt")
    weighting: Literal["none", "noise"] = Field("none", description="noise: weigh steps by their standard deviation")
    lora_rank: int = Field(16, ge=1, le=4096)
    lora_alpha: float = Field(32.0, gt=0)
    lora_targets: list[str] | None = Field(
        None, min_length=1, description="names of linear layers; null: the attention projections"
    )
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="iterations of linear warm-up")
    cooldown: int = Field(0, ge=0, description="iterations of linear decay to 0 at the end")
    loss: Literal["clipped", "guard", "masked"] = Field("clipped", description="PPO, GRPO-Guard or Flow-DPPO")
    clip: float = Field(
        1e-4,
        gt=0,
        description="clipped, guard: bound of the (normalised) ratio around 1; masked: bound of the divergence",
    )
    beta: float = Field(0.0, ge=0, description="weight of the KL divergence to the model without adapter")
    max_kl: PositiveFloat | None = Field(
        None,
        description="KL divergence to the model without adapter (metric `kl`) above which the run is saved, evaluated "
        "and ended; with beta 0 measuring it takes a forward more for each row replayed; null: no limit",
    )
    epochs: int = Field(1, ge=1, description="passes over an iteration's transitions")
    minibatches: int = Field(1, ge=1, description="optimiser steps per pass")
    micro_batch: int = Field(
        128,
        ge=1,
        description="rows of one forward and backward at most; speed and rounding; halved where memory does not "
        "suffice",
    )
    max_grad_norm: float = Field(1.0, gt=0)
    ema: float = Field(0.9, ge=0, lt=1, description="decay of the averaged adapter that evaluation and export use")

    # evaluation and record
    eval_every: int = Field(25, ge=0, description="iterations between evaluations; 0: only before and after")
    eval_prompts: int | None = Field(None, ge=1, description="held-out prompts used between start and end; null: all")
    eval_seeds: int = Field(2, ge=1, le=10_000, description="images per held-out prompt before and after; 1 in between")
    eval_steps: int = Field(10, ge=1, le=1000)
    checkpoint_every: int = Field(25, ge=1, description="iterations between checkpoints; each evaluation has its own")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints kept, beside the best one")
    keep_best: str | None = Field(
        None, description="scorer.component whose highest held-out mean keeps its checkpoint; null: the first reward"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="experiment trackers told of the run beside metrics.jsonl, by accelerate"
    )
    patience: PositiveFloat = Field(
        1800.0, description="many processes: seconds that one waits for the others at most, before the run ends"
    )
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
    offload: bool = Field(
        False, description="text encoders and autoencoder wait in main memory while idle; needs a GPU"
    )
    vae_tiling: bool = Field(False, description="decode large images tile by tile: less memory, faint seams possible")
    text_cache: int = Field(
        1000, ge=0, description="prompts whose embeddings are kept in main memory, the last used; 0: none"
    )
    size: tuple[Annotated[int, Field(ge=8, le=16384)], Annotated[int, Field(ge=8, le=16384)]] | None = Field(
        None, description="height and width of images in pixels; null: the model's own"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, about a third more time"
    )
    compile: bool = Field(False, description="torch.compile the transformer")

    @field_validator("model", "prompts", "held_out", "reference", "cache", "records", "noise", "out")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        return files.home(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _numbers_can_be_computed_with(self):
        """In float32, squared and multiplied, for a number that is 0 or infinite there would be another one."""
        for name, value in self:
            for number in _floats(value) if name != "scorers" else ():
                if number and not SMALLEST <= abs(number) <= LARGEST:
                    raise ValueError(f"{name}: {number:g} is out of range; 0, or {SMALLEST:g} to {LARGEST:g} in size")
        return self

    def _secrets_are_kept_out(self) -> None:
        """A run's folder is passed on, and its config with it."""
        for name, own in self.scorers.items():
            if (found := _secret_in(own)) is not None:
                raise ValueError(
                    f"scorers: {name}: {found} is a secret, and a config is kept and passed on; it belongs into the "
                    "environment (OPENAI_API_KEY for judges, MMALIGN_TOKEN for remote)"
                )

    @property
    def trained(self) -> tuple[str, ...]:
        """The scorers whose components are rewards or constraints."""
        return tuple({component(name)[0]: None for name in (*self.rewards, *self.at_least)})

    @property
    def measures_kl(self) -> bool:
        """Whether a row that is replayed takes a forward of the model without adapter, too."""
        return self.beta > 0 or self.max_kl is not None

    @property
    def best_by(self) -> str | None:
        """The component whose held-out mean tells the best checkpoint."""
        return self.keep_best or next(iter(self.rewards), None)

    def _objective_acts(self) -> None:
        """Refuse what the objective, the plan or the records leave without effect."""
        idle: dict[str, tuple[str, ...]] = {}
        if self.objective != "grpo":
            idle[f"objective: {self.objective}"] = POLICY_GRADIENT
            if not self.records and self.region is None:
                raise ValueError(f"objective: {self.objective} needs region, a scorer that says where, or records")
        elif self.plan == "ode":
            raise ValueError("plan: ode has no stochastic step to learn from; objective: srum or rgdpo do without")
        if self.plan == "ode":
            idle["plan: ode"] = ("kernel", "noise")
        if self.records:
            idle["records"] = ("region", "combine", "at_least", "reference", "steps", "seeds", "plan", *SAMPLING)
        elif not self.rewards:
            raise ValueError("rewards: at least one is needed; only training on records does without")
        for owner, names in idle.items():
            for name in names:
                if getattr(self, name) != type(self).model_fields[name].get_default():
                    raise ValueError(f"{name} does not act with {owner}; remove it")
        if self.alpha_range is not None and not self.alpha_range[0] < self.alpha_range[1]:
            raise ValueError(f"alpha_range {list(self.alpha_range)} must rise")
        if self.focus == "map" and self.region is None:
            raise ValueError("focus: map needs region, a scorer that says where")

    @model_validator(mode="after")
    def _options_act(self):
        self._secrets_are_kept_out()
        self._objective_acts()
        acts = {
            "window": (self.plan == "window", "plan: window"),
            "window_moves": (self.plan == "window", "plan: window"),
            "window_every": (self.window_moves == "progressive", "window_moves: progressive"),
            "branch_steps": (self.plan == "branch", "plan: branch"),
            "children": (self.plan in ("branch", "window"), "plan: branch or window"),
            "baseline": (self.credit == "branch", "credit: branch"),
            "compare": (self.credit == "gain", "credit: gain"),
            "control": (self.credit == "gain", "credit: gain"),
            "score_states": (self.credit == "gain", "credit: gain"),
            "completion": (self.score_states is not None, "score_states"),
            "region_weight": (self.region is not None, "region"),
            "whole_weight": (self.region is not None, "region"),
            "region_grid": (self.region is not None or self.records is not None, "region or records"),
            "focus_share": (self.focus == "prompt", "focus: prompt"),
            "alpha_range": (self.objective == "srum", "objective: srum"),
            "background": (self.objective == "srum", "objective: srum"),
            "anchor": (self.objective == "srum", "objective: srum"),
            "margin": (self.objective == "srum", "objective: srum"),
            "preference_scale": (self.objective == "rgdpo", "objective: rgdpo"),
            "intra_weight": (self.objective == "rgdpo", "objective: rgdpo"),
            "draws": (self.objective != "grpo", "objective: srum or rgdpo"),
            "records": (self.objective != "grpo", "objective: srum or rgdpo"),
            "keep_best": (self.held_out is not None and self.eval_every > 0, "held_out and eval_every"),
        }
        needed = {
            "plan: window": ["window"],
            "plan: branch": ["branch_steps", "children"],
            "credit: gain": ["score_states"],
            "window_moves: progressive": ["window_every"],
            "focus: prompt": ["focus_share"],
            "objective: srum": ["draws", "alpha_range", "background", "anchor", "margin"],
            "objective: rgdpo": ["draws", "preference_scale", "intra_weight"],
        }
        for owner, names in needed.items():
            key, _, value = owner.partition(": ")
            for name in names:
                if key == "plan" and self.records:
                    continue
                if getattr(self, key) == value and getattr(self, name) is None:
                    raise ValueError(f"{owner} needs {name}")
        for name, (does, owner) in acts.items():
            if getattr(self, name) is not None and not does:
                raise ValueError(f"{name} acts only with {owner}; remove it or change that")
        return self

    @model_validator(mode="after")
    def _rewards_and_siblings_suit(self):
        if self.rollout_parts > self.prompts_per_iteration:
            raise ValueError(
                f"rollout_parts: {self.rollout_parts} of {self.prompts_per_iteration} prompts; each part needs one"
            )
        if self.advantage_floor and self.advantage_scale == "none":
            raise ValueError(
                "advantage_floor acts only where advantages are divided; remove it or change advantage_scale"
            )
        if (self.gate is not None) != (self.combine == "gate") or (self.gate or None) not in (None, *self.rewards):
            raise ValueError(
                f"gate: one of the rewards is needed with combine: gate, and none without; got {self.gate}"
            )
        if self.reference and self.combine in ("product", "gate"):
            raise ValueError(
                f"reference: in standard deviations above a mean about half of all scores are below 0, and combine: "
                f"{self.combine} needs scores of at least 0; use sum, mrn or gdpo with it"
            )
        unit = {"mrn": "none", "gdpo": "batch"}.get(self.combine, self.advantage_scale)
        if self.advantage_scale != unit:
            raise ValueError(
                f"combine: {self.combine} needs advantage_scale: {unit}; it has normalised in groups already"
            )
        idle = first_without_weight(self.rewards, self.iterations) if self.rewards else None
        if idle is not None and self.combine != "gate" and not self.at_least and not self.records:
            raise ValueError(
                f"rewards: all weights are 0 in iteration {idle + 1}, from which nothing could be learnt; give one a "
                "weight, or let a ramp begin, end and pass elsewhere than at 0"
            )
        if self.combine == "product":
            for name, weight in self.rewards.items():
                if min([weight.start, weight.end] if isinstance(weight, Ramp) else [weight]) < 0:
                    raise ValueError(
                        f"rewards: {name}: a weight below 0 under combine: product divides by the score, which may be "
                        f"0; use sum, mrn or gdpo with it, got {weight}"
                    )
        if self.at_least and self.combine in ("product", "gate"):
            raise ValueError(f"at_least adds to a sum; with combine: {self.combine} it cannot act")
        if self.region is not None and self.region not in self.trained:
            raise ValueError(f"region: {self.region!r} is not among the scorers of rewards: {', '.join(self.trained)}")
        if self.keep_best and component(self.keep_best)[0] not in (*self.trained, *self.watch):
            raise ValueError(f"keep_best: {self.keep_best!r} is no component of the scorers of rewards or watch")
        routes = (self.children or 1) * len(self.branch_steps or [0])
        states = (
            self.prompts_per_iteration * self.seeds * routes * self.steps * (self.steps if self.score_states else 1)
        )
        if states > MOST and not self.records:
            raise ValueError(
                f"an iteration would walk through {states:.2g} states and holds them all in memory; lower "
                "prompts_per_iteration, seeds, children, branch_steps or steps"
            )
        siblings = self.seeds * (self.children or 1)
        if siblings < 2 and self.objective != "srum" and not self.records:
            raise ValueError(f"seeds x children = {siblings}: advantages compare siblings, at least 2 are needed")
        if (
            self.objective == "grpo"
            and self.credit == "branch"
            and self.baseline != "prompt"
            and (self.children or 1) < 2
        ):
            raise ValueError("credit branch compares the children of one state and there is one; set baseline: prompt")
        return self

    @model_validator(mode="after")
    def _steps_are_there(self):
        if self.warmup + self.cooldown > self.iterations:
            raise ValueError(f"warmup {self.warmup} + cooldown {self.cooldown} exceed iterations {self.iterations}")
        if self.plan == "window" and not 0 <= self.window[0] < self.window[1] < self.steps:
            raise ValueError(
                f"window {list(self.window)} must lie within steps 0 to {self.steps - 1}; the last step stays ODE"
            )
        for name in ("branch_steps", "score_states"):
            steps = getattr(self, name)
            if isinstance(steps, list) and len(set(steps)) < len(steps):
                raise ValueError(f"{name} {steps}: a step is there twice")
        if self.plan == "branch" and not all(0 <= k < self.steps - 1 for k in self.branch_steps or ()):
            raise ValueError(
                f"branch_steps {self.branch_steps} must lie within 0 to {self.steps - 2}; the last step stays ODE"
            )
        if isinstance(self.score_states, list) and not all(0 <= k < self.steps for k in self.score_states):
            raise ValueError(f"score_states {self.score_states} must lie within 0 to {self.steps - 1}")
        if isinstance(self.noise, list) and len(self.noise) != self.steps:
            raise ValueError(f"noise has {len(self.noise)} levels for {self.steps} steps")
        levels = self.noise if isinstance(self.noise, list) else [self.noise]
        if self.kernel in ("cps", "ddim") and isinstance(levels[0], float) and max(levels) > 1:
            raise ValueError(f"noise: {self.noise} with kernel {self.kernel}, whose parameter is 1 at most")
        if isinstance(self.noise, str) and self.kernel != "scheduled":
            raise ValueError(f"noise: a calibration is for kernel scheduled, not {self.kernel}")
        if isinstance(self.completion, list):
            if not isinstance(self.score_states, list) or len(self.completion) != len(self.score_states):
                raise ValueError(f"completion {self.completion} needs score_states with as many states")
            if self.max_forwards or self.max_rewards:
                raise ValueError("a list of completion lengths leaves a budget no choice; give one number or none")
        return self
