"""The student of a distillation: an image-text model of transformers, its replies as tokens, and what of it is trained.

The vision tower and the projector are frozen, as published; the language model is trained, by LoRA or in full.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reward_models.vlm import transformers_model as vlm
from reward_models.vlm.types import Question
from reward_models.weights import quiet

IGNORED = -100  # the target of a position that has no loss, as in transformers


def reply_tokens(model: nn.Module, processor: Any, reply: str) -> list[int]:
    """The tokens of a reply and the one that ends it, which generation stops at."""
    ends = model.generation_config.eos_token_id
    end = ends[0] if isinstance(ends, list) else processor.tokenizer.eos_token_id if ends is None else ends
    return [*processor.tokenizer.encode(reply, add_special_tokens=False), end]


def encode(
    processor: Any, questions: Sequence[Question], replies: Sequence[Sequence[int]], device: str
) -> tuple[dict[str, Tensor], Int[Tensor, "N R"]]:
    """The model's inputs for questions, each followed by its reply, and the targets: the tokens of the replies, in the
    last R positions, IGNORED where a reply is shorter. A question is padded on the left, as for
    generation, and a reply on the right."""
    inputs = dict(vlm.inputs_of(processor, questions, device))
    shape = inputs["input_ids"].shape
    targets = torch.full((len(replies), max(map(len, replies))), IGNORED)
    for row, tokens in zip(targets, replies, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    targets = targets.to(device)
    there = targets != IGNORED
    more = {"input_ids": targets.where(there, processor.tokenizer.pad_token_id), "attention_mask": there}
    for name, value in inputs.items():
        if value.shape == shape:  # a value for each token; others, such as pixels, stay
            added = more.get(name, torch.zeros_like(targets))  # 0: the type of text
            inputs[name] = torch.cat([value, added.to(value.dtype)], 1)
    return inputs, targets


def token_losses(
    model: nn.Module, inputs: Mapping[str, Tensor], targets: Int[Tensor, "N R"]
) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
    """The sum of the cross-entropies of each reply's tokens, and how many they are. No other position has a loss."""
    logits = model(**inputs, logits_to_keep=targets.shape[1] + 1, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape).sum(1), (targets != IGNORED).sum(1)


def trained(model: nn.Module, rank: int | None, seed: int) -> nn.Module:
    """The model with the parameters of its language model alone to be trained: with a rank LoRA on all its linear
    layers, alpha twice the rank, else the parameters themselves and the output embedding."""
    model.requires_grad_(False)
    language = model.get_decoder()
    if rank is None:
        language.requires_grad_(True)
        if (output := model.get_output_embeddings()) is not None:
            output.requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    inside = {id(module) for module in language.modules()}
    names = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and id(one) in inside]
    with torch.random.fork_rng():  # leaves the caller's random numbers alone
        torch.manual_seed(seed)  # of the matrices that LoRA begins with
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))


def save(model: nn.Module, processor: Any, folder: Path) -> None:
    """Write a complete model, LoRA merged, as safetensors, with its processor. Generation stops at the token that ends
    the replies."""
    complete = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    if complete.generation_config.eos_token_id is None:
        complete.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    with quiet():
        complete.save_pretrained(folder)
        processor.save_pretrained(folder)
