"""`things_classifier`: how likely an image of the embedded world of things fits its caption, by a small convolutional
network that has learnt from the verifier `things` (`reward_models.classifier`). Unlike it, this scorer has gradients at
the pixels (`in_graph`). Components: `right`, the probability that all of the caption is there and nothing else, and
`logit`, its log-odds.

A prompt is read from its ground truth, without it from its text if that is a caption of the world. Images of another
size are resized to 64 x 64 pixels. The embedded weights come from scripts/build_classifier.py; their card has the
figures. A policy that is trained against it finds its blind spots: watch `things`. Licence: Apache-2.0.
"""

from reward_models.classifier import Classes, Classifier
from reward_models.things_world import MIN_OFFSET, NOUNS, SIDE, WORDS, understood

CLASSES = Classes(
    name="things_classifier",
    words=WORDS,
    kinds=NOUNS,
    attributes=WORDS.values,
    most=4,
    side=SIDE,
    offset=MIN_OFFSET,
    understood=understood,
    length=20.0,
    width=96,
    blocks=3,
    pooled=256,
)


class ThingsClassifier(Classifier):
    """The scorer. `folder`: other weights than the embedded ones, ValueError if they cannot be loaded."""

    def __init__(self, folder: str = "", device: str = "cpu", batch: int = 64):
        super().__init__(CLASSES, folder, device, batch)
