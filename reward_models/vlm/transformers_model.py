"""Load and run a vision-language model with transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_models import processors
from reward_models.images import to_pil
from reward_models.model_folders import loading, pinned
from reward_models.types import Images
from reward_models.weights import named, pretrained

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def type_of(scorer: str, name: str) -> torch.dtype:
    if name not in TYPES:
        raise ValueError(f"{scorer}: dtype is one of {', '.join(TYPES)}, not {name!r}")
    return TYPES[name]


def processor_of(source: str) -> Any:
    """Tokenizer and image processor of a folder or hub id. Batches are padded on the left, so that all rows end at the
    same position."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, **pinned(source, named(source)))
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def load(scorer: str, model: str, device: str, dtype: str) -> tuple[nn.Module, object]:
    """Model and processor of a folder or hub id. ValueError in one line if they cannot be loaded."""
    from transformers import AutoModelForImageTextToText

    kind = type_of(scorer, dtype)
    with loading(scorer, model):
        network, processor = pretrained(AutoModelForImageTextToText, model, dtype=kind).to(device), processor_of(model)
        with torch.no_grad():  # a complete folder may still have a processor that does not fit its model
            logits = network(**inputs_of(processor, [(torch.full((3, 64, 64), 0.5), "a")], device)).logits
        if not logits.isfinite().all():
            raise ValueError("its logits for a grey image are not finite")
        return network, processor


def image_questions(images: Images, texts: Sequence[str]) -> list[tuple[Any, ...]]:
    """A question for each image: the image, then its text."""
    return [(image, text) for image, text in zip(images, texts, strict=True)]


def inputs_of(
    processor: Any, questions: Sequence[Any], device: str, answering: bool = True, exact: bool = False
) -> Any:
    """The model's inputs by its chat template: for each question the system message, if any, then a user message of
    texts and pictures [3, H, W] in order. `answering` adds the prompt for the model's reply. A question is a
    `vlm.types.Question` or only its parts. `exact`: the pictures are not rounded to 8 bits, and stay in their graph.
    ValueError if the processor cannot do that."""
    messages, tensors = [], []
    for question in questions:
        parts = [*getattr(question, "parts", question)]
        tensors += [part for part in parts if not isinstance(part, str)]
        pictures = iter(to_pil(part.detach()[None])[0] for part in parts if not isinstance(part, str))
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": next(pictures)}
            for part in parts
        ]
        system = getattr(question, "system", "")
        instruction = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        messages.append([*instruction, {"role": "user", "content": content}])
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=answering, processor_kwargs={"padding": True}, **settings
    ).to(device)
    if exact:
        values = processors.pixels(processor.image_processor, tensors).to(inputs["pixel_values"])
        if values.shape != inputs["pixel_values"].shape:
            raise ValueError("no gradients: the processor prepares tensors in another form than pictures")
        inputs["pixel_values"] = values
    return inputs


@torch.no_grad()
def generate(
    model: nn.Module, processor: Any, inputs: Mapping[str, Tensor], tokens: int
) -> tuple[list[str], list[bool], int]:
    """Greedy replies of at most `tokens` to each row; whether each was cut off; and the number of tokens generated."""
    greedy = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}  # overrides the folder's settings
    out = model.generate(**inputs, max_new_tokens=tokens, **greedy)[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(
        ends if isinstance(ends, list) else [processor.tokenizer.eos_token_id if ends is None else ends]
    )
    ended = torch.isin(out, ends.to(out.device)).any(1)
    return processor.batch_decode(out, skip_special_tokens=True), (~ended).tolist(), out.numel()


def first_tokens(tokenizer: Any, yes: str, no: str) -> tuple[list[int], list[int]]:
    """The possible first tokens of each answer: those of its usual spellings, without the ones that both share.
    ValueError if none is left."""

    def first(word: str) -> set[int]:
        return {tokenizer.encode(form, add_special_tokens=False)[0] for form in spellings(word)}

    one, two = first(yes), first(no)
    if not one - two or not two - one:
        raise ValueError(f"the model's first tokens do not distinguish {yes!r} from {no!r}; choose other answers")
    return sorted(one - two), sorted(two - one)


def spellings(word: str) -> set[str]:
    cases = (word, word.lower(), word.capitalize(), word.upper())
    return {form for case in cases for form in (case, f" {case}")}


def log_odds(model: nn.Module, inputs: Mapping[str, Tensor], yes: list[int], no: list[int]) -> Float[Tensor, "N"]:
    """log p(yes) - log p(no) of each row's next token; the probability of an answer is the sum over its tokens."""
    logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
    return logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)
