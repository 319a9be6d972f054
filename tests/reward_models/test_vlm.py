"""Tests of the scorers with a vision-language model, against answers known in closed form."""

import pytest
import tiny_vlm
import torch
from safetensors.torch import save_file
from tiny_scorers import before_version_5, settings

from reward_models import Prompt, load
from reward_models.scorers.hpsv3 import positions
from reward_models.vlm import transformers_model as vlm
from reward_models.weights import read

PROMPTS = [
    Prompt("a red fox"),
    Prompt("two {odd} braces, and a prompt that is long enough to need padding"),
    Prompt("x"),
]


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 40, 60, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {name: settings(name, tmp_path_factory.mktemp(name)) for name in ("vqa", "hpsv3")}


def with_head(scorer, bias):
    """The same logits whatever is seen: the hidden state is made constant and the head reads it."""
    norm, head = scorer.model.model.language_model.norm, scorer.model.lm_head
    with torch.no_grad():
        norm.weight.zero_()
        head.weight.zero_()
    head.register_forward_hook(lambda *args: args[2] + bias)
    return scorer


def test_vqa_is_the_share_of_yes_among_the_answers(images, made):
    scorer = load("vqa", **made["vqa"])
    yes = len(scorer.yes) / (len(scorer.yes) + len(scorer.no))
    bias = torch.zeros(scorer.model.lm_head.out_features)
    scores = with_head(scorer, bias)(images, PROMPTS).values
    torch.testing.assert_close(scores, torch.full((3, 1), yes))
    bias[scorer.yes[0]] = 2.0  # one of its spellings gets e^2
    expected = (len(scorer.yes) - 1 + torch.e**2) / (len(scorer.yes) - 1 + torch.e**2 + len(scorer.no))
    torch.testing.assert_close(scorer(images, PROMPTS).values, torch.full((3, 1), expected))
    bias[:] = 0
    bias[0] = 50.0  # the likeliest token is another word: only the odds between the two answers count
    torch.testing.assert_close(scorer(images, PROMPTS).values, torch.full((3, 1), yes))


def test_the_question_and_the_image_reach_the_model(images, made):
    ask = lambda scorer, prompt, i=0: scorer(images[i : i + 1], [Prompt(prompt)]).values.item()  # noqa: E731
    scorer, other = load("vqa", **made["vqa"]), load("vqa", **made["vqa"], question="Is it {prompt}?")
    assert len({ask(scorer, "a fox"), ask(scorer, "an owl"), ask(scorer, "a fox", 1), ask(other, "a fox")}) == 4
    assert ask(scorer, "{prompt}") != ask(scorer, "{}")
    quality = load("vqa", **made["vqa"], question="Is it beautiful?")
    assert ask(quality, "a fox") == ask(quality, "an owl")
    assert (scorer.card.sees_prompt, quality.card.sees_prompt) == (True, False)
    assert scorer.card.version != other.card.version


def test_vqa_agrees_with_one_plain_forward(images, made):
    from PIL import Image  # noqa: F401
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    from reward_models.images import to_pil

    scorer = load("vqa", **made["vqa"])
    model = Qwen2VLForConditionalGeneration.from_pretrained(made["vqa"]["model"]).eval()
    processor = AutoProcessor.from_pretrained(made["vqa"]["model"])
    text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{scorer.question}<|im_end|>\n"
    text = text.replace("{prompt}", "a red fox") + "<|im_start|>assistant\n"
    with torch.no_grad():
        inputs = processor(text=[text], images=to_pil(images[:1]), return_tensors="pt")
        share = model(**inputs).logits[0, -1].softmax(-1)
    expected = share[scorer.yes].sum() / (share[scorer.yes].sum() + share[scorer.no].sum())
    torch.testing.assert_close(scorer(images[:1], PROMPTS[:1]).values[0, 0], expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answers": ["Yes", "Yes"]}, "do not distinguish 'Yes' from 'Yes'"),
        ({"answers": ["Yes"]}, "answers are two words"),
        ({"dtype": "int8"}, "dtype is one of float32, bfloat16, float16, not 'int8'"),
        ({"model": "nobody/nothing"}, "vqa: nobody/nothing could not be loaded"),
    ],
)
def test_vqa_refuses_in_one_line(made, change, says):
    with pytest.raises(ValueError, match=says) as error:
        load("vqa", **made["vqa"] | change)
    assert "\n" not in str(error.value)


def test_answers_that_share_a_beginning_are_distinguished_by_the_rest(tmp_path, made):
    from reward_models.vlm.transformers_model import first_tokens

    words = tiny_vlm.new_tokenizer([])  # bytes alone: " yes" and " no" both begin with a space
    space = words.encode(" ", add_special_tokens=False)[0]
    yes, no = first_tokens(words, "Yes", "No")
    assert space not in yes + no
    assert set(yes) == set(words.encode("Yy", add_special_tokens=False))
    with pytest.raises(ValueError, match="do not distinguish 'yes' from 'yeah'"):
        first_tokens(words, "yes", "yeah")


def test_half_precision_is_near(images, made):
    exact = load("vqa", **made["vqa"])(images, PROMPTS).values
    near = load("vqa", **made["vqa"], dtype="bfloat16")(images, PROMPTS).values
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, rtol=0, atol=0.1)


def test_hpsv3_is_its_head_at_the_reward_token(images, made):
    scorer = load("hpsv3", **made["hpsv3"])
    scores = scorer(images, PROMPTS).values
    assert scores.std() > 1e-3
    with torch.no_grad():
        scorer.head[-1].weight.zero_()
        scorer.head[-1].bias.copy_(torch.tensor([3.25, -7.0]))  # mu, log sigma
    torch.testing.assert_close(scorer(images, PROMPTS).values, torch.full((3, 1), 3.25))


def test_hpsv3_sees_nothing_after_its_token_and_all_before(images, made, tmp_path):
    def score(text):
        (tmp_path / "words.txt").write_text(text)
        return load("hpsv3", **made["hpsv3"] | {"instruction": str(tmp_path / "words.txt")})(images, PROMPTS).values

    one = score("Rate {prompt}: <|Reward|> end")
    torch.testing.assert_close(score("Rate {prompt}: <|Reward|> and more"), one)
    assert not torch.allclose(score("Rank {prompt}: <|Reward|> end"), one, atol=1e-4)


def test_hpsv3_numbers_all_tokens_one_after_another(images, made):
    """As the released model was trained: transformers' own numbers, by row and column of the image, score otherwise."""
    scorer = load("hpsv3", **made["hpsv3"])
    scores, expected, others = scorer(images, PROMPTS).values, [], []
    for image, prompt in zip(images, PROMPTS, strict=True):
        words = scorer.instruction.replace("{prompt}", prompt.text)
        inputs = vlm.inputs_of(scorer.processor, [(image, words)], "cpu", answering=False)
        at = inputs.input_ids[0].tolist().index(scorer.token)
        number = torch.arange(inputs.input_ids.shape[1])
        with torch.no_grad():
            for rows, settings in ((expected, {"position_ids": number.expand(3, 1, -1)}), (others, {})):
                rows.append(scorer.head(scorer.model.model(**inputs, **settings).last_hidden_state[0, at].float())[:1])
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=1e-4)
    assert (scores - torch.stack(others)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("mask", "numbers"),
    [
        ([[1, 1, 1]], [[0, 1, 2]]),
        ([[0, 0, 1, 1], [1, 1, 1, 1]], [[0, 0, 0, 1], [0, 1, 2, 3]]),
        ([[1, 1, 0, 0]], [[0, 1, 1, 1]]),
    ],
)
def test_padding_has_no_number(mask, numbers):
    assert positions(torch.tensor(mask)).tolist() == numbers


COLLATOR = "import nowhere\nraise SystemExit('run')\nINSTRUCTION = {one!r}\nprompt_with_special_token = {two!r}\n"


def authors_package(folder, one, two):
    """What `pip install --no-deps hpsv3` leaves, with other words."""
    (folder / "hpsv3-1.0.0.dist-info").mkdir()
    (folder / "hpsv3-1.0.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: hpsv3\nVersion: 1.0.0\n")
    (folder / "hpsv3/dataset").mkdir(parents=True)
    (folder / "hpsv3/__init__.py").write_text("raise SystemExit('run')")
    (folder / "hpsv3/dataset/data_collator_qwen.py").write_text(COLLATOR.format(one=one, two=two))


def test_hpsv3_reads_the_authors_instruction_and_runs_none_of_their_code(images, made, tmp_path, monkeypatch):
    authors_package(tmp_path, "Rate {text_prompt} ({text_prompt}).\n", "Overall: <|Reward|>\nEND\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {name: value for name, value in made["hpsv3"].items() if name != "instruction"}
    scorer = load("hpsv3", **settings)
    assert scorer.instruction == "Rate {prompt} ({prompt}).\nOverall: <|Reward|>\nEND\n"
    (tmp_path / "words.txt").write_text(scorer.instruction)
    same = load("hpsv3", **settings, instruction=str(tmp_path / "words.txt"))
    assert same.card.version == scorer.card.version
    assert torch.equal(same(images, PROMPTS).values, scorer(images, PROMPTS).values)


def test_hpsv3_reports_a_package_without_its_constants(tmp_path, monkeypatch):
    authors_package(tmp_path, "Rate it.", "Overall: <|Reward|>")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"hpsv3: .* does not hold INSTRUCTION and prompt_with_special_token of version"
    ):
        load("hpsv3")


def test_hpsv3_reads_a_prompt_that_holds_its_token(images, made):
    scorer = load("hpsv3", **made["hpsv3"])
    scores = scorer(images[:2], [Prompt("a <|Reward|>fox"), Prompt("a fox")])
    assert not scores.failures
    torch.testing.assert_close(scores.values[0], scorer(images[:1], [Prompt("a fox")]).values[0])


def test_hpsv3_loads_old_and_new_names(images, made, tmp_path):
    old = read_file(made)
    begins = {"visual.": "model.visual.", "model.": "model.language_model."}
    new = {}
    for name, value in old.items():
        before = next((start for start in begins if name.startswith(start)), "")
        new[begins.get(before, "") + name.removeprefix(before)] = value
    assert {before_version_5(name) for name in new} == set(old) != set(new)
    save_file(new, tmp_path / "HPSv3.safetensors")
    again = load("hpsv3", **made["hpsv3"] | {"weights": str(tmp_path)})
    assert again.card.checkpoint == load("hpsv3", **made["hpsv3"]).card.checkpoint
    assert torch.equal(again(images, PROMPTS).values, load("hpsv3", **made["hpsv3"])(images, PROMPTS).values)


def read_file(made):
    from pathlib import Path

    return read(Path(made["hpsv3"]["weights"]) / "HPSv3.safetensors")


@pytest.mark.parametrize(
    ("drop", "add", "says"),
    [
        ("model.norm.weight", None, "missing keys: 1, e.g. model.language_model.norm.weight"),
        (None, "model.layers.9.mlp.up_proj.weight", "unexpected keys: 1"),
        ("rm_head.3.weight", None, "no chain of linear layers called rm_head"),
        ("model.embed_tokens.weight", None, "no token embeddings"),
    ],
)
def test_hpsv3_refuses_weights_that_do_not_fit(made, tmp_path, drop, add, says):
    weights = {name: value for name, value in read_file(made).items() if name != drop}
    save_file(weights | ({add: torch.zeros(2, 2)} if add else {}), tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=f"hpsv3: .*could not be loaded: .*{says}") as error:
        load("hpsv3", **made["hpsv3"] | {"weights": str(tmp_path)})
    assert "\n" not in str(error.value)


def test_hpsv3_reports_a_missing_instruction(made, tmp_path):
    with pytest.raises(ValueError, match=r"hpsv3: the instruction .* is missing; pip install --no-deps hpsv3, or give"):
        load("hpsv3")
    with pytest.raises(ValueError, match=r"hpsv3: instruction='nowhere.txt' could not be loaded: .*No such file"):
        load("hpsv3", **made["hpsv3"] | {"instruction": "nowhere.txt"})
    (tmp_path / "words.txt").write_text("Rate {prompt}.")
    with pytest.raises(ValueError, match=r"must hold \{prompt\}, and <\|Reward\|> once"):
        load("hpsv3", **made["hpsv3"] | {"instruction": str(tmp_path / "words.txt")})
