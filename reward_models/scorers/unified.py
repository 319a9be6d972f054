"""`unified`: UnifiedReward's pointwise scores, from 1 to 5, higher is better.

`version` 1 writes one line, "Final Score: x"; component `score`. `version` 2 writes three lines; components
`alignment`, `coherence`, `style`. A reply that lacks one of its scores is a failure. Roughly comparable across prompts.
The wording of the question is our own, the form of the reply is that of the models (arXiv 2503.05236). Licence: the
model's own. Not checked against the released models.
"""

from collections.abc import Sequence
from typing import Any

from reward_models.scoring import each
from reward_models.types import Images, ImageScores, Prompt, Scores
from reward_models.vlm import ask, replies, templates
from reward_models.vlm.scales import Scale

TITLES = {
    1: {"score": ("score", "final score")},
    2: {name: (name, f"{name} score") for name in ("alignment", "coherence", "style")},
}
SCALE = Scale(1, 5)


def read(text: str, version: int, cut: bool = False) -> dict[str, float]:
    """The scores in a reply, by component. ValueError if one is missing, given twice, or not from 1 to 5."""
    text = replies.answer(text, cut)
    return {name: replies.score_of(text, SCALE, titles, name) for name, titles in TITLES[version].items()}


class Unified:
    """The scorer. `model` is a folder or hub id, or with `url` its name on the server; `version` of the models, 1 or 2.
    `instruction`: a file that replaces ours. `asking`: see `ask.judge`. ValueError if the model is unavailable or a
    setting is invalid."""

    def __init__(
        self,
        model: str,
        url: str | None = None,
        version: int = 2,
        instruction: str | None = None,
        tokens: int = 512,
        **asking: Any,
    ):
        if version not in TITLES:
            raise ValueError(f"unified: version is 1 or 2, not {version!r}")
        self.version, self.tokens, self.names = version, tokens, tuple(TITLES[version])
        self.template = templates.Template.of("unified", f"unified_{version}", ("image", "prompt"), instruction)
        self.judge = ask.judge("unified", model, url, asking)
        settings = {"version": version, "instruction": self.template.source, "tokens": tokens}
        self.card = ask.card("unified", self.judge, SCALE.low, SCALE.high, settings)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, batch=max(1, len(images)))

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        questions = [
            self.template.fill(image=image, prompt=templates.quoted(prompt.text))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        answers = self.judge.ask(questions, self.tokens)
        return ask.parse_replies(
            self.names, answers, lambda i, reply: ImageScores(read(reply.text, self.version, reply.cut))
        )
