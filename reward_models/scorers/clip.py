"""`clip`: how well an image fits its prompt's text, by a CLIP model (arXiv 2103.00020), run by open_clip.

One score per image, the cosine of its embedding and the text's, in [-1, 1], higher is better. Cosines of one model are
comparable between images of one prompt; between prompts only roughly, between models not at all. CLIP counts badly,
hardly sees relations, and can be fooled by textures no person would accept.

Images stay tensors: they are resized and normalised as the model's own preprocessing does it, in float32 instead of
through 8-bit pixels, and without leaving the device. Licence: the model's own; the embedded one is Apache-2.0.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import open_clip
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop

from reward_models.types import Images, Prompt, Scores

TINY = Path(__file__).parents[2] / "assets" / "tiny_clip"


def _named(model: str, pretrained: str | None) -> str:
    """The model as open_clip wants it named. ValueError if there is none such, before anything is loaded."""
    if Path(model).is_dir():
        return f"local-dir:{model}"
    if model.startswith(("local-dir:", "hf-hub:")):
        return model
    name = model.replace("/", "-")
    if name not in open_clip.list_models():
        near = get_close_matches(name, open_clip.list_models())
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ValueError(f"clip: {model!r} is neither a folder nor a model of open_clip{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained or "").is_file():
        asked = f"{pretrained!r} is neither a tag nor a file of weights" if pretrained else "`pretrained` is missing"
        raise ValueError(f"clip: {asked}; tags of {name}: {', '.join(tags) or 'none'}")
    return name


def resized(
    images: Images, size: tuple[int, int], mode: str, interpolation: str, fill: float = 0.0
) -> Float[Tensor, "N 3 h w"]:
    """Images of `size` (height, width), as open_clip's evaluation transform makes them: `mode` is `squash`, `shortest`
    (scale the shorter side, crop) or `longest` (scale the longer side, pad with `fill`). Sizes round as there."""
    high, wide = images.shape[2:]
    ratios = high / size[0], wide / size[1]
    if mode == "squash":
        scaled = size
    elif mode == "shortest" and size[0] == size[1]:
        scaled = (size[0], int(size[0] * wide / high)) if high <= wide else (int(size[0] * high / wide), size[0])
    else:
        ratio = max(ratios) if mode == "longest" else min(ratios)
        scaled = round(high / ratio), round(wide / ratio)
    if scaled != (high, wide):
        # an antialiased bicubic kernel overshoots; 8-bit pixels would clip here too
        images = F.interpolate(images, scaled, mode=interpolation, antialias=True).clamp(0, 1)
    return center_crop(images - fill, list(size)) + fill


class Clip:
    """The scorer. `model` is a folder in open_clip's `local-dir` layout or the name of one of its models, which also
    needs `pretrained`, a tag or a file of weights; without a model, the embedded tiny one. `batch` is how many images
    or texts are encoded at once. ValueError if the model cannot be had."""

    names = ("cosine",)

    def __init__(self, model: str | None = None, pretrained: str | None = None, device: str = "cpu", batch: int = 64):
        if model is None and not TINY.is_dir():
            raise ValueError(f"clip: the embedded model is not at {TINY}; build it with scripts/build_tiny_clip.py")
        name = _named(str(model or TINY), pretrained)
        try:
            self.model = open_clip.create_model(name, pretrained, device=device, require_pretrained=True).eval()
            self.tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"clip: {name} could not be loaded: {' '.join(str(error).split())}") from error
        self.device, self.batch = device, batch
        shown = Path(model).name if model and Path(model).is_dir() else " ".join(filter(None, (model, pretrained)))
        licence = "the model's own licence" if model else "Apache-2.0"
        self.about = f"clip: {shown or TINY.name}, cosine in [-1, 1], higher is better; {licence}"

    def _prepared(self, images: Images) -> Float[Tensor, "N 3 h w"]:
        config = open_clip.get_model_preprocess_cfg(self.model)
        size = config["size"] if isinstance(config["size"], (tuple, list)) else [config["size"]] * 2
        mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"  # "random" means bicubic here
        images = images.to(self.device, torch.float32)
        images = resized(images, tuple(size), config["resize_mode"], mode, config["fill_color"] / 255)
        mean, std = (torch.tensor(config[key], device=self.device)[:, None, None] for key in ("mean", "std"))
        return (images - mean) / std

    @torch.no_grad()
    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        row = {text: i for i, text in enumerate(dict.fromkeys(p.text for p in prompts))}
        said = self._texts(list(row))[[row[p.text] for p in prompts]]
        cosines = [
            (self.model.encode_image(self._prepared(part), normalize=True) * text).sum(-1)
            for part, text in zip(images.split(self.batch), said.split(self.batch), strict=True)
        ]
        values = torch.cat(cosines).float().cpu()
        failures = {int(i): "the image's embedding is not finite" for i in (~values.isfinite()).nonzero()[:, 0]}
        return Scores(self.names, values.where(values.isfinite(), torch.nan)[:, None], failures=failures)

    def _texts(self, texts: list[str]) -> Float[Tensor, "M D"]:
        parts = [texts[i : i + self.batch] for i in range(0, len(texts), self.batch)]
        return torch.cat([self.model.encode_text(self.tokenizer(p).to(self.device), normalize=True) for p in parts])
