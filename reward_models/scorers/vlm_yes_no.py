"""`vlm_yes_no`: the log-odds that an image-text model answers yes, for each of several questions (VLM3D's reward).

One component per question, log p(yes) - log p(no) of the answer's first word, unbounded, higher is better. Where a
probability is stuck near 0 or 1 log-odds still tell two images apart. Scores of one question compare between images,
between prompts roughly. On a server both words must be among the likeliest it lists, or the score is missing. `vqa` is
the same as a probability. Licence: the model's own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reward_models.scoring import each
from reward_models.types import Images, Prompt, Scores
from reward_models.vlm import ask, templates, transformers_model as vlm

QUESTIONS = {
    "content": "Does this picture show what the request asks for, all of it and nothing that contradicts it?",
    "arrangement": "Are the things in this picture placed, counted and joined as the request says and as could be?",
}
REQUEST = "The request, as a JSON string: {prompt}\n"
WORDS = "{image}\n" + REQUEST + "{question} Answer with one word, {yes} or {no}."


class VlmYesNo:
    """The scorer. `model` is a folder or hub id, or with `url` the name a server gives it. `questions` by component;
    `{prompt}` in one of them is the request. `answers` are the words for yes and no. `asking`: see `ask.judge`.
    ValueError if the model cannot be had or does not tell the answers apart."""

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
        if not questions or not all(isinstance(own, str) and own.strip() for own in questions.values()):
            raise ValueError("vlm_yes_no: at least one question, with a name, is needed")
        self.names, self.answers = tuple(questions), tuple(answers)
        self.templates = []
        for question in questions.values():
            words = WORDS if "{prompt}" not in question else WORDS.replace(REQUEST, "")
            words = words.replace("{yes}", answers[0]).replace("{no}", answers[1]).replace("{question}", question)
            self.templates.append(templates.Template(words))
        self.judge = ask.judge("vlm_yes_no", model, url, asking)
        if isinstance(self.judge, ask.Local):
            vlm.openings(self.judge.processor.tokenizer, *self.answers)
        own = {"questions": dict(questions), "answers": list(answers), "words": WORDS}
        self.card = ask.card("vlm_yes_no", self.judge, -math.inf, math.inf, own)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._look, batch=max(1, len(images)))

    def _look(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        questions = [
            template.fill(image=image, prompt=templates.quoted(prompt.text))
            for image, prompt in zip(images, prompts, strict=True)
            for template in self.templates
        ]
        found = self.judge.odds(questions, self.answers)
        values, failures = torch.full((len(images), len(self.names)), torch.nan), {}
        for place, odds in enumerate(found):
            i, k = divmod(place, len(self.names))
            if isinstance(odds, str):
                failures.setdefault(i, f"{self.names[k]}: {odds}")
            else:
                values[i, k] = odds
        return Scores(self.names, values, failures=failures)
