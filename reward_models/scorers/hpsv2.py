"""`hpsv2`: HPS v2.1 (arXiv 2306.09341), a CLIP model trained on human preferences between generated images.

One score per image, the cosine similarity of the image and text embeddings (without logit scale), in [-1, 1], typically
0.2 to 0.35, higher is better. The longer side is scaled to 224 px, the shorter is padded with black. Weights:
xswu/HPSv2, Apache-2.0. Not checked against the released weights.
"""

from reward_models.model_folders import loading
from reward_models.scorers.clip import Clip, described, opened
from reward_models.types import Card
from reward_models.weights import check_on_grey_image, fingerprint, located, named

FILE = "HPS_v2.1_compressed.pt"


def hpsv2(weights: str = "xswu/HPSv2", model: str = "ViT-H-14", device: str = "cpu", batch: int = 64) -> Clip:
    """The scorer. `weights` is a file, or a folder or hub repository that holds `HPS_v2.1_compressed.pt`; `model` is
    their architecture in open_clip. ValueError if the weights do not fit or cannot be loaded."""
    with loading("hpsv2", f"{weights} on {model}"):
        file = located(weights, FILE)
        loaded, tokenizer = opened(model, str(file), force_preprocess_cfg={"resize_mode": "longest"})
        card = Card(
            "hpsv2",
            model=named(weights),
            licence="Apache-2.0",
            low=-1,
            high=1,
            size=described(loaded),
            checkpoint=fingerprint(loaded),
        )
        scorer = Clip(loaded, tokenizer, card, "cosine", device, batch)
        check_on_grey_image(scorer._score_batch)
    return scorer
