"""`shapes_classifier`: how likely an image of the embedded world of shapes fits its caption, by a small convolutional
network that has learnt from the verifier `shapes` (`reward_models.classifier`). Unlike it, this scorer has gradients at
the pixels (`in_graph`). Components: `right`, the probability that all of the caption is there and nothing else, and
`logit`, its log-odds.

A prompt is read from its ground truth, without it from its text if that is a caption of the world. Images of another
size are resized to 32 x 32 pixels. The embedded weights, 0.3 MB, come from scripts/build_classifier.py; their card has
the figures. A policy that is trained against it finds its blind spots: watch `shapes`. Licence: Apache-2.0.
"""

from reward_models.classifier import Classes, Classifier
from reward_models.shapes_world import (
    COLOURS,
    GLYPHS,
    LARGE_MIN,
    MIN_OFFSET,
    SHAPES,
    SIDE,
    SMALL_MAX,
    WORDS,
    understood,
)

CLASSES = Classes(
    name="shapes_classifier",
    words=WORDS,
    kinds=(*SHAPES, *GLYPHS),
    attributes={"color": tuple(COLOURS)},
    most=5,
    side=SIDE,
    offset=MIN_OFFSET,
    understood=understood,
    small=SMALL_MAX,
    large=LARGE_MIN,
)


class ShapesClassifier(Classifier):
    """The scorer. `folder`: other weights than the embedded ones, ValueError if they cannot be loaded."""

    def __init__(self, folder: str = "", device: str = "cpu", batch: int = 64):
        super().__init__(CLASSES, folder, device, batch)
