"""Keep secrets out of configs, and out of what a run publishes about itself."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SECRETS = {"key", "apikey", "token", "secret", "password", "credentials", "authorization", "headers", "cookie"}


def public(value: Any) -> Any:
    """A config's values as they may be given away: without what is named like a secret, without password and query of
    a URL, and of absolute paths the last part alone, for the others tell of a machine and its users."""
    if isinstance(value, dict):
        return {key: "(left out)" if _secret(str(key)) else public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, str) and "://" in value:
        url = urlsplit(value)
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
    local = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return Path(value).name if local else value


def secret_in(value: Any) -> str | None:
    """What in a scorer's settings is named like a secret, or is a URL with a password."""
    if isinstance(value, dict):
        named = next((repr(key) for key in value if _secret(str(key)) and value[key] is not None), None)
        return named or next(filter(None, map(secret_in, value.values())), None)
    if isinstance(value, list | tuple):
        return next(filter(None, map(secret_in, value)), None)
    return "a URL with a password" if isinstance(value, str) and re.search(r"://[^/]*@", value) else None


def _secret(name: str) -> bool:
    return bool(SECRETS & {*re.split(r"[^a-z]+", name.lower())})
