"""Align text-to-image flow models with reward models: dense, branching and region credit for GRPO, and objectives on
finished images.

`mmalign.align(model, prompts, reward)` fine-tunes a model; `open`, `evaluate`, `best_of_n`, `refine`, `collect`
and `toward` are described in `mmalign.api`, which is imported when one of them is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmalign.api import Run, align, best_of_n, collect, evaluate, open, refine, toward
    from mmalign.errors import BadInput, Failed

__all__ = ["BadInput", "Failed", "Run", "align", "best_of_n", "collect", "evaluate", "open", "refine", "toward"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmalign import api, errors

    return getattr(errors if name in ("BadInput", "Failed") else api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
