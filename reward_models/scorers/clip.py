"""`clip`: how well an image fits its prompt's text, by a CLIP model (arXiv 2103.00020), run by open_clip.

One score per image, the cosine of its embedding and the text's, in [-1, 1], higher is better. Cosines of one model are
comparable between images of one prompt; between prompts only roughly, between models not at all. CLIP counts badly,
hardly sees relations, and can be fooled by textures no person would accept.

Images stay tensors: they are resized and normalised as the model's own preprocessing does it, in float32 instead of
through 8-bit pixels, and without leaving the device. Licence: the model's own; the embedded one is Apache-2.0.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_models import files, limits, model_folders
from reward_models.images import resized
from reward_models.lengths import Reader
from reward_models.model_folders import loading
from reward_models.scoring import each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import check_on_grey_image, fingerprint, named

INTERPOLATIONS = ("bicubic", "bilinear", "random")
RESIZE_MODES = ("shortest", "longest", "squash")
TINY = Path(__file__).parents[2] / "assets" / "tiny_clip"


def _known(model: str, pretrained: str | None) -> str:
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


def opened(name: str, pretrained: str | None = None, **settings: Any) -> tuple[nn.Module, Callable]:
    """A model of open_clip with its weights, and its tokenizer. What a folder or hub repository says of itself is
    looked at first (`reward_models.model_folders`), and so is the text model of the hub that it may name."""
    kind, colon, place = name.partition(":")
    if colon:
        folder = model_folders.configs(place, named(place))
        config = files.parsed(files.text(folder / "open_clip_config.json", limits.CONFIG))
        model = config.get("model_cfg")
        text, vision = (model.get(key) if isinstance(model, dict) else None for key in ("text_cfg", "vision_cfg"))
        if not isinstance(text, dict) or not isinstance(vision, dict):
            raise ValueError("open_clip_config.json describes no text_cfg and vision_cfg in a model_cfg")
        names = [text.get("hf_model_name"), kind == "hf-hub" and text.get("hf_tokenizer_name")]
        for other in filter(None, names):
            if not isinstance(other, str) or Path(other).exists():
                raise ValueError(f"hf_model_name: {other!r} is no model of the hub")
            model_folders.configs(other, other)
        if kind == "local-dir" and not text.get("hf_model_name") and not vision.get("timm_model_name"):
            with torch.device("meta"), _hushed():
                empty = open_clip.create_model(name, load_weights=False, device="meta")
            model_folders.check_size(model_folders.counted(empty), place, named(place))
    with _hushed():
        loaded = open_clip.create_model(name, pretrained, require_pretrained=True, **settings)
        return loaded, open_clip.get_tokenizer(name)


@contextmanager
def _hushed() -> Iterator[None]:
    """Without open_clip's warnings, which it gives by the root logger: what is wrong it raises as well."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_preprocessing(config: dict[str, Any]) -> None:
    """ValueError for a setting of the images that a model is shown that none can be made by."""
    sides = config["size"] if isinstance(config["size"], (tuple, list)) else [config["size"]] * 2
    numbers = {"mean": config["mean"], "std": config["std"], "fill_color": [config["fill_color"]] * 3}
    for name, three in numbers.items():
        if not isinstance(three, (tuple, list)) or [type(own) in (int, float) for own in three] != [True] * 3:
            raise ValueError(f"preprocess_cfg: {name} {str(three)[:60]} is not one number for each colour")
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= limits.SIDE for side in sides):
        raise ValueError(f"preprocess_cfg: size {str(config['size'])[:60]} is not from 1 to {limits.SIDE} pixels")
    for name, known in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES)):
        if config[name] not in known:
            raise ValueError(f"preprocess_cfg: {name} {str(config[name])[:60]!r} is not one of {', '.join(known)}")


class Clip:
    """A loaded open_clip model as a scorer: `scale` times the cosine of image and text. `batch` is how many images or
    texts are encoded at once."""

    def __init__(self, model: nn.Module, tokenizer: Callable, card: Card, name: str, device: str, batch: int):
        self.model, self.tokenizer, self.device, self.batch = model.to(device).eval(), tokenizer, device, batch
        self.names, self.card = (name,), card

    def readers(self) -> list[Reader]:
        """The text model; a text that has more than its tokens fills the one behind them too."""
        most = self.tokenizer.context_length
        empty = self.tokenizer([""], context_length=most + 1)[0, -1]
        more = lambda text: bool(self.tokenizer([text], context_length=most + 1)[0, -1] != empty)  # noqa: E731
        return [Reader(self.card.scorer, most, more)]

    def prepared(self, images: Images) -> Float[Tensor, "N 3 h w"]:
        """Resized and normalised as the model's own evaluation transform does it."""
        config = open_clip.get_model_preprocess_cfg(self.model)
        size = config["size"] if isinstance(config["size"], (tuple, list)) else [config["size"]] * 2
        mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"  # "random" means bicubic here
        images = images.to(self.device, torch.float32)
        images = resized(images, tuple(size), config["resize_mode"], mode, config["fill_color"] / 255)
        mean, std = (torch.tensor(config[key], device=self.device)[:, None, None] for key in ("mean", "std"))
        return (images - mean) / std

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, self.batch)

    @torch.no_grad()
    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        row = {text: i for i, text in enumerate(dict.fromkeys(p.text for p in prompts))}
        text = self.model.encode_text(self.tokenizer(list(row)).to(self.device), normalize=True)
        image = self.model.encode_image(self.prepared(images), normalize=True)
        return (image * text[[row[p.text] for p in prompts]]).sum(-1, keepdim=True)


def clip(model: str | None = None, pretrained: str | None = None, device: str = "cpu", batch: int = 64) -> Clip:
    """The scorer `clip`. `model` is a folder in open_clip's `local-dir` layout or the name of one of its models, which
    also needs `pretrained`, a tag or a file of weights; without a model, the embedded tiny one. ValueError if the model
    cannot be had."""
    if model is None and not TINY.is_dir():
        raise ValueError(f"clip: the embedded model is not at {TINY}; build it with scripts/build_tiny_clip.py")
    name = _known(str(model or TINY), pretrained)
    with loading("clip", name):
        # the tag knows how its weights were trained; the model's name alone does not
        quick = bool(pretrained and open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
        loaded, tokenizer = opened(name, pretrained, force_quick_gelu=quick)
        card = Card(
            "clip",
            model=" ".join(named(part) for part in (model or str(TINY), pretrained) if part),
            licence="the model's own" if model else "Apache-2.0",
            low=-1,
            high=1,
            size=described(loaded),
            checkpoint=fingerprint(loaded),
            settings={"quick_gelu": True} if quick else {},
        )
        _check_preprocessing(open_clip.get_model_preprocess_cfg(loaded))
        scorer = Clip(loaded, tokenizer, card, "cosine", device, batch)
        check_on_grey_image(scorer._score_batch)
    return scorer


def described(model: nn.Module) -> str:
    config = open_clip.get_model_preprocess_cfg(model)
    return f"{config['size']} px, {config['resize_mode']}, {config['interpolation']}"
