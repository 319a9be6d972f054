"""Configs drawn at random, most of them sound: whatever `config.build` accepts must run, or be refused in one line
before anything is written. Each named list is a set of values for one setting, those at its end the odd ones.
"""

import random
from dataclasses import dataclass
from typing import Any

SIZES = [[32, 32], [32, 48], [16, 16], [48, 16], [64, 64], [8, 8], [16, 64], [40, 40], [256, 16], [20, 32]]  # pixels
FORWARD = ("nft", "awm", "advantage_flow")
GRIDS = [[1, 1], [2, 2], [2, 1], [4, 4], [3, 3], [5, 2], [1024, 1]]  # the last ones divide few latents
LEVELS = [0.7, 0.3, 1.0, 0.05, 1e-6, 3.0, 50.0, 1e30]  # noise of all steps
WEIGHTS = [1.0, 0.5, 2.0, 0.0, -1.0, 1e-12]
RAMPS = [
    {"start": 0.0, "end": 1.0}, {"start": 1.0, "end": 0.0, "over": "cosine"}, {"start": -1.0, "end": 1.0},
    {"start": 0.5, "end": 0.5}, {"start": 0.0, "end": 0.0},
]  # fmt: skip
PARTS = ["smooth:Smooth.red", "smooth:Smooth.even", "jpeg_size.kilobytes", "shapes.partial", "dim.red", "blind.red"]
FACTORS = ["shapes.partial", "shapes.strict", "image_stats.brightness"]  # never below 0
ODD_PARTS = ["smooth:Smooth.blue", "smooth:Smooth", "dim."]  # components that their scorers do not have
SCORERS = {  # of one's own: `dim` fails on some images, `blind` on all
    "dim": {"scorer": "smooth:Smooth", "limit": 0.52},
    "blind": {"scorer": "smooth:Smooth", "limit": -1.0},
}
TARGETS = [["to_q"], ["to_k", "to_v"], ["to_out.0"], [], ["no_such_layer"], ["0"], [""]]


@dataclass(frozen=True)
class Files:
    """What configs name: models by family, prompts, held-out prompts, records, references and calibrations, the good
    ones first in each list."""

    models: dict[str, str]
    prompts: list[str]
    held_out: list[str]
    records: list[str]
    references: list[str]
    calibrations: list[str]


def drawn(number: int, files: Files) -> dict[str, Any]:
    """The config of a number: always the same one."""
    r = random.Random(number)

    def may(share: float) -> bool:
        return r.random() < share

    def mostly(values: list, share: float = 0.75):
        """The first, or any."""
        return values[0] if may(share) else r.choice(values)

    c: dict[str, Any] = {"model": files.models[r.choice([*files.models])], "seed": r.choice([0, 7, 2**62])}
    c |= {"prompts": mostly(files.prompts, 0.96), "held_out": r.choice([None, mostly(files.held_out, 0.96)])}
    c |= {"size": mostly(SIZES, 0.5), "guidance": mostly([1.0, 0.0, 0.5, 3.5], 0.7)}
    c |= {"iterations": mostly([1, 2, 3], 0.5), "seeds": mostly([2, 3, 1], 0.6), "steps": mostly([4, 3, 5, 2])}
    c |= {"prompts_per_iteration": mostly([2, 1, 3, 3, 99], 0.85)}
    c["combine"] = mostly(["sum", "product", "gate", "mrn", "gdpo"], 0.3)
    _rollout(c, r, may, mostly, files)
    _rewards(c, r, may, mostly, files)
    _objective(c, r, may, mostly, files)
    _learning(c, r, may, mostly)
    _record(c, r, may, mostly)
    _spending(c, random.Random(number + 0.5))  # of another seed, so that all else stays
    _graded(c, random.Random(number + 0.25))
    return c


def _graded(c, r) -> None:
    """Some learn through the reward, alone or in a sum."""
    if "records" in c or r.random() > 0.15:
        return
    ways = ["sparse", {"type": "last", "steps": r.choice([1, 2, 9])}, {"type": "jump", "after": 0.5}, "low_variance"]
    part = {"type": "backprop", "way": r.choice([{"type": "sparse", "steps": 2}, *ways]), "pull": r.choice([0.0, 0.1])}
    part |= {"recompute": r.random() < 0.3} | ({"ceiling": r.choice([0.1, -1.0, 9.0])} if r.random() < 0.3 else {})
    if r.random() < 0.6:
        parts = r.choice([[c["objective"], part], [part, c["objective"]], [c["objective"], part, "rft"]])
        c["objective"] = {"type": "sum", "parts": parts, "weights": r.choice([[1.0, 0.5], [0.0, 1.0], [1.0] * 3, []])}
    else:
        c["objective"] = part
        for name in ("credit", "loss", "advantage", "mask", "max_kl", "region", "region_grid"):
            c.pop(name, None)
    if r.random() < 0.9:
        c |= {"rewards": {"smooth:Smooth.red": 1.0}, "combine": "sum"}
        c.pop("at_least", None)
        c.pop("keep_best", None)
    _settings(c)


def _spending(c, r) -> None:
    if r.random() < 0.2:
        rule = {"type": "extremes", "keep": r.choice([2, 2, 2, 3, 4, 9]), "compare": r.choice(["group", "selected"])}
        c["select"] = r.choice([rule, rule, "extremes", "no_such_rule"])
    if r.random() < 0.2:
        c["scouts"] = r.choice([{"ratio": 2, "steps": 2}, {"ratio": 3, "steps": 1}, {"steps": 3}, {}, {"ratio": 1}])
    if r.random() < 0.3:
        rates = {"type": "pass_rate", "low": r.choice([0.0, -5.0]), "high": r.choice([1.0, 0.0])}
        c["draw"] = r.choice([rates, "pass_rate", "epochs"])


def _rollout(c, r, may, mostly, files) -> None:
    steps = c["steps"]
    noise = mostly(LEVELS, 0.8)
    if may(0.3):
        noise = [mostly([0.7, 0.4, 0.0], 0.8) for _ in range(steps if may(0.97) else steps + 1)]
    c["kernel"] = {"type": r.choice(["flow_sde", "dance_sde", "cps", "ddim", "scheduled"]), "noise": noise}
    if may(0.04):
        c["kernel"] = {"type": mostly(["scheduled", "flow_sde"], 0.9), "noise": mostly(files.calibrations)}
    if may(0.03):
        c["kernel"] = r.choice(["flow_sde", "cps", "scheduled", "no_such_kernel"])
    c["plan"] = _plan(r, may, mostly, steps)
    c["credit"] = _credit(r, may, mostly, steps, c["plan"].get("children", 1))
    if may(0.15):
        c["max_forwards"] = mostly([10**6, 60, 20, 1], 0.5)
    if may(0.15):
        c["max_rewards"] = mostly([10**6, 12, 6, 1], 0.5)
    c["rollout_parts"] = mostly([1, 2], 0.8)
    c |= {name: r.choice([1, 3, 128]) for name in ("batch", "decode_batch", "micro_batch")}


def _plan(r, may, mostly, steps) -> dict[str, Any]:
    plan = {"type": r.choice(["sde", "window", "branch", "branch"])}
    if plan["type"] == "window":
        first = r.randrange(steps - 1)
        plan["steps"] = [first, min(first + r.choice([1, 1, 2]), steps - 1 if may(0.95) else 9)]
        plan["moves"] = r.choice([None, "progressive", "random"])
        if plan["moves"] == "progressive" or may(0.05):
            plan["every"] = r.choice([1, 2])
        if may(0.5):
            plan["children"] = r.choice([1, 2, 3])
    if plan["type"] == "branch":
        some = sorted(r.sample(range(steps - 1), min(steps - 1, r.choice([1, 2]))))
        plan |= {"steps": mostly([some, [0], [], [0, 0], [9]], 0.95), "children": mostly([2, 1, 3], 0.6)}
    return plan


def _credit(r, may, mostly, steps, children) -> dict[str, Any]:
    credit = {"type": r.choice(["terminal", "branch", "gain"])}
    if credit["type"] == "branch" and may(0.9):
        credit["baseline"] = mostly(["prompt", "state"], 0.3 if children > 1 else 0.95)
    if credit["type"] == "gain":
        states = mostly(["all", [0], [steps - 1, 0], [], [0, 0]], 0.5)
        credit |= {"states": states} if may(0.9) else {}
        credit |= {"compare": r.choice(["step", "trajectory"])} if may(0.66) else {}
        credit |= {"control": r.choice(["fit", 0.0, 0.5])} if may(0.75) else {}
        if may(0.4):
            credit["completion"] = r.choice([None, 1, 2, 9, [1] * len(states) if isinstance(states, list) else 2])
    return credit


def _rewards(c, r, may, mostly, files) -> None:
    multiplied = c["combine"] in ("product", "gate") and may(0.85)
    some = r.sample(FACTORS if multiplied else PARTS, r.choice([1, 1, 2, 3]))
    if may(0.02):
        some.append(r.choice(ODD_PARTS))
    weighed = {name: mostly(RAMPS, 0.1) if may(0.2) else mostly(WEIGHTS, 0.6) for name in some}
    if may(0.03):
        weighed = dict.fromkeys(some, r.choice([0.0, RAMPS[0], RAMPS[2]]))
    c["rewards"] = weighed
    multiplied = c["combine"] in ("product", "gate")
    scale = {"mrn": "none", "gdpo": "batch"}.get(c["combine"], r.choice(["group", "batch", "none"]))
    if c["combine"] == "gate":
        c["combine"] = {"type": "gate", "by": mostly([*some, "shapes.nothing"], 0.95)}
    if may(0.01 if multiplied else 0.2):
        c["at_least"] = {r.choice(PARTS if may(0.9) else ODD_PARTS): {"bound": r.choice([-9.0, 0.5]), "rate": 0.5}}
    if may(0.3):
        c["watch"] = [r.choice(["jpeg_size", "shapes", "dim", "no_such_scorer" if may(0.05) else "smooth:Smooth"])]
    if may(0.06):
        c["reference"] = r.choice(files.references)
    _settings(c)
    c["advantage"] = {"scale": scale, "clip": r.choice([5.0, 1e-3]), "saturated": mostly([None, 0.1, -5.0], 0.8)}
    if may(0.2) and scale != "none":
        c["advantage"]["floor"] = r.choice([0.0, 0.1, 1e6])
    c["dead_spread"] = r.choice([1e-6, 0.0, 1.0])
    c["max_failed"] = 1.0


def _settings(c) -> None:
    named = {name.partition(".")[0] for name in (*c["rewards"], *c.get("at_least", {}), *c.get("watch", []))}
    c["scorers"] = {name: settings for name, settings in SCORERS.items() if name in named}


def _objective(c, r, may, mostly, files) -> None:
    if may(0.3):
        c["region"] = mostly(["smooth:Smooth", "dim", "blind", "jpeg_size"], 0.8)
        if may(0.97):
            c["rewards"][f"{c['region']}.{'kilobytes' if c['region'] == 'jpeg_size' else 'red'}"] = 1.0
        c["advantage"] |= {"regional": r.choice([1.0, 0.5])} if may(0.66) else {}
        c["advantage"] |= {"whole": r.choice([0.0, 1.0])} if may(0.66) else {}
        if may(0.6):
            c["region_grid"] = mostly([[1, 1], [2, 2], [2, 1], r.choice(GRIDS)], 0.3)
    prompt = {"type": "prompt", "share": r.choice([0.5, 0.25, 1.0, 1e-6])}
    c["mask"] = mostly([None, prompt, "map" if "region" in c else None], 0.6)
    name = mostly(["grpo", "nft", "srum", "rgdpo", "rft", "awm", "advantage_flow", "dpo", "online_dpo"], 0.4)
    objective = {"type": name}
    if name == "grpo":
        objective |= {"beta": mostly([0.0, 0.01, 1.0], 0.7), "weighting": r.choice(["none", "noise"])}
        objective |= {"ratio": r.choice(["cell", "credit"])}
    else:
        for gradient in ("credit", "mask") if name in FORWARD else ("credit", "advantage", "mask"):
            c.pop(gradient, None)
        objective["draws"] = r.choice([1, 2, 3])
        if may(0.3):
            c["plan"] = "ode"
            c.pop("kernel")
        if c["combine"] in ("mrn", "gdpo") and name not in FORWARD:
            c["combine"] = "sum"
        if name in ("rft", "online_dpo", "dpo"):
            for regional in ("region", "region_grid"):
                c.pop(regional, None)
        elif name in FORWARD:
            objective |= {"span": mostly([[0.0, 0.4], [0.5, 1.0], [0.4, 0.4]], 0.9), "shared": may(0.5)}
            objective |= {"bound": r.choice([1.0, 5.0]), "pull": r.choice([0.0, 0.1])}
            objective |= {"lag": {"most": r.choice([0.0, 0.5]), "rate": r.choice([0.1, 1.0])}} if may(0.5) else {}
        elif may(0.4):
            _learn_from_records(c, r, mostly, files)
        elif "region" not in c:
            c |= {"region": "smooth:Smooth", "rewards": {"smooth:Smooth.red": 1.0} | c["rewards"]}
    if name == "srum":
        objective |= {"alpha": mostly([[0, 1], [-1.0, 0.5], [1, 1]], 0.85), "background": r.choice([0.0, -1.0, 0.5])}
        objective |= {"anchor": r.choice([0.0, 0.5]), "margin": r.choice([0.0, 1.0])}
    if name == "rgdpo":
        objective |= {"scale": r.choice([1.0, 1000.0]), "intra": r.choice([0.0, 1.0])}
    c["objective"] = objective if may(0.95) else name
    _settings(c)


def _learn_from_records(c, r, mostly, files) -> None:
    sampled = ("plan", "kernel", "steps", "seeds", "max_forwards", "max_rewards", "rollout_parts")
    for name in (*sampled, "region", "combine", "at_least", "reference"):
        c.pop(name, None)
    c["records"], c["region_grid"] = mostly(files.records, 0.8), mostly([None, *GRIDS], 0.6)
    c["size"] = mostly([[32, 32], c["size"]], 0.9)
    if r.random() < 0.3:
        c |= {"rewards": {}, "watch": []}


def _learning(c, r, may, mostly) -> None:
    c |= {"lora_rank": r.choice([1, 2, 40]), "lora_alpha": r.choice([2.0, 0.01, 100.0])}
    c["lora_targets"] = mostly([None, ["to_q"], r.choice(TARGETS)], 0.8)
    c |= {"learning_rate": r.choice([1e-3, 1e-6, 0.1]), "weight_decay": r.choice([0.0, 0.1])}
    c["warmup"] = r.choice([0, 0, 1])
    c["cooldown"] = mostly([r.randrange(c["iterations"] - c["warmup"] + 1), 2], 0.95)
    c["epochs"], c["minibatches"] = r.choice([1, 1, 2]), r.choice([1, 2, 50])
    if "credit" in c:
        c["loss"] = {"type": r.choice(["clipped", "guard", "masked"]), "clip": r.choice([1e-4, 0.2, 5.0])}
        c["max_kl"] = mostly([None, 1e-9, 1.0], 0.8)
    c |= {"max_grad_norm": r.choice([1.0, 1e-6]), "ema": r.choice([0.0, 0.9, 0.999])}
    c |= {"precision": mostly(["float32", "bfloat16"], 0.6), "gradient_checkpointing": may(0.3)}
    c |= {"vae_tiling": may(0.1), "text_cache": r.choice([1000, 0, 1])}
    if may(0.02):
        c["attention"] = r.choice(["native", "no_such_back_end"])
    if may(0.01):
        c["offload"] = True


def _record(c, r, may, mostly) -> None:
    c |= {"eval_every": r.choice([0, 1, 2, 25]), "eval_prompts": r.choice([None, 1, 50])}
    c |= {"eval_seeds": r.choice([1, 2]), "eval_steps": mostly([2, 1, 3], 0.7)}
    c |= {"checkpoint_every": r.choice([1, 3, 25]), "keep_checkpoints": r.choice([1, 3])}
    if may(0.25) and c["held_out"] and c["eval_every"]:
        c["keep_best"] = mostly([*c["rewards"], "jpeg_size.kilobytes", "shapes.no_such_part"], 0.9)
    if may(0.05):
        c["trackers"] = ["tensorboard"]
