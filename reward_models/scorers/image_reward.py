"""`image_reward`: ImageReward (arXiv 2304.05977), a model trained on experts' rankings of generated images. BLIP's text
encoder reads the prompt with cross-attention to the image, and linear layers on its first token give the score.

One score per image, standardised on the authors' data, typically -2 to 2, higher is better. Prompts are cut at 35
tokens, and images that are not square are cropped to the middle. Weights: THUDM/ImageReward, Apache-2.0. Not checked
against the released weights.

The released file has the names of the original BLIP, which are mapped to those of transformers. Two settings are the
original's and not transformers' defaults: 1e-6 in the layer norms of the image encoder, and twelve heads in the text
encoder (from `med_config.json`).
"""

import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_models import files
from reward_models.images import resized
from reward_models.lengths import Reader, reader
from reward_models.model_folders import loading, pinned
from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import check_on_grey_image, fingerprint, linear_chain, located, named, read

SHIFT, SPREAD = (
    0.16717362830052426,
    1.0333394966054072,
)  # mean and deviation of the raw scores on the authors' data
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOKENS = 35
VISION = {  # the original's name: transformers' name
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.attn\.": ".self_attn.",
    r"\.norm([12])\.": r".layer_norm\1.",
}


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, under names without it; `position_ids` are left out."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder's weights under transformers' names."""
    out = {}
    for name, value in weights.items():
        for pattern, name_here in VISION.items():
            name = re.sub(pattern, name_here, name)
        out[name] = value
    return out


def image_encoder(weights: Mapping[str, Tensor], heads: int | None = None) -> nn.Module:
    """BLIP's vision transformer, its sizes read from the weights; by default with heads of 64 channels."""
    from transformers import BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel

    patches, wide = weights["pos_embed"].shape[1] - 1, weights["pos_embed"].shape[2]
    patch = weights["patch_embed.proj.weight"].shape[-1]
    model = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=wide,
            intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
            num_attention_heads=heads or wide // 64,
            image_size=round(patches**0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    model.load_state_dict(renamed(weights))
    return model.eval().requires_grad_(False)


def text_encoder(weights: Mapping[str, Tensor], config: Mapping, wide: int) -> nn.Module:
    """BLIP's text encoder with cross-attention to `wide` channels, configured by a `med_config.json`."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        "layer_norm_eps", "hidden_act",
    )  # fmt: skip
    model = BlipTextModel(
        BlipTextConfig(
            **{name: config[name] for name in names},
            vocab_size=len(weights["embeddings.word_embeddings.weight"]),
            encoder_hidden_size=wide,
            is_decoder=True,  # enables cross-attention; no causal mask is passed
            bos_token_id=None,
            sep_token_id=None,
        ),
        add_pooling_layer=False,
    )
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


class ImageReward:
    """The scorer. `weights` is a folder or hub repository with `ImageReward.pt` and `med_config.json`, `tokenizer` is
    BERT's, `heads` is the number of heads of the image encoder if they are not 64 channels wide. ValueError if these
    cannot be loaded or do not fit."""

    names = ("score",)

    def __init__(
        self,
        weights: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        heads: int | None = None,
        device: str = "cpu",
        batch: int = 32,
    ):
        from transformers import AutoTokenizer

        with loading("image_reward", f"{weights} with {tokenizer}"):
            config = files.parsed(files.text(located(weights, "med_config.json")))
            state = read(located(weights, "ImageReward.pt"))
            self.vision = image_encoder(below(state, "blip.visual_encoder."), heads).to(device)
            wide = self.vision.config.hidden_size
            self.text = text_encoder(below(state, "blip.text_encoder."), config, wide).to(device)
            self.head = linear_chain(below(state, "mlp.")).to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(
                tokenizer, trust_remote_code=False, **pinned(tokenizer, named(tokenizer))
            )
        self.device, self.batch, self.side = device, batch, self.vision.config.image_size
        self.card = Card(
            "image_reward",
            model=named(weights),
            licence="Apache-2.0",
            size=f"{self.side} px, shortest, bicubic",
            checkpoint=fingerprint(self.vision, self.text, self.head),
            settings={"tokenizer": named(tokenizer)},
        )
        with loading("image_reward", f"{weights} with {tokenizer}"):
            check_on_grey_image(self._score_batch)

    def readers(self) -> list[Reader]:
        return [reader("image_reward", self.tokenizer, TOKENS)]

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self.in_graph(images, prompts)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        pixels = resized(images.to(self.device), (self.side, self.side), "shortest", "bicubic")
        mean, std = (torch.tensor(numbers, device=self.device)[:, None, None] for numbers in (MEAN, STD))
        features = self.vision(pixel_values=(pixels - mean) / std).last_hidden_state
        tokens = self.tokenizer(
            [p.text for p in prompts], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        hidden = self.text(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        return (self.head(hidden[:, 0].float()) - SHIFT) / SPREAD
