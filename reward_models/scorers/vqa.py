"""`vqa`: the probability that the answer to a question about the image is yes (VQAScore, arXiv 2404.01291), from any
vision-language model of transformers.

One score per image, p(yes) / (p(yes) + p(no)) of the next word after the question, in [0, 1], higher is better. Scores
of one question are comparable between images, and roughly between prompts, because some are easier to affirm. The
question is our own; models differ in how well they answer it. Licence: the model's own. Not checked against published
scores.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.vlm import transformers_model as vlm
from reward_models.weights import fingerprint, named

QUESTION = 'Is "{prompt}" a true and complete description of this image? Answer with one word, yes or no.'


class Vqa:
    """The scorer. `model` is a folder or hub id; `question` contains `{prompt}`, or is the same for every image;
    `answers` are the words for yes and no. `dtype`: float32, bfloat16 or float16. ValueError if the model is
    unavailable or its tokens do not distinguish the answers."""

    names = ("yes",)

    def __init__(
        self,
        model: str,
        question: str = QUESTION,
        answers: Sequence[str] = ("Yes", "No"),
        device: str = "cpu",
        dtype: str = "float32",
        batch: int = 8,
    ):
        if len(answers) != 2:
            raise ValueError(f"vqa: answers are two words, for yes and for no, got {list(answers)}")
        self.model, self.processor = vlm.load("vqa", model, device, dtype)
        try:
            self.yes, self.no = vlm.first_tokens(self.processor.tokenizer, *answers)
        except ValueError as error:
            raise ValueError(f"vqa: {error}") from None
        self.question, self.device, self.batch = question, device, batch
        self.card = Card(
            "vqa",
            model=named(model),
            licence="the model's own",
            low=0,
            high=1,
            sees_prompt="{prompt}" in question,
            size="resized by the model's processor",
            checkpoint=fingerprint(self.model),
            settings={"question": question, "answers": list(answers), "dtype": dtype},
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self._scores(images, prompts, exact=False)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        return self._scores(images, prompts, exact=True)

    def _scores(self, images: Images, prompts: Sequence[Prompt], exact: bool) -> Float[Tensor, "N K"]:
        questions = [self.question.replace("{prompt}", prompt.text) for prompt in prompts]
        inputs = vlm.inputs_of(self.processor, vlm.image_questions(images, questions), self.device, exact=exact)
        return vlm.log_odds(self.model, inputs, self.yes, self.no).sigmoid()[:, None]
