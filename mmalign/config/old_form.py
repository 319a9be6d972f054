"""Configs from before methods owned their settings: what the same settings are called now.

They are refused, with the lines that would be right: silently reading two forms would keep both alive.
"""

from collections.abc import Mapping
from typing import Any

METHODS = {  # key of a method -> {method: {its setting: the key it had}}; "" is for all methods of that key
    "plan": {
        "window": {"steps": "window", "children": "children", "moves": "window_moves", "every": "window_every"},
        "branch": {"steps": "branch_steps", "children": "children"},
    },
    "kernel": {"": {"noise": "noise"}},
    "credit": {
        "branch": {"baseline": "baseline"},
        "gain": {"states": "score_states", "completion": "completion", "compare": "compare", "control": "control"},
    },
    "objective": {
        "grpo": {"beta": "beta", "weighting": "weighting", "ratio": "ratio_over"},
        "srum": {
            "draws": "draws", "alpha": "alpha_range", "background": "background", "anchor": "anchor",
            "margin": "margin",
        },
        "rgdpo": {"draws": "draws", "scale": "preference_scale", "intra": "intra_weight"},
    },
    "loss": {"": {"clip": "clip"}},
    "combine": {"gate": {"by": "gate"}},
    "mask": {"prompt": {"share": "focus_share"}},
}  # fmt: skip
FORMER = {"mask": "focus"}  # methods whose own key had another name
DEFAULT = {"plan": "branch", "kernel": "flow_sde", "credit": "branch", "objective": "grpo", "loss": "clipped"}
ADVANTAGE = {
    "scale": "advantage_scale", "floor": "advantage_floor", "clip": "advantage_clip", "saturated": "saturated",
    "whole": "whole_weight", "regional": "region_weight",
}  # fmt: skip
OLD = {key for kinds in METHODS.values() for settings in kinds.values() for key in settings.values()}
OLD |= {*ADVANTAGE.values(), *FORMER.values()}


def refused(values: Mapping[str, Any]) -> str | None:
    """What is wrong with a config of the old form, and the lines that would be right; None for any other config."""
    old = [key for key in values if key in OLD]
    if not old:
        return None
    new = {key: value for key, value in modern(values).items() if key not in values or values[key] != value}
    lines = ", ".join(f"{key}: {_inline(value)}" for key, value in new.items())
    instead = f"instead of these write {lines}" if lines else "the methods chosen have none of these; remove them"
    return f"{', '.join(old)}: settings of a method belong to it now; {instead}"


def modern(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings in the form of now."""
    new = {key: value for key, value in values.items() if key not in OLD}
    for method, kinds in METHODS.items():
        chosen = values.get(FORMER.get(method, method), DEFAULT.get(method))
        known = {**chosen} if isinstance(chosen, Mapping) else {"type": chosen}  # an override may lie over a new form
        name = known.get("type")
        if not isinstance(name, str):
            continue
        settings = kinds.get(name, kinds.get("", {}))
        given = {key: values[old] for key, old in settings.items() if values.get(old) is not None}
        if given.get("compare") == "walk":
            given["compare"] = "trajectory"
        if given:
            new[method] = known | given
        elif values.get(FORMER.get(method, method)) is not None:
            new[method] = chosen
    advantage = {key: values[old] for key, old in ADVANTAGE.items() if values.get(old) is not None}
    return new | ({"advantage": {**(new.get("advantage") or {}), **advantage}} if advantage else {})


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
