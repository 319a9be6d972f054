"""`things_critic`: the verifier of the embedded world of things as a critic. It reports which things are missing,
surplus, wrongly tinted, in the wrong style or wrongly placed, and where, and writes a request that is easier to draw.

Components in [0, 1], comparable across prompts; all that apply are 1 exactly where `things.strict` is: `overall`
(`things.partial`), `objects`, `attributes` (tints and styles) and `relation`, as those of `shapes_critic`.

A prompt without ground truth is understood if it is a caption of the world. The revised request of two things makes
their relation explicit, the present one if one of them is already right, and changes nothing else; there is none for
other requests. A picture that fits the revised request fits the first one too. Licence: this project's own.
"""

from collections.abc import Sequence
from dataclasses import replace

from reward_models.scorers.things import find_things, judge
from reward_models.scoring import each
from reward_models.things_world import understood
from reward_models.types import Images, ImageScores, Prompt, Scores
from reward_models.verdicts import Blob, criticised, exact_card


class ThingsCritic:
    """The scorer. `grid` is the side of the region map."""

    names = ("overall", "objects", "attributes", "relation")

    def __init__(self, grid: int = 8):
        self.grid = grid
        self.card = exact_card("things_critic", grid)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        blobs_of, side = find_things(images.cpu().numpy()), min(images.shape[2:])
        rows = [self._score(prompt, blobs, side) for prompt, blobs in zip(prompts, blobs_of, strict=True)]
        return Scores.collect(self.names, rows, tuple(images.shape[2:]), self.grid)

    def _score(self, prompt: Prompt, blobs: list[Blob], side: int) -> ImageScores:
        prompt = prompt if "tag" in prompt.wants else replace(prompt, wants=understood(prompt.text))
        try:
            verdict = judge(prompt, blobs, side)
        except ValueError as error:
            return ImageScores(failure=str(error))
        return criticised(prompt, blobs, verdict, (), side)
