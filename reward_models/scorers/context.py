"""`context`: how well an image fits a description of its context, by a BLIP-2 image-text model. Hummingbird's rewards.

The description is the text `Prompt.wants["context"]`, and where there is none the prompt. Components, comparable within
a prompt:

- `global`: the highest cosine between the embedding of a query token of the Q-Former (arXiv 2301.12597), which has seen
  the image, and that of the description's first token, in [-1, 1].
- `fine`: the probability that image and description match, by the matching head on query tokens that see both, in
  [0, 1].

Both are those of `Blip2ForImageTextRetrieval` of transformers, with one pass of the image encoder, and have gradients.
Hummingbird sums them, with weights that we do not know, for images that keep what a description says of a reference
picture and differ from it otherwise: watch `likeness` for the second half. Whether its `fine` is the probability or the
logit is not known either. Images are squashed to the model's size like by its processor, in float32 instead of 8-bit
pixels. Weights: Salesforce/blip2-itm-vit-g, MIT according to its repository. Not checked against the released weights.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from reward_models.images import resized
from reward_models.lengths import Reader, reader
from reward_models.model_folders import loading, pinned
from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import check_on_grey_image, fingerprint, named, pretrained


class Context:
    """The scorer. `model` is a folder or hub id of a `Blip2ForImageTextRetrieval` with its image processor and
    tokenizer. `tokens`: the most that are read; a longer prompt is truncated, a longer context fails its image.
    ValueError if the model cannot be loaded."""

    names = ("global", "fine")

    def __init__(
        self, model: str = "Salesforce/blip2-itm-vit-g", tokens: int = 128, device: str = "cpu", batch: int = 16
    ):
        from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForImageTextRetrieval

        with loading("context", model):
            loaded = pretrained(Blip2ForImageTextRetrieval, model, dtype=torch.float32)
            self.model = loaded.to(device).requires_grad_(False)
            revision = pinned(model, named(model))
            processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False, **revision)
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, **revision)
            self.mean, self.std = (
                torch.tensor(numbers, device=device)[:, None, None]
                for numbers in (processor.image_mean, processor.image_std)
            )
        most = self.model.config.qformer_config.max_position_embeddings
        if not 1 < tokens <= most:
            raise ValueError(f"context: tokens {tokens}: 2 to {most} of this model are needed")
        self.tokens, self.device, self.batch = tokens, device, batch
        self.side = self.model.config.vision_config.image_size
        self.card = Card(
            "context",
            model=named(model),
            licence="the model's own",
            low=-1,
            high=1,
            size=f"{self.side} px, squash, bicubic",
            checkpoint=fingerprint(self.model),
            settings={"tokens": tokens},
        )
        with loading("context", model):
            check_on_grey_image(self._score_batch)

    def readers(self) -> list[Reader]:
        return [reader("context", self.tokenizer, self.tokens)]

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self.in_graph(images, prompts)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        pixels = resized(images.to(self.device, torch.float32), (self.side, self.side), "squash", "bicubic")
        words = self.tokenizer(
            [self.description(prompt) for prompt in prompts],
            padding=True, truncation=True, max_length=self.tokens, return_tensors="pt",
        )  # fmt: skip
        ids, mask = words.input_ids.to(self.device), words.attention_mask.to(self.device)
        features = self.model.vision_model(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        queries = self.model.query_tokens.expand(len(images), -1, -1)
        return torch.stack([self._global(features, queries, ids, mask), self._fine(features, queries, ids, mask)], 1)

    def description(self, prompt: Prompt) -> str:
        """The text that the image is compared with. ValueError for a context that is not a text, or too long."""
        if "context" not in prompt.wants:
            return prompt.text
        text = prompt.wants["context"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"context {str(text)[:60]!r}: a description in words is needed")
        if self.readers()[0].cuts(text):
            raise ValueError(f"context {text[:60]!r}...: it is longer than the {self.tokens} tokens that are read")
        return text

    def _global(
        self,
        features: Float[Tensor, "N patches wide"],
        queries: Float[Tensor, "N Q D"],
        ids: Int[Tensor, "N L"],
        mask: Int[Tensor, "N L"],
    ) -> Float[Tensor, "N"]:
        model = self.model
        hidden = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        embedded = model.embeddings(input_ids=ids)
        text = model.qformer(query_embeds=embedded, query_length=0, attention_mask=mask).last_hidden_state[:, 0]
        image = F.normalize(model.vision_projection(hidden), dim=-1)
        text = F.normalize(model.text_projection(text), dim=-1)
        return (image * text[:, None]).sum(-1).amax(1)

    def _fine(
        self,
        features: Float[Tensor, "N patches wide"],
        queries: Float[Tensor, "N Q D"],
        ids: Int[Tensor, "N L"],
        mask: Int[Tensor, "N L"],
    ) -> Float[Tensor, "N"]:
        model, count = self.model, queries.shape[1]
        both = model.qformer(
            query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
            query_length=count,
            attention_mask=torch.cat([mask.new_ones(len(mask), count), mask], 1),
            encoder_hidden_states=features,
        ).last_hidden_state
        return model.itm_head(both[:, :count]).mean(1).softmax(-1)[:, 1]
