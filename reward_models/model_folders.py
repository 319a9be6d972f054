"""Checks of untrusted model folders: a model may only make a library read numbers and names.

open_clip, diffusers, transformers and peft are configured by JSON files in a model's folder. Some keys of these name
code: a module of the folder, a kernel of the hub, another model. Before a library gets a folder or a hub id, its files
are checked here, and a setting that would run code, read from elsewhere or need unbounded memory is rejected by name.
Python files may be present; nothing imports them.
"""

import os
import re
import stat
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reward_models import files, limits
from reward_models.allowlist import check as check_module

LIBRARIES = ("diffusers", "transformers")  # whose classes a pipeline's parts are
CODE = {  # keys whose value, if there is one, stands for code
    "auto_map", "auto_mapping", "custom_generate", "custom_pipeline", "custom_pipelines", "import_allowlist",
    "kernel_config", "parent_library", "trust_remote_code", "use_kernels",
}  # fmt: skip
ATTENTION = {"eager", "sdpa", "flex_attention"}  # implementations that need no code from elsewhere
OTHERS = {"backbone", "base_model_name_or_path", "hf_model_name", "hf_tokenizer_name", "timm_model_name"}
PLACES = ("/", ".", "~", "hf-hub:", "hf_hub:", "local-dir:")  # how a name that is a path begins
CLASSES = {
    "tokenizer_class", "processor_class", "image_processor_type", "image_processor_class", "feature_extractor_type",
    "feature_extractor_class", "video_processor_type", "video_processor_class", "model_type", "_class_name",
}  # fmt: skip
QUANTISED = {"awq", "bitsandbytes", "compressed-tensors", "gptq"}  # methods that an installed package reads alone
TOKENIZING = {
    "clean",
    "strip_sep_token",
    "reduction_mask",
    "context_length",
}  # settings of open_clip's tokenizers
VOCABULARIES = {"tokenizer.json", "vocab.json", "tekken.json"}  # read by tokenizers; words are not settings
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
COUNTS = re.compile(r"(^|_)(n_)?(layers|depths?|num_\w*blocks|num_single_blocks|levels)($|_per_block)")


def check(folder: str | Path, what: str) -> None:
    """Check the files that libraries read in a model's folder and in the folders of its parts. `what` names the
    model. ValueError, in one line, for a file that cannot be read, and for a rejected setting."""
    for path in _files(Path(folder), what):
        where = f"{what}: {path.relative_to(folder)}"
        if path.suffix in TEXTS:
            _bounded(path, where)
        if path.suffix == ".json" and path.name not in VOCABULARIES:
            try:
                value = files.parsed(files.content(path, limits.CONFIG))
            except (OSError, ValueError) as error:
                raise ValueError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
            if path.name == "model_index.json":
                _check_index(value, what)
            if path.name.endswith(("config.json", "index.json")) and not isinstance(value, dict):
                raise ValueError(f"{where} is not a JSON object")
            check_settings(value, where)


def check_settings(value: Any, where: str) -> None:
    """ValueError for a setting, at any depth of a JSON value, that would run code or read from elsewhere."""
    waiting = [("", value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, part) for part in value]
        if reason := _refused(name, value):
            raise ValueError(f"{where}: {name}: {str(value)[:100]!r} {reason}")


def _refused(name: str, value: Any) -> str:
    """The reason to reject a setting; empty if it is allowed."""
    if name in CODE and value:
        return "stands for code; the code of a model is never run"
    if "attn_implementation" in name or "experts_implementation" in name:
        names = {*value.values()} if isinstance(value, dict) and all(map(_plain, value.values())) else {str(value)}
        if value is not None and not names - {None} <= ATTENTION:
            return f"is not {', '.join(sorted(ATTENTION))}; kernels from elsewhere are never run"
    if isinstance(value, str):
        if name in OTHERS and (value.startswith(PLACES) or ".." in value):
            return "leads to another place; a model is read from its own folder"
        if value.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            return "leads to another place; a model is read from its own folder"
        if name in CLASSES and value and not re.fullmatch(r"[\w-]+", value):
            return "is not the name of a class"
        if name == "chat_template" and len(value) > limits.TEMPLATE:
            return f"is longer than {limits.TEMPLATE} characters"
    if name == "base_model_name_or_path" and value:
        return "means that this is an adapter of another model; a whole model is needed"
    if name in ("quantization_config", "compression_config") and value:
        method = value.get("quant_method", "bitsandbytes") if isinstance(value, dict) else value
        if not _plain(method) or method not in QUANTISED:
            return f"asks for a method that is not {', '.join(sorted(QUANTISED))}; give the model unquantised"
    if name == "tokenizer_kwargs" and value and (not isinstance(value, dict) or set(value) - TOKENIZING):
        return f"may hold {', '.join(sorted(TOKENIZING))} alone"
    if name == "reduction_mask" and value == "syntax":
        return "needs a model of another library"
    if isinstance(value, int) and not isinstance(value, bool):
        if COUNTS.search(name) and value > limits.LAYERS:
            return f"is more than {limits.LAYERS} layers"
        if name == "num_train_timesteps" and not 0 < value <= limits.STEPS:
            return f"is not a number from 1 to {limits.STEPS}"
    return ""


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _check_index(index: Any, what: str) -> None:
    """Check the modules that a pipeline's index names, because diffusers imports them."""
    if not isinstance(index, dict):
        raise ValueError(f"{what}: its model_index.json is not a JSON object")
    for part, source in index.items():
        if isinstance(source, list) and source and source[0] is not None and source[0] not in LIBRARIES:
            check_module(str(source[0]), f"{what}: the part {part!r}")


def _files(folder: Path, what: str) -> Iterator[Path]:
    """The files of a folder and of its direct subfolders. ValueError for an irregular file."""
    try:
        folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        for path in (path for parent in folders for path in sorted(parent.iterdir())):
            mode = path.stat().st_mode
            if stat.S_ISREG(mode):
                yield path
            elif not stat.S_ISDIR(mode):
                raise ValueError(f"{what}: {path.relative_to(folder)} is not a regular file")
    except OSError as error:
        raise ValueError(f"{what}: {error.filename}: {error.strerror}") from None


def _bounded(path: Path, where: str) -> None:
    most = limits.TEMPLATE if path.suffix == ".jinja" else limits.VOCABULARY
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{where} has {size} bytes; {most} are read at most")


def configs(source: str, what: str) -> Path:
    """The checked folder with a model's settings: `source` itself, or for a hub id the snapshot to which its
    JSON files and templates are downloaded. ValueError as `check`, and if there is no such model."""
    if os.path.exists(source):
        folder = Path(source)
    else:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.jinja"], ignore_patterns=["*/*/*"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"{what} is neither a folder here nor a model the hub knows: {error}") from None
    check(folder, what)
    return folder


def pinned(source: str, what: str) -> dict[str, str]:
    """The arguments of `from_pretrained` that pin a model to the checked files: none for a folder, the commit of a hub
    repository. Raises like `configs`."""
    folder = configs(source, what)
    return {} if os.path.exists(source) else {"revision": folder.name}


def check_size(numbers: int, folder: str | Path, what: str) -> None:
    """ValueError if `folder` is too small for the weights of a model of so many numbers: a library would initialise the
    rest, which might not fit in memory."""
    held = sum(path.stat().st_size for path in _files(Path(folder), what) if path.suffix not in TEXTS)
    if numbers > 2 * held + 2**24:  # the smallest are stored with half a byte each; buffers may not be stored at all
        raise ValueError(f"{what}: its config describes {numbers:,} numbers, its weights are {held:,} bytes")


def counted(model: nn.Module) -> int:
    """The number of values in a model's parameters and buffers; shared ones count once."""
    return sum(value.numel() for value in {id(v): v for v in (*model.parameters(), *model.buffers())}.values())


def complete(model: nn.Module, info: Mapping) -> None:
    """RuntimeError if a library's loading `info` reports weights that are missing or have other shapes."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for")):
        if names := sorted(map(str, info.get(key) or ())):
            raise RuntimeError(f"the checkpoint {what} {len(names)} weights of {type(model).__name__}, e.g. {names[0]}")


@contextmanager
def loading(who: str, what: str) -> Iterator[None]:
    """Turn any exception of a library that loads `what` into a ValueError of one line, because a parser of untrusted
    files may raise anything. Programming errors of this project pass through."""
    _never_ask()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers that nothing can be computed with are refused, not warned of
            yield
    except torch.OutOfMemoryError:
        raise  # not a problem of the folder
    except Exception as error:
        if _mistake(error) or (isinstance(error, ValueError) and str(error).startswith(f"{who}: ")):
            raise
        words = " ".join(str(error).split())[:500]
        plain = isinstance(error, (OSError, RuntimeError, ValueError, ImportError)) and words
        raise ValueError(
            f"{who}: {what} could not be loaded: {words if plain else f'{type(error).__name__} {words}'.strip()}"
        ) from error


def _mistake(error: Exception) -> bool:
    """Whether an error is a programming error raised in this project's own code."""
    if isinstance(error, (OSError, RuntimeError, ValueError, LookupError, ImportError, MemoryError)):
        return False
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = frames[-1].partition(".")[0] in ("reward_models", "mmalign")
    return ours and type(error).__module__ == "builtins"


def _never_ask() -> None:
    """transformers would ask on the terminal whether to run a model's code; without time to answer it refuses."""
    if module := sys.modules.get("transformers.dynamic_module_utils"):
        module.TIME_OUT_REMOTE_CODE = 0
