"""A random Qwen2-VL of a few thousand weights with a tokenizer of single bytes, saved as a hub repository would be."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
MARKS += ["<|image_pad|>", "<|video_pad|>"]
WORDS = ["Yes", "No", "yes", "no", "ĠYes", "ĠNo"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def new_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([word.replace("Ġ", " ") for word in words])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=MARKS[0], eos_token=MARKS[2])
    fast.add_special_tokens({"additional_special_tokens": MARKS})
    return fast


def folder_of(folder: Path, words: list[str] = WORDS, seed: int = 0) -> Path:
    """`words` are single tokens beside the bytes."""
    tokenizer = new_tokenizer(words)
    size = 4 * 28 * 28
    images = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": size})
    Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE).save_pretrained(folder)
    torch.manual_seed(seed)
    side = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    config = Qwen2VLConfig(
        text_config=side
        | {
            "vocab_size": len(tokenizer) + 8,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "num_heads": 2,
            "hidden_size": 16,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    model = Qwen2VLForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the library's initialisation is too small to tell one picture from another
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
