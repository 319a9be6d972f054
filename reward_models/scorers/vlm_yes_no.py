"""`vlm_yes_no`: the log-odds that a vision-language model answers yes, for each of several questions (VLM3D's reward).

One component per question, log p(yes) - log p(no) of the answer's first word, unbounded, higher is better. Log-odds
still distinguish two images when the probability is close to 0 or 1. Scores of one question are comparable between
images, and roughly between prompts. On a server both words must be among the listed top words, or the score is missing.
A model in this process has gradients (`in_graph`), a server has none. `vqa` gives the same as a probability. Licence:
the model's own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.scoring import check, each
from reward_models.types import Images, Prompt, Scores
from reward_models.vlm import ask, templates, transformers_model as vlm
from reward_models.vlm.types import Question

QUESTIONS = {
    "content": "Does this picture show what the request asks for, all of it and nothing that contradicts it?",
    "arrangement": "Are the number and position of the objects in this picture plausible and as the request says?",
}
REQUEST = "The request, as a JSON string: {prompt}\n"
WORDS = "{image}\n" + REQUEST + "{question} Answer with one word, {yes} or {no}."


class VlmYesNo:
    """The scorer. `model` is a folder or hub id, or with `url` its name on the server. `questions` by component;
    `{prompt}` in a question is replaced by the request. `answers` are the words for yes and no. `asking`: see
    `ask.judge`. ValueError if the model is unavailable or its tokens do not distinguish the answers."""

    def __init__(
        self,
        model: str,
        url: str | None = None,
        questions: Mapping[str, str] = QUESTIONS,
        answers: Sequence[str] = ("Yes", "No"),
        **asking: Any,
    ):
        if len(answers) != 2 or answers[0].lower() == answers[1].lower():
            raise ValueError(f"vlm_yes_no: answers are two words, for yes and for no, got {list(answers)}")
        if not questions or not all(isinstance(question, str) and question.strip() for question in questions.values()):
            raise ValueError("vlm_yes_no: at least one question, with a name, is needed")
        self.names, self.answers = tuple(questions), tuple(answers)
        self.templates = []
        for question in questions.values():
            words = WORDS if "{prompt}" not in question else WORDS.replace(REQUEST, "")
            words = words.replace("{yes}", answers[0]).replace("{no}", answers[1]).replace("{question}", question)
            self.templates.append(templates.Template(words))
        self.judge = ask.judge("vlm_yes_no", model, url, asking)
        if isinstance(self.judge, ask.Local):
            vlm.first_tokens(self.judge.processor.tokenizer, *self.answers)
            self.in_graph = self._in_graph  # a server has no gradients
        settings = {"questions": dict(questions), "answers": list(answers), "words": WORDS}
        self.card = ask.card("vlm_yes_no", self.judge, -math.inf, math.inf, settings)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, batch=max(1, len(images)))

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        questions = self._questions(images, prompts)
        values, failures = torch.full((len(images), len(self.names)), torch.nan), {}
        for number, odds in enumerate(self.judge.odds(questions, self.answers)):
            i, k = divmod(number, len(self.names))
            if isinstance(odds, str):
                failures.setdefault(i, f"{self.names[k]}: {odds}")
            else:
                values[i, k] = odds
        return Scores(self.names, values, failures=failures)

    def _in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        odds = self.judge.odds_in_graph(self._questions(images, prompts), self.answers)
        return odds.unflatten(0, (len(images), len(self.names)))

    def _questions(self, images: Images, prompts: Sequence[Prompt]) -> list[Question]:
        """The questions about each image, one after another."""
        return [
            template.fill(image=image, prompt=templates.quoted(prompt.text))
            for image, prompt in zip(images, prompts, strict=True)
            for template in self.templates
        ]
