"""The machine that a run computes on, as far as the bits of its results depend on it."""

import os
from collections.abc import Mapping
from importlib.metadata import version

import torch

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
COUNTED = {"threads": "thread", "processes": "process"}  # plural -> singular


def describe(processes: int, device: torch.device) -> dict[str, int | str]:
    """Threads, processes, instruction set, device and library versions: on these the rounding of sums depends."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "threads": torch.get_num_threads(), "processes": processes,
        "instructions": torch.backends.cpu.get_cpu_capability(), "device": name,
    } | {library: version(library) for library in LIBRARIES}  # fmt: skip


def busy(threads: int) -> str | None:
    """A line where more processes want to run than there are cores, and several threads of this one would wait for each
    other; None elsewhere, and where the system does not tell."""
    if threads == 1 or not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores:
        return None
    return (
        f"the load average is {load:.1f} on {cores} cores: other processes use them, and {threads} threads of this one "
        "wait for each other; with OMP_NUM_THREADS=1 they do not"
    )


def difference(was: Mapping[str, int | str] | None, now: Mapping[str, int | str]) -> str | None:
    """A line on a run that resumes on another machine than the one that saved it; None where both are the same."""
    consequence = "results are equal to rounding, not to the bit"
    if was is None:
        return f"resumed from a checkpoint that does not record its machine; on another, {consequence}"
    changed = [
        f"{_named(name, value)} instead of {was.get(name, 'an unknown one')}"
        for name, value in now.items()
        if was.get(name) != value
    ]
    return f"resumed with {', '.join(changed)}: {consequence}" if changed else None


def _named(name: str, value: int | str) -> str:
    if name in COUNTED:
        return f"{value} {COUNTED[name] if value == 1 else name}"
    return f"{name} {value}"
