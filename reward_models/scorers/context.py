"""`context`: how well an image fits a description of its context, by a BLIP-2 image-text model. Hummingbird's rewards.

The description is the text `Prompt.wants["context"]`. Where there is none it is the prompt, or with `judge` what a
vision-language model writes once for the prompt and, if the ground truth names one, the reference picture, the file
`wants["reference"]`, or else `wants["source"]`. The file `written` keeps these descriptions; they do not change, so
that all processes, and a run that is resumed, have the same. A prompt for which none could be written fails its images.
Components, comparable within a prompt:

- `global`: the highest cosine between the embedding of a query token of the Q-Former (arXiv 2301.12597), which has seen
  the image, and that of the description's first token, in [-1, 1].
- `fine`: the probability that image and description match, by the matching head on query tokens that see both, in
  [0, 1].

Both are those of `Blip2ForImageTextRetrieval` of transformers, with one pass of the image encoder, and have gradients.
Hummingbird sums them, with weights that we do not know, for images that keep what a description says of a reference
picture and differ from it otherwise: watch `likeness` for the second half. Whether its `fine` is the probability or the
logit is not known either, nor are the instructions of its multimodal model, which writes descriptions; ours are in
`reward_models/vlm/instructions/context_write.txt`. Images are squashed to the model's size like by its processor, in
float32 instead of 8-bit pixels. Weights: Salesforce/blip2-itm-vit-g, MIT according to its repository. Not checked
against the released weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from reward_models.files import home
from reward_models.images import named_picture, resized
from reward_models.lengths import Reader, reader
from reward_models.model_folders import loading, pinned
from reward_models.scorers.likeness import KEYS
from reward_models.scoring import check, each, merged
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.vlm import ask, replies, templates
from reward_models.vlm.types import Judge, Reply
from reward_models.vlm.written import Subject, Written
from reward_models.weights import check_on_grey_image, fingerprint, named, pretrained

WORDS = 5 / 8  # of a description, for each token that is read


class Context:
    """The scorer. `model` is a folder or hub id of a `Blip2ForImageTextRetrieval` with its image processor and
    tokenizer. `tokens`: the most that are read; a longer prompt is truncated, a longer context or description fails its
    image.

    `judge`: {"model": a folder or hub id, or with "url" its name on the server, and the settings of `ask.judge`}.
    `written`: the JSONL file of its descriptions, read and extended. `writing`: a file that replaces our instructions.
    `reply_tokens`: its longest reply. ValueError if a model cannot be loaded or a setting is invalid."""

    names = ("global", "fine")

    def __init__(
        self,
        model: str = "Salesforce/blip2-itm-vit-g",
        tokens: int = 128,
        device: str = "cpu",
        batch: int = 16,
        judge: Mapping[str, Any] | None = None,
        written: str | None = None,
        writing: str | None = None,
        reply_tokens: int = 1024,
    ):
        from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForImageTextRetrieval

        if judge is None and (written or writing):
            raise ValueError(f"context: {'written' if written else 'writing'} goes with a judge")
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
        self.texts: dict[tuple[str, str], str] = {}
        self.judge: Judge | None = None
        with loading("context", model):
            check_on_grey_image(self._score_batch)
        asking = {} if judge is None else self._let(judge, written, writing, reply_tokens)
        self.card = Card(
            "context",
            model=named(model),
            licence="the model's own",
            low=-1,
            high=1,
            size=f"{self.side} px, squash, bicubic",
            checkpoint=fingerprint(self.model),
            settings={"tokens": tokens, **asking},
        )

    def _let(self, judge: Mapping[str, Any], written: str | None, writing: str | None, most: int) -> dict[str, Any]:
        """Let a judge write descriptions. What of it changes a score, for the card."""
        asking = dict(judge) if isinstance(judge, Mapping) else {}
        name = asking.pop("model", None)
        if not isinstance(name, str):
            raise ValueError(f"context: judge: {{model: NAME, ...}} is needed, got {str(judge)[:80]!r}")
        if not written:
            raise ValueError("context: a judge needs `written`, the file that keeps its descriptions")
        self.template = templates.Template.of("context", "context_write", ("prompt", "reference"), writing)
        self.reply_tokens = most
        self.written: Written[str] = Written("context", "description", written, self._parse, self._checked, str)
        self.judge = ask.judge("context: judge", home(name), asking.pop("url", None), asking)
        return {"judge": dict(self.judge.about), "writing": self.template.source, "reply_tokens": most}

    def readers(self) -> list[Reader]:
        return [reader("context", self.tokenizer, self.tokens)]

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        texts = self.descriptions(prompts)
        failures = {i: str(text) for i, text in enumerate(texts) if isinstance(text, ValueError)}
        rows = [i for i in range(len(images)) if i not in failures]
        scores = each(images[rows], [prompts[i] for i in rows], self.names, self._score_batch, self.batch)
        return merged(len(images), self.names, [(rows, scores)], failures)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        return self.in_graph(images, prompts)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        texts = self.descriptions(prompts)
        for text in texts:
            if isinstance(text, ValueError):
                raise text
        pixels = resized(images.to(self.device, torch.float32), (self.side, self.side), "squash", "bicubic")
        words = self.tokenizer(texts, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        ids, mask = words.input_ids.to(self.device), words.attention_mask.to(self.device)
        features = self.model.vision_model(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        queries = self.model.query_tokens.expand(len(images), -1, -1)
        return torch.stack([self._global(features, queries, ids, mask), self._fine(features, queries, ids, mask)], 1)

    def descriptions(self, prompts: Sequence[Prompt]) -> list[str | ValueError]:
        """The text that each image is compared with, or the reason why there is none. The judge is asked once for the
        prompts whose description is not known."""
        texts = [self._given(prompt) for prompt in prompts]
        missing = [i for i, text in enumerate(texts) if isinstance(text, Subject)]
        new = self.written.of([texts[i] for i in missing], self._write) if missing else []
        for i, text in zip(missing, new, strict=True):
            texts[i] = text
            if isinstance(text, str):
                self.texts[_place(prompts[i])] = text
        return texts

    def _given(self, prompt: Prompt) -> str | Subject | ValueError:
        """A description that is known already, or what the judge is to describe, or why it cannot."""
        try:
            if "context" in prompt.wants:
                return self._checked(prompt.wants["context"])
            if self.judge is None:
                return prompt.text
            if (text := self.texts.get(_place(prompt))) is not None:
                return text
            named = any(key in prompt.wants for key in KEYS)
            return Subject(prompt.text, named_picture(prompt, KEYS)[0] if named else None)
        except ValueError as error:
            return error

    def _checked(self, text: Any) -> str:
        """The text. ValueError if it is none, or too long."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"context {str(text)[:60]!r}: a description in words is needed")
        if self.readers()[0].cuts(text):
            raise ValueError(f"context {text[:60]!r}...: it is longer than the {self.tokens} tokens that are read")
        return text

    def _write(self, subjects: Sequence[Subject]) -> list[Reply]:
        given = {"words": str(int(self.tokens * WORDS))}
        questions = [
            self.template.fill(
                **given,
                prompt=templates.quoted(subject.text),
                reference="none" if subject.picture is None else subject.picture,
            )
            for subject in subjects
        ]
        return self.judge.ask(questions, self.reply_tokens)

    def _parse(self, reply: Reply) -> str:
        if reply.cut:
            raise ValueError(f"the reply is longer than {self.reply_tokens} tokens")
        text = replies.printable(" ".join(replies.answer(reply.text).split()))
        if not text:
            raise ValueError("the reply is empty")
        return self._checked(text)

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


def _place(prompt: Prompt) -> tuple[str, str]:
    """The text and the file of the picture, "" without one."""
    return prompt.text, next((prompt.wants[key] for key in KEYS if isinstance(prompt.wants.get(key), str)), "")
