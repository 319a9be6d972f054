"""A student distilled from rationales: its loss, what of it is trained, resumption, and that `rational` reads it."""

import hashlib
import json
import re

import pytest
import tiny_vlm
import torch
from command_line import mmalign
from drawn_pairs import drawn_pairs
from torch.nn import functional as F

from reward_models import load
from reward_models.files import parsed
from reward_models.images import to_pil, to_uint8
from reward_models.training import checkpoint, data, evaluate
from reward_models.training.folder import Workplace
from reward_models.training.parrot import distil, samples, student
from reward_models.training.parrot.distil import Distillation, Training
from reward_models.vlm import transformers_model as vlm
from reward_models.vlm.types import Question

REASONS = ("a clean shape", "a stain")
TOKENS = [
    "# Detailed Judgement\n1. Text Faithfulness:\n## Justification: ", "\n## Score: ",
    "\n2. Physical and Visual Quality:\n## Justification: ", "\n3. Text Rendering:\n## Score: N/A",
    "\n# User Request Refinement:\n## Refined Request: ", *REASONS, "a large red circle", "4", "1.5",
]  # fmt: skip


def rationales_of(pairs, folder):
    """The rows that a teacher would have left: the preferred picture has 4, the other one 1.5."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, pair in enumerate(pairs):
        row = {"pair": number, "candidate": 0, "prompt": pair.prompt.text, "id": pair.prompt.id, "kept": True}
        row |= {"rationale": {}, "refined_request": dict.fromkeys("ab", "a large red circle")}
        for side in "ab":
            image = getattr(pair, side).read()
            name = hashlib.sha256(to_uint8(image).numpy().tobytes()).hexdigest()
            to_pil(image)[0].save(folder / "images" / f"{name}.png")
            better = (side == "a") == (pair.preference > 0.5)
            score, reason = (4, REASONS[0]) if better else (1.5, REASONS[1])
            row |= {f"image_{side}": f"images/{name}.png"}
            row |= {f"scores_{side}": {"faithfulness": score, "quality": score, "text": None}}
            row["rationale"][side] = {"faithfulness": reason, "quality": reason}
        rows.append(json.dumps(row) + "\n")
    (folder / "rationales.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_vlm.folder_of(tmp_path_factory.mktemp("vlm"), [*tiny_vlm.WORDS, *TOKENS])


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    path = tmp_path_factory.mktemp("instruction") / "short.txt"
    path.write_text("{image}{prompt}")
    return str(path)


@pytest.fixture(scope="module")
def pairs():
    return drawn_pairs(12)


@pytest.fixture(scope="module")
def source(pairs, tmp_path_factory):
    return rationales_of(pairs, tmp_path_factory.mktemp("rationales"))


@pytest.fixture(scope="module")
def model(base):
    return vlm.load("x", str(base), "cpu", "float32")


def encoded(model, texts):
    network, processor = model
    pictures = torch.rand(len(texts), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    questions = [Question((picture, "abc"[:k])) for k, picture in enumerate(pictures)]
    replies = [student.reply_tokens(network, processor, text) for text in texts]
    return student.encode(processor, questions, replies, "cpu")


# ---------------------------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def test_the_loss_is_that_of_transformers_on_the_reply_alone(model):
    network, _ = model
    inputs, targets = encoded(model, ["4", "a stain and more", "1.5 x"])
    sums, counts = student.token_losses(network, inputs, targets)
    labels = torch.full_like(inputs["input_ids"], student.IGNORED)
    labels[:, -targets.shape[1] :] = targets
    assert float(sums.sum() / counts.sum()) == pytest.approx(float(network(**inputs, labels=labels).loss), rel=1e-5)
    logits = network(**inputs).logits[:, :-1].transpose(1, 2)
    every = F.cross_entropy(logits, inputs["input_ids"][:, 1:], reduction="none")
    of_reply = every[:, -targets.shape[1] :] * (targets != student.IGNORED)
    assert torch.allclose(of_reply.sum(1), sums, rtol=1e-4)


@torch.no_grad()
def test_targets_under_the_mask_and_padding_change_no_loss(model):
    """The question's tokens are the context of a reply, never its targets: padding, on either side, changes nothing."""
    network, processor = model
    inputs, targets = encoded(model, ["4", "a stain and more", "1.5 x"])
    sums, counts = student.token_losses(network, inputs, targets)
    padding = inputs["attention_mask"] == 0
    assert padding[:, 0].any()
    assert padding[:, -1].any()
    other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(padding, 65))
    assert torch.allclose(student.token_losses(network, other, targets)[0], sums, rtol=1e-5)
    assert counts.tolist() == [2, len(student.reply_tokens(network, processor, "a stain and more")), 4]
    for i in range(3):
        pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        reply = student.reply_tokens(network, processor, ["4", "a stain and more", "1.5 x"][i])
        alone = student.encode(processor, [Question((pictures[i], "abc"[:i]))], [reply], "cpu")
        assert float(student.token_losses(network, *alone)[0]) == pytest.approx(float(sums[i]), rel=1e-4)


def test_the_question_is_that_of_the_scorer(base, source, tmp_path):
    scorer = load("rational", model=str(base))
    training = Training(Distillation(str(base)), Workplace(tmp_path, ""), "cpu", 0)
    sample = samples.read(source)[0]
    expected = scorer._question((sample.image.read()[0], sample.prompt))
    question = training.question(sample)
    assert (question.text, question.system) == (expected.text, expected.system)
    inputs = [vlm.inputs_of(training.processor, [one], "cpu")["input_ids"] for one in (question, expected)]
    assert torch.equal(*inputs)


@pytest.mark.parametrize("rank", [4, None])
def test_the_language_model_alone_is_trained(rank, base, short, source, tmp_path):
    made = Training(Distillation(str(base), rank=rank, instruction=short), Workplace(tmp_path, ""), "cpu", 0)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.step(samples.read(source)[:4], 0.1)
    made.step(samples.read(source)[:4], 0.1)
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not [name for name in changed if "visual" in name]
    assert all("lora_" in name for name in changed) == (rank is not None)
    assert {name for name in made.model.state_dict() if name in made.parameters} >= changed
    if rank:
        assert all(p.shape[0] == 4 for name, p in made.parameters.items() if "lora_A" in name)


def test_a_batch_in_parts_gives_the_same_step(base, short, source, tmp_path):
    weights = []
    for together in (1, 3, 8):
        method = Distillation(str(base), rank=None, instruction=short, together=together)
        made = Training(method, Workplace(tmp_path, ""), "cpu", 0)
        made.step(samples.read(source)[:8], 1e-2)
        weights.append(made.parameters["model.language_model.norm.weight"].detach())
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
    assert torch.allclose(weights[0], weights[2], atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- folder


def test_a_tiny_student_learns_its_samples_by_heart_and_rational_reads_it(base, short, tmp_path):
    pairs = drawn_pairs(4)
    some = samples.read(rationales_of(pairs, tmp_path / "rationales"))
    settings = {"rank": None, "learning_rate": 0.02, "epochs": 75, "patience": 75, "batch": 8, "together": 8}
    training = Training(Distillation(str(base), instruction=short, **settings), Workplace(tmp_path, ""), "cpu", 0)
    training.run(some, some, data.silent)
    student.save(training.model, training.processor, tmp_path / "student")
    scorer = load("rational", model=str(tmp_path / "student"), instruction=short, tokens=64)
    result = evaluate(pairs, {"student": scorer})["rewards"]["student.overall"]
    assert result["with_ties"]["mean"] == 1
    assert not result["missing"]
    for pair in pairs:
        scores = scorer(pair.a.read(), [pair.prompt])
        assert scores.column("overall").item() == pytest.approx(1 if pair.preference else 1 / 6)
        assert scores.requests == ("a large red circle",)


SETTINGS = {"learning_rate": 0.01, "epochs": 3, "patience": 3, "batch": 8, "together": 8}


@pytest.fixture(scope="module")
def trained(base, short, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "lora"
    return folder, distil(source, folder, model=str(base), instruction=short, rank=2, **SETTINGS)


def test_the_folder_is_a_complete_model_with_its_card(trained, base, short, source):
    folder, card = trained
    assert parsed((folder / "card.json").read_text()) == card
    assert card["samples"] == {"train": 20, "stop": 2, "test": 2}
    assert card["losses"]["stop"] == pytest.approx(min(p["stop_loss"] for p in points_of(folder)), rel=1e-4)
    assert card["losses"]["train"] < points_of(folder)[0]["train_loss"]
    assert not (folder / "checkpoint.safetensors").exists()
    assert not list(folder.glob("*.py"))
    assert (folder / "instruction.txt").read_text() == "{image}{prompt}"
    before, after = vlm.load("x", str(base), "cpu", "float32")[0], vlm.load("x", str(folder), "cpu", "float32")[0]
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert moved
    assert all(re.search(r"language_model\.layers\.\d+\..*_proj\.weight$", name) for name in moved)
    with pytest.raises(ValueError, match="a model is there already"):
        distil(source, folder, model=str(base))


def points_of(folder):
    return parsed((folder / "curves.json").read_text())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_interrupted_training_continues_to_the_bit(epochs, trained, base, short, source, tmp_path, monkeypatch):
    save, done = checkpoint.save, []

    def killing(*args):
        save(*args)
        done.append(1)
        if len(done) == epochs:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", killing)
    given = {"model": str(base), "instruction": short, "rank": 2} | SETTINGS
    with pytest.raises(Killed):
        distil(source, tmp_path / "out", **given)
    with pytest.raises(ValueError, match="an interrupted training with other pairs or settings"):
        distil(source, tmp_path / "out", **given | {"rank": 3})
    assert distil(source, tmp_path / "out", **given) == trained[1]
    for name in ("model.safetensors", "curves.json", "card.json"):
        assert (tmp_path / "out" / name).read_bytes() == (trained[0] / name).read_bytes()


def test_the_rate_rises_and_falls():
    method = Distillation("m", learning_rate=2.0, warmup=0.1)
    rates = [method.rate(step, 100) for step in range(100)]
    assert rates.index(max(rates)) == 10
    assert max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert sorted(rates[:11]) == rates[:11]
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert 0 < rates[0] < 0.2
    assert 0 < rates[-1] < 0.01


def test_the_command_trains_and_a_mistake_is_one_line(base, short, source, tmp_path):
    words = ["--set", f"model={base}", "--set", "epochs=1", "--set", "rank=2", "--set", f"instruction={short}"]
    result = mmalign("reward", "distil", source, *words, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "24 samples; epoch 1" in result.stdout
    assert load("rational", model=str(tmp_path / "out"), instruction=short).names[0] == "overall"
    for given, says in ((["--set", "ranks=2"], "no setting 'ranks'"), (["--set", "rank=2"], "model")):
        result = mmalign("reward", "distil", source, *given, "--out", tmp_path / "other")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert says in result.stderr


def test_the_settings_are_checked(source, base, tmp_path):
    for settings, says in (
        ({"rank": 0}, "rank"),
        ({"ranks": 3}, "no setting 'ranks'; it takes model, rank"),
        ({"tokens": 5}, "tokens; give tokens="),
        ({"model": "nowhere"}, "nowhere"),
        ({"instruction": "nowhere.txt"}, "nowhere.txt: No such file"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            distil(source, tmp_path / "out", **{"model": str(base)} | settings)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="choose an empty folder"):
        distil(source, tmp_path / "full", model=str(base))
