"""`pickscore`: PickScore (arXiv 2305.01569), a CLIP model trained on the choices of users between generated images.

One score per image, logit scale times the cosine similarity of the image and text embeddings, typically 16 to 26,
higher is better. A score does not depend on the other images of the batch: there is no softmax. Weights:
yuvalkirstain/PickScore_v1, MIT according to its repository. Not checked against the released weights.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models import processors
from reward_models.images import to_uint8
from reward_models.lengths import Reader, reader
from reward_models.model_folders import loading, pinned
from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import check_on_grey_image, fingerprint, named, pretrained


class PickScore:
    """The scorer. `model` and `processor` are folders or hub ids of a transformers CLIP model and of its tokenizer and
    image processor. ValueError if they cannot be loaded."""

    names = ("score",)

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "cpu",
        batch: int = 64,
    ):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        with loading("pickscore", f"{model} with {processor}"):
            self.model = pretrained(CLIPModel, model, dtype=torch.float32).to(device)
            revision = pinned(processor, named(processor))
            self.image_processor = AutoImageProcessor.from_pretrained(processor, trust_remote_code=False, **revision)
            self.tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False, **revision)
        self.device, self.batch = device, batch
        self.card = Card(
            "pickscore",
            model=named(model),
            licence="MIT",
            size="224 px, shortest, bicubic, as its processor has it",
            checkpoint=fingerprint(self.model),
            settings={"processor": named(processor)},
        )
        with loading("pickscore", f"{model} with {processor}"):
            check_on_grey_image(self._score_batch)

    @property
    def length(self) -> int:
        """The most tokens of a text that the model reads."""
        return self.model.config.text_config.max_position_embeddings

    def readers(self) -> list[Reader]:
        return [reader("pickscore", self.tokenizer, self.length)]

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self._scores(
            self.image_processor(images=list(to_uint8(images)), return_tensors="pt").pixel_values, prompts
        )

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        return self._scores(processors.pixels(self.image_processor, images), prompts)

    def _scores(self, pixels: Float[Tensor, "N 3 h w"], prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        row = {text: i for i, text in enumerate(dict.fromkeys(p.text for p in prompts))}
        tokens = self.tokenizer(list(row), padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        text = self.model.get_text_features(
            input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
        ).pooler_output[[row[p.text] for p in prompts]]
        image = self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output
        return self.model.logit_scale.exp() * torch.cosine_similarity(image, text)[:, None]
