"""A model that sees images and reads and writes text, run here through transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_models.images import to_pil
from reward_models.model_folders import loading, pinned
from reward_models.types import Images
from reward_models.weights import named, pretrained

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def type_of(scorer: str, name: str) -> torch.dtype:
    if name not in TYPES:
        raise ValueError(f"{scorer}: dtype is one of {', '.join(TYPES)}, not {name!r}")
    return TYPES[name]


def processor_of(place: str):
    """Tokenizer and image processor of a folder or hub id. Rows of a batch are padded on the left, so that all of them
    end at the same place."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(place, trust_remote_code=False, **pinned(place, named(place)))
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load(scorer: str, model: str, device: str, dtype: str) -> tuple[nn.Module, object]:
    """Model and processor of a folder or hub id. ValueError in one line if they cannot be had."""
    from transformers import AutoModelForImageTextToText

    kind = type_of(scorer, dtype)
    with loading(scorer, model):
        network, processor = pretrained(AutoModelForImageTextToText, model, dtype=kind).to(device), processor_of(model)
        with torch.no_grad():  # a folder may be whole and describe what its model cannot read
            logits = network(**inputs_of(processor, [(torch.full((3, 64, 64), 0.5), "a")], device)).logits
        if not logits.isfinite().all():
            raise ValueError("what it would say of a grey image is not finite")
        return network, processor


def image_questions(images: Images, texts: Sequence[str]) -> list[tuple[Any, ...]]:
    """A question for each image: the image, then a text."""
    return [(image, text) for image, text in zip(images, texts, strict=True)]


def inputs_of(processor, questions: Sequence[Any], device: str, answering: bool = True):
    """What the model is fed: for each question a message of the user, its parts texts and pictures [3, H, W] in order,
    after what the system says, if anything; `answering` opens the model's reply. A question is an `ask.Question` or its
    parts alone."""
    messages = []
    for question in questions:
        parts = [*getattr(question, "parts", question)]
        pictures = iter(to_pil(part[None])[0] for part in parts if not isinstance(part, str))
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": next(pictures)}
            for part in parts
        ]
        system = getattr(question, "system", "")
        told = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        messages.append([*told, {"role": "user", "content": content}])
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(
        messages, add_generation_prompt=answering, processor_kwargs={"padding": True}, **settings
    ).to(device)


@torch.no_grad()
def generate(model: nn.Module, processor, inputs, tokens: int) -> tuple[list[str], list[bool], int]:
    """What the model replies to each row, the likeliest token each time, at most `tokens` of them; whether each ran out
    of them; and how many were written."""
    one = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}  # whatever the model's folder asks for
    out = model.generate(**inputs, max_new_tokens=tokens, **one)[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(
        ends if isinstance(ends, list) else [processor.tokenizer.eos_token_id if ends is None else ends]
    )
    ended = torch.isin(out, ends.to(out.device)).any(1)
    return processor.batch_decode(out, skip_special_tokens=True), (~ended).tolist(), out.numel()


def first_tokens(tokenizer, yes: str, no: str) -> tuple[list[int], list[int]]:
    """The tokens that an answer may begin with, for each answer: those of its usual spellings, less what both begin
    with. ValueError if nothing is left."""

    def first(word: str) -> set[int]:
        return {tokenizer.encode(form, add_special_tokens=False)[0] for form in spellings(word)}

    one, two = first(yes), first(no)
    if not one - two or not two - one:
        raise ValueError(f"the model's tokens do not tell {yes!r} from {no!r} by their beginning; choose others")
    return sorted(one - two), sorted(two - one)


def spellings(word: str) -> set[str]:
    return {form for own in (word, word.lower(), word.capitalize(), word.upper()) for form in (own, f" {own}")}


@torch.no_grad()
def log_odds(model: nn.Module, inputs, yes: list[int], no: list[int]) -> Float[Tensor, "N"]:
    """log p(yes) - log p(no) of each row's next token, each answer the sum over its tokens."""
    logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
    one, two = (logits[:, ids].logsumexp(-1) for ids in (yes, no))
    return one - two
