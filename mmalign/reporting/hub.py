"""Upload an export to the Hugging Face hub."""

import glob
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from mmalign.errors import BadInput, Failed, refusing
from mmalign.reporting import base_model, card
from mmalign.runs.adapters import NAMES
from mmalign.runs.lora_file import PEFT_CONFIG
from reward_models import files, limits
from reward_models.model_folders import TEXTS

LOGIN = "not logged in to the hub, or with a token that is not valid; `hf auth login` or HF_TOKEN gives one"
OWNER = "there is no such owner, or the token may not write there"
STATUS = {401: LOGIN, 403: OWNER, 404: OWNER}


def check(repo: str) -> None:
    """BadInput unless `repo` can be the id of a repository, OWNER/NAME."""
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise ValueError
    except ValueError:
        raise BadInput(
            f"repository {repo[:100]!r}: OWNER/NAME is needed, each of at most 96 letters, digits, '_', and single '-' "
            "and '.' within it"
        ) from None


def push(folder: Path, repo: str, private: bool = False, api: Any = None) -> str:
    """Upload the export in a folder to the repository OWNER/NAME, which is made if it is missing, and return its
    address. Other files in the folder are not uploaded. `private` makes a new repository private.

    `api` is a client with the methods of `huggingface_hub.HfApi`. BadInput for an impossible name and where there is no
    export; Failed, in one line, where the hub refuses or cannot be reached, and for a `private` repository that is
    public already. The folder is not changed."""
    check(repo)
    names, api = contents(folder), api or HfApi(library_name="mmalign")
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        public = private and not api.repo_info(repo).private
        if not public:
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in names],
                commit_message="Upload an export of mmalign",
            )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the last: of the library that sends large files
        raise Failed(f"{repo}: {_reason(error)}; the export is complete in {folder}") from None
    if public:
        raise Failed(f"{repo} is a public repository already, and nothing was uploaded; the export is in {folder}")
    return str(address)


def contents(folder: Path) -> list[str]:
    """The files of an export in a folder, by their names in it. BadInput where there is none."""
    weights = [name for name in (*NAMES, PEFT_CONFIG) if (folder / name).is_file()]
    if (folder / "model_index.json").is_file():
        with refusing():
            index = files.parsed(files.text(folder / "model_index.json", limits.CONFIG))
        parts = [path for path in sorted(folder.glob("*/*")) if path.parent.name in index]
        kinds = (".safetensors", *TEXTS)
        weights = ["model_index.json", *(str(path.relative_to(folder)) for path in parts if path.suffix in kinds)]
    if not weights or not (folder / base_model.CARD).is_file():
        raise BadInput(f"{folder}: no export with its card there")
    return [*weights, base_model.CARD, *(str(path.relative_to(folder)) for path in card.pictures(folder))]


def _reason(error: Exception) -> str:
    """Why an upload failed, in one line without the token."""
    if isinstance(error, LocalTokenNotFoundError):
        return LOGIN
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that nothing is uploaded"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        text = STATUS.get(status) or f"the hub answered {status}: {error.server_message or error}"
    elif isinstance(error, HTTPError):
        text = f"the hub cannot be reached: {error}"
    else:
        text = f"the upload failed: {error}"
    if token := get_token():
        text = text.replace(token, "(token)")
    return " ".join(text.split())[:500]
