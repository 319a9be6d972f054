"""Distil a critic of the embedded world from preferences, as RationalRewards does (PARROT), and measure it.

    OMP_NUM_THREADS=1 python scripts/parrot_world.py
"""

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from reward_models import Prompt, files
from reward_models.scorers.shapes import UNKNOWN, Blob, find_blobs, judge
from reward_models.shapes_world import LARGE_MIN, SMALL_MAX, draw, requests
from reward_models.training.parrot import student
from reward_models.vlm.types import Question

CELL = 4  # px: positions are described in such steps


def described(blobs: Sequence[Blob]) -> str:
    """What there is in a picture: size, colour, shape and position of each object, from left to right."""
    words = []
    for blob in sorted(blobs, key=lambda blob: (blob.centre, blob.colour)):
        size = "small" if blob.extent <= SMALL_MAX else "large" if blob.extent >= LARGE_MIN else "medium"
        x, y = (int(edge // CELL) for edge in blob.centre)
        words.append(f"{size} {blob.colour} {blob.name} at {x} {y}")
    return "; ".join(words) or "nothing"


def tokenizer_of(texts: Sequence[str]) -> Any:
    """A tokenizer of bytes and of the pieces of words that are frequent in the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=sorted(letters), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=MARKS[0], eos_token=MARKS[2])
    fast.add_special_tokens({"additional_special_tokens": MARKS})
    return fast


MARKS = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def new_model(tokenizer: Any, seed: int) -> tuple[Any, Any]:
    """A Qwen2-VL of random weights that sees a picture of 32 x 32 pixels as 16 tokens, and its processor."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    pixels = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    images = Qwen2VLImageProcessor(size=pixels, patch_size=4, merge_size=2)
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    processor.tokenizer.padding_side = "left"
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    text = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3}
    text |= {"intermediate_size": 384, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        vision_config={
            "depth": 3, "embed_dim": 96, "num_heads": 3, "hidden_size": 128, "mlp_ratio": 3, "patch_size": 4,
            "spatial_merge_size": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, processor


def describe(image: Tensor) -> Question:
    return Question((image, "\ndescribe"))


def pretrain(folder: Path, steps: int, batch: int, seed: int, corpus: Sequence[str], rate: float = 1e-3) -> None:
    """Train a model of random weights to describe drawings of the world, all its parameters, and write it."""
    rng = np.random.default_rng(seed)
    wants = requests()
    model, processor = new_model(tokenizer_of(corpus), seed)
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    start, total = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        images = np.stack([draw(wants[i], rng) for i in rng.integers(len(wants), size=batch)])
        replies = [student.reply_tokens(model, processor, described(blobs)) for blobs in find_blobs(images)]
        inputs, targets = student.encode(processor, [describe(one) for one in torch.from_numpy(images)], replies, "cpu")
        losses, counts = student.token_losses(model, inputs, targets)
        loss = losses.sum() / counts.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step}: loss {total / 50:.3f}, {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
    student.save(model.eval(), processor, folder)


if __name__ == "__main__":
    import sys
    rng = np.random.default_rng(0)
    wants = requests()
    images = np.stack([draw(wants[i], rng) for i in rng.integers(len(wants), size=2000)])
    corpus = [described(b) for b in find_blobs(images)]
    pretrain(Path(sys.argv[1]), int(sys.argv[2]), 32, 0, corpus)
