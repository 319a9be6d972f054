"""`hpsv3`: HPSv3 (arXiv 2508.03789), Qwen2-VL trained on human preferences between images, with a small network on the
hidden state of a reward token.

One score per image, the mean of the Gaussian that the network predicts (its variance is not used), unbounded, higher is
better. Images are scaled to about 256 x 28 x 28 pixels. Weights: MizzenAI/HPSv3 on the architecture and processor of
Qwen/Qwen2-VL-7B-Instruct; licences: the models' own. Not checked against the released weights.

The model needs the instruction that it was trained with. It is read from the authors' package `hpsv3` if that is
installed (`pip install --no-deps hpsv3`; none of its code is run), or from the file `instruction`, a text with
`{prompt}` in the position of the prompt and `<|Reward|>` in the position of the reward token. Positions are numbered
like in the authors' package: every token of a row, image tokens included, has the next integer, where transformers
would number image tokens by row and column.
"""

import ast
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reward_models import files, limits
from reward_models.model_folders import loading, pinned
from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.vlm import transformers_model as vlm
from reward_models.weights import fingerprint, linear_chain, located, named, quiet, read

FILE, TOKEN, HEAD = "HPSv3.safetensors", "<|Reward|>", "rm_head."
SOURCE = "hpsv3/dataset/data_collator_qwen.py"  # the file of the authors' package that holds the instruction
CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")  # joined in this order; the first holds {text_prompt}


def authors_instruction() -> str:
    """The instruction that the released model was trained with, with `{prompt}` for the prompt, from the source of the
    installed package `hpsv3`, which is not run. ValueError if the package or its constants are missing."""
    try:
        path = Path(distribution("hpsv3").locate_file(SOURCE))
    except PackageNotFoundError:
        raise ValueError(
            "hpsv3: the instruction that the model was trained with is missing; pip install --no-deps hpsv3, or give "
            f"`instruction`, a text file with {{prompt}} and {TOKEN} in it"
        ) from None
    constants = {
        line.targets[0].id: line.value.value
        for line in ast.parse(files.text(path)).body
        if isinstance(line, ast.Assign)
        and isinstance(line.targets[0], ast.Name)
        and isinstance(line.value, ast.Constant)
    }
    texts = [constants.get(name) for name in CONSTANTS]
    if not all(isinstance(text, str) for text in texts) or "{text_prompt}" not in texts[0]:
        raise ValueError(f"hpsv3: {path} does not hold {' and '.join(CONSTANTS)} of version 1.0.0; give `instruction`")
    return "".join(texts).replace("{text_prompt}", "{prompt}")


def positions(mask: Int[Tensor, "N L"]) -> Int[Tensor, "N L"]:
    """The index of each token among its row's tokens that are not padding, from 0, whichever side is padded."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def reward_model(weights: dict[str, Tensor], base: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Qwen2-VL and its head, from one state dict. transformers also loads the names of weights that it used before
    version 5. RuntimeError if weights are missing or unexpected."""
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    head = linear_chain(weights, HEAD, nn.ReLU)
    rest = {name: value for name, value in weights.items() if not name.startswith(HEAD)}
    config = AutoConfig.from_pretrained(base, trust_remote_code=False, **pinned(base, named(base)))
    rows = [len(value) for name, value in rest.items() if name.endswith("embed_tokens.weight")]
    if not rows:
        raise RuntimeError("no token embeddings in the weights")
    config.text_config.vocab_size = rows[0]  # the reward token was added to the base's vocabulary
    with quiet():
        model, info = Qwen2VLForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=rest, dtype=dtype, output_loading_info=True
        )
    for kind in ("missing_keys", "unexpected_keys"):
        if keys := info[kind]:
            raise RuntimeError(f"{kind.replace('_', ' ')}: {len(keys)}, e.g. {sorted(keys)[0]}")
    return model.eval().requires_grad_(False), head


class Hpsv3:
    """The scorer. `instruction`: a text file that replaces the authors' instruction. `weights`: a file, or a folder or
    hub repository with `HPSv3.safetensors`; `base`: folder or hub id of the configuration and processor. `pixels`: the
    area that an image is scaled to. ValueError if any of these cannot be loaded or does not fit."""

    names = ("mu",)

    def __init__(
        self,
        instruction: str = "",
        weights: str = "MizzenAI/HPSv3",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        pixels: int = 256 * 28 * 28,
        device: str = "cpu",
        dtype: str = "bfloat16",
        batch: int = 8,
    ):
        with loading("hpsv3", f"instruction={instruction!r}"):
            self.instruction = files.text(instruction, limits.TEMPLATE) if instruction else authors_instruction()
        if "{prompt}" not in self.instruction or self.instruction.count(TOKEN) != 1:
            raise ValueError(f"hpsv3: {instruction or SOURCE} must hold {{prompt}}, and {TOKEN} once")
        kind = vlm.type_of("hpsv3", dtype)
        with loading("hpsv3", f"{weights} on {base}"):
            model, head = reward_model(read(located(weights, FILE)), base, kind)
            self.model, self.head = model.to(device), head.to(device)
            self.processor = vlm.processor_of(base)
            self.processor.tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
            self.processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
        self.token = self.processor.tokenizer.convert_tokens_to_ids(TOKEN)
        self.device, self.batch = device, batch
        self.card = Card(
            "hpsv3",
            model=named(weights),
            licence="the model's own",
            size=f"scaled to about {pixels} pixels",
            checkpoint=fingerprint(self.model, self.head),
            settings={
                "instruction": self.instruction,
                "base": named(base),
                "dtype": dtype,
                "positions": "one after another",
            },
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self._scores(images, prompts, exact=False)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        return self._scores(images, prompts, exact=True)

    def _scores(self, images: Images, prompts: Sequence[Prompt], exact: bool) -> Float[Tensor, "N K"]:
        texts = [self.instruction.replace("{prompt}", p.text.replace(TOKEN, "")) for p in prompts]
        questions = vlm.image_questions(images, texts)
        inputs = vlm.inputs_of(self.processor, questions, self.device, answering=False, exact=exact)
        ids = positions(inputs.attention_mask)
        hidden = self.model.model(**inputs, position_ids=ids).last_hidden_state
        return self.head(hidden[inputs.input_ids == self.token].float())[:, :1]
