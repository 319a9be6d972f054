"""`unified`: UnifiedReward's pointwise scores, from 1 to 5, higher is better.

`version` 1 writes one line, "Final Score: x"; component `score`. `version` 2 writes three; components `alignment`,
`coherence`, `style`. An aspect that is missing is NaN; a reply without any is a failure. Comparable across prompts,
roughly. The words of the question are ours, the form of the reply is the models' (arXiv 2503.05236). Licence: the
model's own. Not checked against the released models.
"""

import re
from collections.abc import Sequence
from typing import Any

from reward_models import ask, replies
from reward_models.scoring import each
from reward_models.types import Images, Prompt, Scores

LINES = {
    1: {"score": r"(?:final\s+)?score"},
    2: {"alignment": r"alignment(?:\s+score)?", "coherence": r"coherence(?:\s+score)?", "style": r"style(?:\s+score)?"},
}
LOW, HIGH = 1, 5
NUMBER = r"(-?\d+(?:\.\d+)?)\s*(?:/\s*(\d{1,9}))?"  # and what it is out of


def read(text: str, version: int) -> dict[str, float]:
    """The scores in a reply, by component. ValueError if there is none, one has two, or one is not from 1 to 5."""
    text = replies.answer(text)
    found: dict[str, float] = {}
    for name, title in LINES[version].items():
        line = rf"^[\s#*_>`-]*(?:\d+[.)]\s*)?{title}\s*(?:\([^)\n]*\))?[*_`\s]*[:=][*_`\s]*{NUMBER}"
        for value, out_of in re.findall(line, text, re.I | re.M):
            score = float(value[:20])
            if not LOW <= score <= HIGH or (out_of and int(out_of) != HIGH):
                raise ValueError(f"{name} is {value}{f' out of {out_of}' if out_of else ''}; the scale is 1 to 5")
            if found.get(name, score) != score:
                raise ValueError(f"{name} has two scores, {found[name]:g} and {score:g}")
            found[name] = score
    if not found:
        raise ValueError(f"no line gives {' or '.join(LINES[version])}")
    return found


class Unified:
    """The scorer. `model` is a folder or hub id, or with `url` the name a server gives it; `version` 1 or 2 of the
    models. `instruction`: a file in place of ours. `asking`: see `ask.judge`. ValueError if the model cannot be had or
    a setting is none of these."""

    def __init__(
        self,
        model: str,
        url: str | None = None,
        version: int = 2,
        instruction: str | None = None,
        tokens: int = 512,
        **asking: Any,
    ):
        if version not in LINES:
            raise ValueError(f"unified: version is 1 or 2, not {version!r}")
        self.version, self.tokens, self.names = version, tokens, tuple(LINES[version])
        self.template = ask.Template.of("unified", f"unified_{version}", ("image", "prompt"), instruction)
        self.judge = ask.judge("unified", model, url, asking)
        own = {"version": version, "instruction": self.template.source, "tokens": tokens}
        self.card = ask.card("unified", self.judge, LOW, HIGH, own)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._look, batch=max(1, len(images)))

    def _look(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        questions = [
            self.template.fill(image=image, prompt=ask.quoted(prompt.text))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        asked = self.judge.ask(questions, self.tokens)
        return ask.findings(self.names, asked, lambda i, reply: ask.Finding(read(reply.text, self.version)))
