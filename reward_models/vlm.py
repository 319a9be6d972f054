"""A model that sees images and reads and writes text, run here through transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from reward_models.images import to_pil
from reward_models.types import Images
from reward_models.weights import loading, pretrained

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def type_of(scorer: str, name: str) -> torch.dtype:
    if name not in TYPES:
        raise ValueError(f"{scorer}: dtype is one of {', '.join(TYPES)}, not {name!r}")
    return TYPES[name]


def processor_of(place: str):
    """Tokenizer and image processor of a folder or hub id. Rows of a batch are padded on the left, so that all of them
    end at the same place."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(place)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load(scorer: str, model: str, device: str, dtype: str) -> tuple[nn.Module, object]:
    """Model and processor of a folder or hub id. ValueError in one line if they cannot be had."""
    from transformers import AutoModelForImageTextToText

    kind = type_of(scorer, dtype)
    with loading(scorer, model):
        return pretrained(AutoModelForImageTextToText, model, dtype=kind).to(device), processor_of(model)


def asked(processor, images: Images, texts: Sequence[str], device: str, answering: bool = True):
    """What the model is fed: for each image one message of a user, the image and then a text; `answering` opens the
    model's reply."""
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in zip(to_pil(images), texts, strict=True)
    ]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(
        messages, add_generation_prompt=answering, processor_kwargs={"padding": True}, **settings
    ).to(device)


@torch.no_grad()
def written(model: nn.Module, processor, images: Images, texts: Sequence[str], device: str, tokens: int) -> list[str]:
    """What the model replies to each image and text: the likeliest token each time, at most `tokens` of them."""
    inputs = asked(processor, images, texts, device)
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def instruction(scorer: str, name: str, file: str | None) -> str:
    """The text of an instruction: of `file`, or our own called `name`. ValueError if the file cannot be read or does
    not hold `{prompt}`."""
    path = Path(file) if file else Path(__file__).parent / "instructions" / f"{name}.txt"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{scorer}: {path}: {getattr(error, 'strerror', None) or error}") from None
    if "{prompt}" not in text:
        raise ValueError(f"{scorer}: {path} does not hold {{prompt}}, where the request goes")
    return text
