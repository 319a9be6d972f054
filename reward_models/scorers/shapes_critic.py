"""`shapes_critic`: the verifier of the embedded world as a critic. It reports which objects are missing, surplus,
wrongly coloured or wrongly placed, and where, and writes a request that is easier to draw, in the vocabulary of the
embedded model.

Components in [0, 1], comparable across prompts; all that apply are 1 exactly where `shapes.strict` is:

- `overall`: `shapes.partial`.
- `objects`: the share of the requested objects that are present, times requested / present if there are too many.
- `attributes`: the share of the requested colours and sizes that are right. NaN if none was requested.
- `relation`: whether it holds, NaN if none was requested. `text`: the share of letters that are right, NaN likewise.

A prompt without ground truth is understood if it is a caption of the world. The revised request makes explicit what the
first left open, and changes nothing else: a colour for an object without one (the colour of the object if it is already
right, else an unused one), and for two objects their relation (the present one if an object is already right). A
picture that fits the revised request fits the first one too. Licence: this project's own.
"""

from collections.abc import Sequence
from dataclasses import replace

from reward_models.scorers.shapes import find_blobs, judge
from reward_models.scoring import each
from reward_models.shapes_world import COLOURS, SIDE, understood
from reward_models.types import Images, ImageScores, Prompt, Scores
from reward_models.verdicts import Blob, criticised, exact_card


class ShapesCritic:
    """The scorer. `grid` is the side of the region map."""

    names = ("overall", "objects", "attributes", "relation", "text")

    def __init__(self, grid: int = 8):
        self.grid = grid
        self.card = exact_card("shapes_critic", grid)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        rows = [self._score(*pair) for pair in zip(prompts, find_blobs(images.cpu().numpy()), strict=True)]
        return Scores.collect(self.names, rows, tuple(images.shape[2:]), self.grid)

    def _score(self, prompt: Prompt, blobs: list[Blob]) -> ImageScores:
        prompt = prompt if "tag" in prompt.wants else replace(prompt, wants=understood(prompt.text))
        try:
            verdict = judge(prompt, blobs)
        except ValueError as error:
            return ImageScores(failure=str(error))
        return criticised(prompt, blobs, verdict, COLOURS, SIDE)
