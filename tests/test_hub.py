"""Uploading an export: which files go up, and each failure in one line, without the token."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from chats import chatting
from command_line import mmalign
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from run_config import run

from mmalign.errors import BadInput, Failed
from mmalign.reporting import hub

ADDRESS = "https://hub/owner/name"
LORA = ["README.md", "images/after-1.png", "images/before-1.png", "pytorch_lora_weights.safetensors"]
TOKEN = "hf_" + "hush" * 8


@dataclass
class Hub:
    """The two methods of the hub's client that upload, which note what they were called with."""

    public: bool = False
    error: Exception | None = None
    made: list = field(default_factory=list)
    uploaded: list = field(default_factory=list)

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.made.append((repo_id, private, exist_ok))
        return ADDRESS

    def repo_info(self, repo_id):
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        if self.error:
            raise self.error
        names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        self.uploaded.append((repo_id, sorted(filter_repo_objects(names, allow_patterns=allow_patterns))))


@pytest.fixture
def lora(tmp_path) -> Path:
    """The folder of an export, among files of the user."""
    folder = tmp_path / "lora"
    (folder / "images").mkdir(parents=True)
    for name in LORA:
        if name.endswith(".png"):
            Image.new("RGB", (8, 8)).save(folder / name)
        else:
            (folder / name).write_text("x")
    for name in ("secret.json", "notes.txt", "me.png", "images/mine.png", "optimizer.safetensors", ".env"):
        (folder / name).write_text("mine")
    return folder


def test_the_export_goes_up_and_nothing_else(lora):
    client = Hub()
    assert hub.push(lora, "owner/name", api=client) == ADDRESS
    assert client.made == [("owner/name", None, True)]
    assert client.uploaded == [("owner/name", LORA)]
    shutil.move(lora / "pytorch_lora_weights.safetensors", lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text("{}")
    hub.push(lora, "owner/name", api=client)
    assert client.uploaded[1][1] == ["README.md", "adapter_config.json", "adapter_model.safetensors", *LORA[1:3]]


def test_a_complete_pipeline_goes_up_with_its_tokenizers(random_model, tmp_path):
    folder = Path(shutil.copytree(random_model, tmp_path / "merged"))
    pipeline = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (folder / "README.md").write_text("x")
    (folder / "tokenizer/chat_template.jinja").write_text("x")
    for name in ("secret.json", "tokenizer/run.py", "vae/weights.bin"):
        (folder / name).write_text("mine")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/secret.json").write_text("mine")
    client = Hub()
    hub.push(folder, "owner/name", api=client)
    [(_, uploaded)] = client.uploaded
    assert uploaded == sorted([*pipeline, "README.md", "tokenizer/chat_template.jinja"])


def test_a_private_repository_is_private(lora):
    client = Hub()
    hub.push(lora, "owner/name", private=True, api=client)
    assert client.made == [("owner/name", True, True)]
    assert client.uploaded == [("owner/name", LORA)]
    client = Hub(public=True)
    with pytest.raises(Failed, match="owner/name is a public repository already, and nothing was uploaded"):
        hub.push(lora, "owner/name", private=True, api=client)
    assert client.uploaded == []


WRONG = [
    "name",
    "a/b/c",
    "a b/c",
    "../x",
    "-a/b",
    "a/b-",
    "a--b/c",
    "a/b.git",
    "a/" + "b" * 97,
    "",
    "a/",
    "https://x/y",
]


@pytest.mark.parametrize("repo", WRONG)
def test_an_impossible_name_is_refused_before_anything_is_written(repo, tmp_path):
    result = mmalign("export", tmp_path, "--out", tmp_path / "lora", "--push", repo)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"repository {repo[:100]!r}: OWNER/NAME is needed" in result.stderr
    assert not (tmp_path / "lora").exists()
    with pytest.raises(BadInput, match="OWNER/NAME is needed"):
        hub.push(tmp_path, repo, api=Hub())


def test_private_needs_push(tmp_path):
    result = mmalign("export", tmp_path, "--private")
    assert (result.returncode, result.stderr) == (2, "mmalign: --private acts only with --push\n")


@pytest.mark.parametrize("missing", ["README.md", "pytorch_lora_weights.safetensors"])
def test_a_folder_without_an_export_is_refused(lora, missing):
    (lora / missing).unlink()
    client = Hub()
    with pytest.raises(BadInput, match="no export with its card there"):
        hub.push(lora, "owner/name", api=client)
    assert client.made == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LocalTokenNotFoundError("Token is required"), "not logged in to the hub"),
        (ValueError("Invalid metadata in README.md.\n- license"), "the upload failed: Invalid metadata in README.md"),
        (RuntimeError(f"Data processing error: token {TOKEN}"), r"the upload failed: Data processing error: token \("),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)  # fmt: skip
def test_a_failure_of_the_client_is_one_line(lora, monkeypatch, error, says):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(Failed, match=f"^owner/name: .*{says}.*; the export is complete in {lora}$") as caught:
        hub.push(lora, "owner/name", api=Hub(error=error))
    assert TOKEN not in str(caught.value)


# --------------------------------------------------------------------------------------------------- the real client


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "", "not logged in to the hub, or with a token that is not valid; `hf auth login` or HF_TOKEN gives one"),
        (403, "", "there is no such owner, or the token may not write there"),
        (404, "RepoNotFound", "there is no such owner, or the token may not write there"),
        (400, "", "the hub answered 400: the name is taken by (token)"),
        (503, "", "the hub answered 503: the name is taken by (token)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(lora, monkeypatch, status, code, says):
    """An error of the real client, of a server that repeats the token."""
    answer = (status, {"X-Error-Code": code} if code else {}, {"error": f"the name is taken by {TOKEN}"})
    with chatting(lambda request: answer) as (url, requests):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        client = HfApi(endpoint=url.removesuffix("/v1"))
        with pytest.raises(Failed) as caught:
            hub.push(lora, "owner/name", private=True, api=client)
    assert requests == [{"name": "name", "organization": "owner", "visibility": "private"}]
    assert str(caught.value) == f"owner/name: {says}; the export is complete in {lora}"


def test_a_hub_that_cannot_be_reached_is_one_line(lora, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Failed, match=r"^owner/name: the hub cannot be reached: .*[Cc]onnection refused.*; the export"):
        hub.push(lora, "owner/name", api=HfApi(endpoint="http://127.0.0.1:9"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Failed, match=r"^owner/name: HF_HUB_OFFLINE is set, so that nothing is uploaded; the export"):
        hub.push(lora, "owner/name")


def test_an_export_that_is_not_uploaded_stays(settings, monkeypatch, tmp_path):
    out = run(settings, iterations=1, held_out=None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ended = mmalign("export", out, "--out", tmp_path / "lora", "--push", "owner/name", "--private")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith("mmalign: owner/name: HF_HUB_OFFLINE is set")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [LORA[0], LORA[3]]
