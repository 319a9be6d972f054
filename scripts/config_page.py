"""Write docs/config.md, the settings of a config, from the schema and the tables of methods.

python scripts/config_page.py
"""

import dataclasses
import inspect
from pathlib import Path

from pydantic_core import PydanticUndefined

from mmalign.config.schema import Config
from mmalign.credit import CREDITS
from mmalign.data.draws import DRAWS
from mmalign.extension import EXTENSIONS
from mmalign.learn.loss import LOSSES
from mmalign.objectives import OBJECTIVES
from mmalign.objectives.advantage import Advantage
from mmalign.objectives.forward_process import ForwardProcess
from mmalign.objectives.masks import MASKS
from mmalign.objectives.objective import Lag
from mmalign.objectives.ways import WAYS
from mmalign.rewards.combination import COMBINATIONS
from mmalign.rewards.refresh import Refresh
from mmalign.sampling.kernels import KERNELS
from mmalign.sampling.plans import PLANS
from mmalign.selection import SELECTIONS
from mmalign.selection.scouts import Scouts
from reward_models import files

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
TABLES = {
    "plan": PLANS, "kernel": KERNELS, "objective": OBJECTIVES, "credit": CREDITS, "loss": LOSSES,
    "select": SELECTIONS, "extend": EXTENSIONS, "combine": COMBINATIONS, "mask": MASKS, "draw": DRAWS,
}  # fmt: skip
HEAD = """# The settings of a config

A config is one flat YAML 1.2 file; every setting has a default. A config that comes with mmalign needs only its name,
`mmalign train quickstart` ([install.md](install.md)). This page is made by `python scripts/config_page.py`.
Methods have settings of their own: `credit: gain` is a method with its defaults, `credit: {type: gain, control: fit}`
changes one, and `credit.control=fit` on the command line does so for one run. `type` may be `my_module:MyCredit`
with `--allow my_module`.

"""


def shown(value: object) -> str:
    """A default as a file has it."""
    if value is dataclasses.MISSING:
        return "needed"
    if dataclasses.is_dataclass(value):
        return getattr(value, "type", None) or shown(dataclasses.asdict(value))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def settings(kind: type) -> str:
    """The fields of a method with their defaults, and what its docstring says of them."""
    fields = ", ".join(f"`{field.name}: {shown(field.default)}`" for field in dataclasses.fields(kind)) or "no settings"
    return f"{fields}. {docstring(kind)}"


def docstring(kind: type) -> str:
    """In one line."""
    return " ".join(inspect.getdoc(kind).split())


def common(table: tuple[type, ...]) -> list[str]:
    """What objectives on noised images have in common, below their list."""
    names = ", ".join(f"`{kind.type}`" for kind in table if issubclass(kind, ForwardProcess))
    lines = ["", f"Settings that {names} share. {docstring(ForwardProcess)}", "", f"`lag`. {docstring(Lag)}", ""]
    return [*lines, "The `way` of `backprop`:", "", *(f"- **`{kind.type}`**: {settings(kind)}" for kind in WAYS)]


def page() -> str:
    lines = [HEAD + "## All settings", "", "| setting | default | |", "|---|---|---|"]
    for name, field in Config.model_fields.items():
        default = field.get_default()
        text = "by the objective" if default is PydanticUndefined or field.default_factory else shown(default)
        lines.append(f"| `{name}` | {text} | {(field.description or '').replace('|', '/')} |")
    for key, table in TABLES.items():
        lines += ["", f"## `{key}`", ""]
        lines += [f"- **`{kind.type}`**: {settings(kind)}" for kind in table]
        lines += common(table) if key == "objective" else []
    for key, kind in (("advantage", Advantage), ("scouts", Scouts), ("refresh", Refresh)):
        lines += ["", f"## `{key}`", "", settings(kind)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    files.write(PAGE, page())
