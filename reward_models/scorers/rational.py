"""`rational`: a critique of several aspects before each score, and a refined request (after RationalRewards).

Each aspect has a score from 1 to 4, or N/A. Components, in [0, 1], higher is better:

- `overall`: (mean - 1) / 3 over the aspects that apply. If the request contains text, the mean is over one more aspect;
  so it compares images of one prompt, not prompts.
- `faithfulness`, `quality`, `text`, and for edits `preservation`: (score - 1) / 3; `text` is NaN if the judge writes
  N/A.

An aspect without a readable score fails the image, because the mean of the others would be a different quantity.

The critique is in `Scores.critiques`, the refined request in `Scores.requests`. For an edit, `Prompt.wants["source"]`
is the file of the original picture. The instructions are ours (`reward_models/vlm/instructions/rational*.txt`); the
form of the reply is that of RationalRewards, whose models write it without an instruction. In their released test-time
script the score comes before the justification; here it comes after. Licence: the model's own. Not checked against the
released models.
"""

from collections.abc import Sequence
from typing import Any

from reward_models.scoring import each
from reward_models.types import Images, ImageScores, Prompt, Scores
from reward_models.vlm import ask, critiques, templates, types

ASPECTS = {
    "faithfulness": ("text faithfulness", "prompt faithfulness", "text alignment", "instruction following"),
    "preservation": ("image faithfulness", "image preservation"),
    "quality": ("physical and visual quality", "physical visual quality", "physical quality", "visual quality"),
    "text": ("text rendering", "text quality"),
}
OPTIONAL = ("text",)
TASKS = {"image": ("faithfulness", "quality", "text"), "edit": tuple(ASPECTS)}
FORMS = ("headings", "json")


def schema(aspects: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of a reply: for each aspect the justification, then the score."""
    aspect = {
        "type": "object",
        "properties": {"justification": {"type": "string"}, "score": {"type": ["number", "null"]}},
        "required": ["justification", "score"],
        "additionalProperties": False,
    }
    properties = {
        "analysis": {"type": "string"},
        **dict.fromkeys(aspects, aspect),
        "refined_request": {"type": "string"},
    }
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def instructions(task: str, form: str, file: str | None = None) -> tuple[templates.Template, str]:
    """The question, ours or that of a file, and the form of the reply, which is filled in as `reply`. ValueError for a
    file that cannot be used."""
    needed = ("image", "prompt", *(["source"] if task == "edit" else []))
    name = "rational_edit" if task == "edit" else "rational"
    question = templates.Template.of("rational", name, needed, file)
    return question, templates.Template.of("rational", f"{name}_{form}", ()).source


class Rational:
    """The scorer. `model` is a folder or hub id, or with `url` its name on the server. `task`: "image" or "edit".
    `form` of the reply: "headings", or "json", which a server can enforce. `instruction`: a file that replaces ours.
    `tokens`: the longest reply. `asking`: see `ask.judge`. ValueError if the model is unavailable or a setting is
    invalid."""

    def __init__(
        self,
        model: str,
        url: str | None = None,
        task: str = "image",
        form: str = "headings",
        instruction: str | None = None,
        tokens: int = 2048,
        **asking: Any,
    ):
        for setting, value, known in (("task", task, TASKS), ("form", form, FORMS)):
            if value not in known:
                raise ValueError(f"rational: {setting} is one of {', '.join(known)}, not {value!r}")
        self.aspects = {name: ASPECTS[name] for name in TASKS[task]}
        self.names = ("overall", *self.aspects)
        self.template, self.reply = instructions(task, form, instruction)
        self.task, self.schema, self.tokens = task, schema(TASKS[task]) if form == "json" else None, tokens
        self.judge = ask.judge("rational", model, url, asking)
        settings = {
            "task": task,
            "form": form,
            "instruction": self.template.source,
            "reply": self.reply,
            "tokens": tokens,
        }
        self.card = ask.card("rational", self.judge, 0, 1, settings)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, batch=max(1, len(images)))

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        pairs = [*zip(images, prompts, strict=True)]
        answers = ask.ask_all(self.judge, pairs, self._question, self.tokens, self.schema)
        return ask.parse_replies(self.names, answers, lambda i, reply: self._parse(reply, prompts[i].text))

    def _question(self, pair: tuple[Any, Prompt]) -> types.Question:
        image, prompt = pair
        given = {"image": image, "prompt": templates.quoted(prompt.text), "reply": self.reply}
        if self.task == "edit":
            given["source"] = ask.picture_of(prompt, "source")
        return self.template.fill(**given)

    def _parse(self, reply: types.Reply, prompt: str) -> ImageScores:
        critique = critiques.read(reply.text, self.aspects, reply.cut)
        for name, score in critique.scores.items():
            if score is None and name not in OPTIONAL:
                raise ValueError(f"the score of {name} is N/A, but it applies to every image")
        low, span = critiques.SCALE.low, critiques.SCALE.high - critiques.SCALE.low
        values = {name: (score - low) / span for name, score in critique.scores.items() if score is not None}
        request = "" if critique.request == prompt else critique.request
        return ImageScores({"overall": critique.overall, **values}, str(critique), request)
