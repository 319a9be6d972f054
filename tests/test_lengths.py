"""A prompt of which a model or scorer reads only the beginning is output, once and with a count."""

import json

import pytest
import tiny_scorers
import torch
from command_line import mmalign
from hypothesis import given, settings as trying, strategies as st
from PIL import Image

from mmalign import policy as policies, run as runs
from mmalign.config import load as configs
from reward_models import Prompt, load
from reward_models.lengths import Reader, cut

LONG = "abc " * 600


class Words:
    """Reads so many words."""

    def __init__(self, most: int):
        self.most = most

    def readers(self):
        return [Reader(f"a reader of {self.most}", self.most, lambda text: len(text.split()) > self.most)]


class Held:
    def __init__(self, scorer):
        self.scorer = scorer


def test_a_line_for_each_that_cuts():
    texts = ["one two", "one two three", "one two three", "one two three four five", ""]
    assert cut([Words(2), Words(9), object(), Held(Words(4))], texts) == [
        "2 of 4 prompts are longer than the 2 tokens that a reader of 2 reads; they are truncated",
        "1 of 4 prompts are longer than the 4 tokens that a reader of 4 reads; they are truncated",
    ]
    assert cut([Words(1)], []) == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load("clip", model=str(tiny_scorers.open_clip_folder(tmp_path_factory.mktemp("clip"))))


@given(words=st.integers(0, 90))
@trying(deadline=None, max_examples=30)
def test_clip_reads_77_tokens_with_its_marks(clip, words):
    """`red` is one token of open_clip's own tokenizer."""
    (reader,) = clip.readers()
    assert (reader.name, reader.tokens) == ("clip", 77)
    assert reader.cuts("red " * words) == (words + 2 > 77)


@pytest.mark.parametrize("name", ["pickscore", "image_reward", "hpsv2", "context"])
def test_what_a_scorer_cuts_changes_nothing(tmp_path, name):
    """The longest text that is read whole is output apart from the same with one word more, which scores the same."""
    (tmp_path / name).mkdir()
    scorer = load(name, **tiny_scorers.settings(name, tmp_path / name))
    (reader,) = scorer.readers()
    longest = next(n for n in range(1, 100) if reader.cuts("a " * (n + 1)))
    assert not reader.cuts("a " * longest)
    images = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    whole, more, shorter = (
        scorer(images, [Prompt("a " * n)]).values for n in (longest, longest + 1, longest - 1)
    )  # fmt: skip
    assert torch.equal(scorer(images, [Prompt("a " * (longest + 7))]).values, more)
    assert not torch.equal(whole, shorter)


LINE = "mmalign: 1 of 2 prompts are longer than the {} tokens that {} reads; they are truncated\n"


def test_the_commands_say_it_once(random_model, settings, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [{"image": f"{i}.png", "prompt": text} for i, text in enumerate(("red", "red " * 90, "red"))]
    for row in rows:
        Image.new("RGB", (32, 32)).save(folder / row["image"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_scorers.open_clip_folder(tmp_path / "clip")
    output = mmalign("score", folder, "--set", f"clip.model={model}", "--out", tmp_path / "s.jsonl")
    assert (output.returncode, output.stderr.count("they are truncated"), LINE.format(77, "clip") in output.stderr) == (
        0,
        1,
        True,
    )
    policy = policies.load(random_model)
    expected = [LINE.format(reader.tokens, reader.name) for reader in policy.readers()]
    output = mmalign("sample", "a", LONG, "--model", random_model, "--steps", 2, "--out", tmp_path / "drawn")
    assert (output.returncode, output.stderr) == (0, "".join(expected))
    output = mmalign("sample", "a", "--model", random_model, "--steps", 2, "--out", tmp_path / "drawn")
    assert (output.returncode, output.stderr) == (0, "")


def test_training_says_it_once(settings, tmp_path, capfd):
    prompts = tmp_path / "long.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "id": i}) + "\n" for i, text in enumerate(("a", LONG))))
    c = configs.build(settings | {"prompts": str(prompts), "held_out": None, "iterations": 1, "eval_every": 1}, "test")
    runs.train(c)
    lines = [line for line in capfd.readouterr().err.splitlines() if "they are truncated" in line]
    assert len(lines) == 2
    assert all(line.startswith("mmalign: 1 of 2 prompts are longer than the ") for line in lines)
