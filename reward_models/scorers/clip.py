"""`clip`: how well an image fits its prompt, by a CLIP model (arXiv 2103.00020) of open_clip.

One score per image, the cosine similarity of the image and text embeddings, in [-1, 1], higher is better. Scores of one
model are comparable between images of one prompt, between prompts only roughly, between models not at all. CLIP counts
badly, hardly distinguishes relations, and can be fooled by textures that no person would accept.

Images stay tensors: they are resized and normalised like the model's own preprocessing, but in float32 instead of 8-bit
pixels, and on the device. Licence: the model's own; the embedded model is Apache-2.0.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reward_models import files, limits, model_folders, shipped
from reward_models.images import resized
from reward_models.lengths import Reader
from reward_models.model_folders import loading
from reward_models.scoring import check, each
from reward_models.types import Card, Images, Prompt, Scores
from reward_models.weights import check_on_grey_image, fingerprint, named

INTERPOLATIONS = ("bicubic", "bilinear", "random")
RESIZE_MODES = ("shortest", "longest", "squash")
EMBEDDED = "tiny_clip", "tiny_things_clip"  # of the embedded worlds of shapes and of things
TINY = shipped.folder("reward_models") / "assets" / EMBEDDED[0]


def _known(model: str, pretrained: str | None) -> str:
    """The model's name in open_clip. ValueError, before anything is loaded, if there is no such model."""
    import open_clip  # seconds of imports, paid by those who load a model

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
        problem = f"{pretrained!r} is neither a tag nor a file of weights" if pretrained else "`pretrained` is missing"
        raise ValueError(f"clip: {problem}; tags of {name}: {', '.join(tags) or 'none'}")
    return name


def opened(name: str, pretrained: str | None = None, **settings: Any) -> tuple[nn.Module, Callable]:
    """A model of open_clip with its weights, and its tokenizer. The settings in a folder or hub repository are checked
    first (`reward_models.model_folders`), and so are those of the text model on the hub that it may name."""
    import open_clip

    kind, colon, source = name.partition(":")
    if colon:
        folder = model_folders.configs(source, named(source))
        config = files.parsed(files.text(folder / "open_clip_config.json", limits.CONFIG))
        model = config.get("model_cfg")
        text, vision = (model.get(key) if isinstance(model, dict) else None for key in ("text_cfg", "vision_cfg"))
        if not isinstance(text, dict) or not isinstance(vision, dict):
            raise ValueError("open_clip_config.json describes no text_cfg and vision_cfg in a model_cfg")
        names = [text.get("hf_model_name"), kind == "hf-hub" and text.get("hf_tokenizer_name")]
        for other in filter(None, names):
            if not isinstance(other, str) or Path(other).exists():
                raise ValueError(f"hf_model_name: {other!r} is not a model of the hub")
            model_folders.configs(other, other)
        if kind == "local-dir" and not text.get("hf_model_name") and not vision.get("timm_model_name"):
            with torch.device("meta"), _without_warnings():
                empty = open_clip.create_model(name, load_weights=False, device="meta")
            model_folders.check_size(model_folders.counted(empty), source, named(source))
    with _without_warnings():
        loaded = open_clip.create_model(name, pretrained, require_pretrained=True, **settings)
        return loaded, open_clip.get_tokenizer(name)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence open_clip's warnings, which use the root logger. It also raises for real problems."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_preprocessing(config: dict[str, Any]) -> None:
    """ValueError for a preprocessing setting that no image can be prepared with."""
    sides = config["size"] if isinstance(config["size"], (tuple, list)) else [config["size"]] * 2
    numbers = {"mean": config["mean"], "std": config["std"], "fill_color": [config["fill_color"]] * 3}
    for name, three in numbers.items():
        if not isinstance(three, (tuple, list)) or [type(number) in (int, float) for number in three] != [True] * 3:
            raise ValueError(f"preprocess_cfg: {name} {str(three)[:60]} is not one number for each colour")
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= limits.SIDE for side in sides):
        raise ValueError(f"preprocess_cfg: size {str(config['size'])[:60]} is not from 1 to {limits.SIDE} pixels")
    for name, known in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES)):
        if config[name] not in known:
            raise ValueError(f"preprocess_cfg: {name} {str(config[name])[:60]!r} is not one of {', '.join(known)}")


class Clip:
    """A loaded open_clip model as a scorer: the cosine of the image and text embeddings. `batch`: images or texts that
    are encoded at once."""

    def __init__(self, model: nn.Module, tokenizer: Callable, card: Card, name: str, device: str, batch: int):
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.device, self.batch = tokenizer, device, batch
        self.names, self.card = (name,), card

    def readers(self) -> list[Reader]:
        """The text model's token limit. A text is too long if it also fills one more token."""
        most = self.tokenizer.context_length
        empty = self.tokenizer([""], context_length=most + 1)[0, -1]
        more = lambda text: bool(self.tokenizer([text], context_length=most + 1)[0, -1] != empty)  # noqa: E731
        return [Reader(self.card.scorer, most, more)]

    def prepared(self, images: Images) -> Float[Tensor, "N 3 h w"]:
        """Images resized and normalised like the model's own evaluation transform."""
        import open_clip

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
        return self.in_graph(images, prompts)

    def in_graph(self, images: Images, prompts: Sequence[Prompt]) -> Float[Tensor, "N K"]:
        check(images, prompts)
        row = {text: i for i, text in enumerate(dict.fromkeys(p.text for p in prompts))}
        text = self.model.encode_text(self.tokenizer(list(row)).to(self.device), normalize=True)
        image = self.model.encode_image(self.prepared(images), normalize=True)
        return (image * text[[row[p.text] for p in prompts]]).sum(-1, keepdim=True)


def clip(model: str | None = None, pretrained: str | None = None, device: str = "cpu", batch: int = 64) -> Clip:
    """The scorer `clip`. `model` is a folder in open_clip's `local-dir` layout, the name of one of its models, which
    also needs `pretrained`, a tag or a file of weights, or that of an embedded one (`EMBEDDED`, by default the first).
    ValueError if the model cannot be loaded."""
    import open_clip

    model = EMBEDDED[0] if model is None else model
    ours = TINY.parent / model if model in EMBEDDED and not Path(model).is_dir() else None
    if ours and not ours.is_dir():
        raise ValueError(f"clip: the embedded model is not at {ours}; build it with scripts/build_tiny_clip.py")
    name = _known(str(ours or model), pretrained)
    with loading("clip", name):
        # the tag, not the model's name, determines the activation that its weights were trained with
        quick = bool(pretrained and open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
        loaded, tokenizer = opened(name, pretrained, force_quick_gelu=quick)
        card = Card(
            "clip",
            model=" ".join(named(name) for name in (model, pretrained) if name),
            licence="Apache-2.0" if ours else "the model's own",
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
    import open_clip

    config = open_clip.get_model_preprocess_cfg(model)
    return f"{config['size']} px, {config['resize_mode']}, {config['interpolation']}"
