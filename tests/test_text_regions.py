"""Words that an OCR engine reads in rendered pages, on their way into region preferences."""

from functools import partial

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from mmalign.learn.update import update
from mmalign.objectives import rgdpo
from mmalign.objectives.objective import Finished
from mmalign.policy.gaussian import GaussianFlow
from mmalign.rewards import judge, regions
from mmalign.training.microbatch import AdaptiveBatch
from reward_models import Prompt, load
from reward_models.images import from_pil

SIDE, GRID = 256, 32
PLACES = ((30, 50), (60, 170))  # left and top of the two words in px


def page(*words: str) -> torch.Tensor:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    for word, place in zip(words, PLACES, strict=True):
        ImageDraw.Draw(image).text(place, word, fill="black", font=ImageFont.load_default(size=36))
    return from_pil([image])


@pytest.fixture(scope="module")
def pages():
    return torch.cat([page("COFFEE", "MARKET"), page("COFFEE", "MAXXXT"), page("COFFEE", "MARKET"), page("", "MARKET")])


@pytest.fixture(scope="module")
def scored(pages):
    prompts = [Prompt('a sign that says "Coffee market"', {}, 3)] * len(pages)
    scores = judge.score(pages, prompts, {"ocr": load("ocr")})
    assert not scores.failures
    return scores


def test_the_words_read_are_the_regions(scored):
    right, misspelt, _, missing = scored.boxes["ocr"]
    assert [(region.label, region.credit) for region in right] == [("1 coffee", 1), ("2 market", 1)]
    assert misspelt[0].credit == 1
    assert misspelt[1].label == "2 market"
    assert misspelt[1].credit < 0.5
    assert [region.label for region in missing] == ["2 market"]
    for region, (left, top) in zip(right, PLACES, strict=True):
        assert region.box[0] - 8 < left < region.box[2]
        assert region.box[1] - 8 < top < region.box[3]


def test_they_drive_the_preference_of_the_misspelt_word_and_of_nothing_else(pages, scored):
    marks = regions.marked(scored.boxes["ocr"], [0] * 4, (SIDE, SIDE), (GRID, GRID))
    x = F.avg_pool2d(pages, SIDE // GRID)
    finished = Finished(x, torch.zeros(4, dtype=torch.long), scored.parts["ocr.match"], scored.maps["ocr"], marks)
    flow = GaussianFlow((3, GRID, GRID))
    batch = rgdpo.pairs(flow, finished, 8, torch.Generator().manual_seed(0))
    pair = rgdpo.matched(finished.prompt, finished.reward, marks)
    assert 1 in pair.flatten().tolist()  # the misspelt page has a partner that is right
    replay = partial(rgdpo.Rgdpo(scale=20.0, intra=0.0).replay, flow, flow.encode(["0.0"]))
    for _ in range(20):
        update(
            flow.parameters(), torch.optim.SGD(flow.parameters(), 5.0), batch,
            replay, epochs=1, minibatches=1, micro_batch=AdaptiveBatch(8),
            max_grad_norm=1e9, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    moved = flow.shift.detach()
    word = (marks.share[:, marks.named[0].nonzero()[1, 0]] > 0).any(0)  # wherever any page has it
    assert moved[:, word].abs().max() > 1e-3
    assert moved[:, ~word].abs().max() == 0
    towards = (moved * (x[0] - x[1]))[:, word].sum()
    assert towards > 0
