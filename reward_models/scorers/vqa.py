"""`vqa`: the probability that the answer to a question about the image is yes (VQAScore, arXiv 2404.01291), by any
image-text model of transformers.

One score per image, p(yes) / (p(yes) + p(no)) of the next word after the question, in [0, 1], higher is better. Scores
of one question are comparable between images, between prompts roughly: some are easier to say yes to. The question is
ours; models differ in how well they answer it. Licence: the model's own. Not checked against published scores.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from reward_models.scoring import each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.vlm import transformers_model as vlm
from reward_models.weights import fingerprint, named

QUESTION = 'Is "{prompt}" a true and complete description of this image? Answer with one word, yes or no.'


class Vqa:
    """The scorer. `model` is a folder or hub id; `question` holds `{prompt}`, or asks the same of every image;
    `answers` are the words for yes and no. `dtype` float32, bfloat16 or float16. ValueError if the model cannot be had
    or does not tell the answers apart."""

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
            self.yes, self.no = vlm.openings(self.processor.tokenizer, *answers)
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
            size="as the model's processor has it",
            checkpoint=fingerprint(self.model),
            settings={"question": question, "answers": list(answers), "dtype": dtype},
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._look, self.batch)

    def _look(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        questions = [self.question.replace("{prompt}", prompt.text) for prompt in prompts]
        inputs = vlm.asked(self.processor, vlm.about(images, questions), self.device)
        return vlm.log_odds(self.model, inputs, self.yes, self.no).sigmoid()[:, None]
