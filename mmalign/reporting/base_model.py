"""What a published adapter says of its base model: a name without places on this machine, and the licence."""

import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download, hf_hub_url
from huggingface_hub.errors import HTTPError
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from mmalign.config import paths, yaml12
from reward_models import files, limits

CARD = "README.md"
UNKNOWN = {"license": "other", "license_name": "unknown-see-the-base-model"}


def name(model: str) -> str:
    """A hub id unchanged; the last part alone of a folder's path, because the rest tells of a machine and its users."""
    located = paths.locate(model)
    return Path(located).resolve().name if os.path.exists(located) else model


def licence(model: str) -> dict[str, str]:
    """The licence in the metadata of the model's card, in its folder or on the hub, in the hub's terms; UNKNOWN where
    none is given."""
    located = paths.locate(model)
    local = os.path.exists(located)
    try:
        fields = _metadata(files.text(Path(located) / CARD if local else hf_hub_download(model, CARD), limits.CONFIG))
    except (HTTPError, OSError, ValueError):  # there is no card, or it cannot be read
        return UNKNOWN
    result = {key: value for key in ("license", "license_name") if isinstance(value := fields.get(key), str)}
    if not all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value) for value in result.values()) or "license" not in result:
        return UNKNOWN
    link = str(fields.get("license_link", ""))
    if link and "://" not in link and not local:
        link = hf_hub_url(model, link)
    return result | ({"license_link": link} if link.startswith(("https://", "http://")) else {})


def _metadata(card: str) -> dict:
    """The metadata at the beginning of a card. ValueError where it is not YAML of plain values."""
    block = REGEX_YAML_BLOCK.match(card)
    fields = yaml12.parsed(block[2]) if block else None
    return fields if isinstance(fields, dict) else {}
