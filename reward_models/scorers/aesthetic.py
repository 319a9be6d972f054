"""`aesthetic`: LAION's aesthetic predictor (version 2, "improved"), linear layers on a CLIP image embedding, trained on
people's ratings of pictures.

One score per image on the raters' scale of 1 to 10, typically 5 to 7, higher is better. It ignores the prompt. It
prefers painterly light and single subjects, and a policy trained on it alone drifts towards them. Weights:
`sac+logos+ava1-l14-linearMSE.pth` of the GitHub repository christophschuhmann/improved-aesthetic-predictor (a file that
is not on the hub), on openai/clip-vit-large-patch14; Apache-2.0 and MIT as stated there. Not checked against the
released weights.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reward_models import processors
from reward_models.images import to_uint8
from reward_models.model_folders import loading, pinned
from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import check_on_grey_image, fingerprint, linear_chain, located, named, pretrained, read

FILE = "sac+logos+ava1-l14-linearMSE.pth"
SOURCE = "the GitHub repository christophschuhmann/improved-aesthetic-predictor"


class Aesthetic:
    """The scorer. `head` is the file of the predictor's weights, or a folder or hub repository that holds it under its
    name; `model` is the folder or hub id of a CLIP model of transformers. ValueError if they cannot be loaded or do not
    fit each other."""

    names = ("rating",)

    def __init__(
        self, head: str = "", model: str = "openai/clip-vit-large-patch14", device: str = "cpu", batch: int = 64
    ):
        from transformers import AutoImageProcessor, CLIPModel

        if not head:
            raise ValueError(f"aesthetic: head: the predictor's weights are needed, {FILE} of {SOURCE}; give that file")
        with loading("aesthetic", f"{head} on {model}"):
            self.model = pretrained(CLIPModel, model, dtype=torch.float32).to(device)
            self.image_processor = AutoImageProcessor.from_pretrained(
                model, trust_remote_code=False, **pinned(model, named(model))
            )
            self.head = linear_chain(read(located(head, FILE))).to(device)
            if self.head[0].in_features != self.model.config.projection_dim:
                raise ValueError(
                    f"the head takes {self.head[0].in_features} numbers, the model gives"
                    f" {self.model.config.projection_dim}"
                )
        self.device, self.batch = device, batch
        self.card = Card(
            "aesthetic",
            model=f"{named(head)} on {named(model)}",
            licence="Apache-2.0 (head), MIT (CLIP)",
            comparable_across_prompts=True,
            sees_prompt=False,
            size="224 px, shortest, bicubic, as its processor has it",
            checkpoint=fingerprint(self.model, self.head),
        )
        with loading("aesthetic", f"{head} on {model}"):
            check_on_grey_image(self._score_batch)

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
        embedding = self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output
        return self.head(F.normalize(embedding, dim=-1))
