"""Random models of the classes the scorers load, small enough for a test, in the folders and files they load from."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import open_clip
import tiny_vlm
import torch
from drawn_pairs import drawn_pairs
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipImageProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    GenerationConfig,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    ResNetConfig,
)
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from reward_models import load
from reward_models.shapes_world import SHAPES
from reward_models.training import fit, natural as naturals
from reward_models.weights import read

OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"size": 24, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"}
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def open_clip_folder(folder: Path) -> Path:
    """open_clip's `local-dir` layout; the text goes through open_clip's own tokenizer."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    save_file(CLIP(**OPEN_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": PREPROCESS}))
    return folder


def hpsv2(folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    (folder / "tiny-for-hpsv2.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(folder)
    torch.manual_seed(1)
    torch.save({"epoch": 3, "state_dict": CLIP(**OPEN_CLIP).state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return {"weights": str(folder), "model": "tiny-for-hpsv2"}


def transformers_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    end = len(letters) - 1
    config = CLIPConfig(
        text_config=side
        | {"vocab_size": len(letters), "max_position_embeddings": 40, "eos_token_id": end, "bos_token_id": end - 1},
        vision_config=side | {"image_size": 24, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 24, "width": 24}
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=size).save_pretrained(folder)
    CLIPTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]).save_pretrained(folder)
    return folder


def pickscore(folder: Path) -> dict:
    return {"model": str(transformers_clip(folder)), "processor": str(folder)}


def head(sizes: tuple[int, ...], numbers: tuple[int, ...], prefix: str = "layers.") -> dict[str, torch.Tensor]:
    """A chain of linear layers under the names the released heads have: dropouts take numbers too."""
    torch.manual_seed(2)
    chain = [nn.init.orthogonal_(nn.Linear(wide, high).weight) for wide, high in pairwise(sizes)]
    weights = {f"{prefix}{number}.weight": weight.detach() for number, weight in zip(numbers, chain, strict=True)}
    return weights | {name.replace("weight", "bias"): 0.1 * value[:, 0] for name, value in weights.items()}


def aesthetic(folder: Path) -> dict:
    model = transformers_clip(folder)
    weights = head((12, 8, 7, 6, 5, 1), (0, 2, 4, 6, 7))
    torch.save(weights, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return {"head": str(folder), "model": str(model)}


def original_blip_names(vision: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names of a BLIP image encoder, turned back to the original's."""
    table = [
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("post_layernorm", "norm"),
        ("encoder.layers", "blocks"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn", "attn"),
        ("layer_norm", "norm"),
    ]
    out = {}
    for name, value in vision.items():
        for here, there in table:
            name = name.replace(here, there)
        out[name] = value
    return out


def blip() -> tuple[BlipVisionModel, BlipTextModel, dict]:
    torch.manual_seed(0)
    med = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    }  # fmt: skip
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, image_size=24,
            patch_size=8, layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    size = {"vocab_size": 5 + 2 * len(LETTERS), "encoder_hidden_size": 12, "is_decoder": True}
    text = BlipTextModel(BlipTextConfig(**med, **size, bos_token_id=None, sep_token_id=None), add_pooling_layer=False)
    for model in (vision, text):  # the library's initialisation is too small to tell one picture from another
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return vision.eval(), text.eval(), med


def image_reward(folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    vision, text, med = blip()
    weights = {f"blip.visual_encoder.{name}": value for name, value in original_blip_names(vision.state_dict()).items()}
    weights |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    weights |= {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    weights |= head((16, 8, 7, 6, 5, 1), (0, 2, 4, 6, 7), "mlp.layers.")
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(med | {"vocab_size": 30524, "encoder_width": 768}))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return {"weights": str(folder), "tokenizer": str(folder), "heads": 3}


def context(folder: Path) -> dict:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]
    side = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=side | {"image_size": 24, "patch_size": 8},
        qformer_config=side
        | {
            "vocab_size": len(words), "max_position_embeddings": 40, "encoder_hidden_size": 16,
            "cross_attention_frequency": 1, "use_qformer_text_input": True,
        },
        text_config={"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        num_query_tokens=4,
        image_text_hidden_size=8,
    )  # fmt: skip
    model = Blip2ForImageTextRetrieval(config)
    for parameter in model.parameters():  # the library's initialisation is too small to tell one picture from another
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    BlipImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return {"model": str(folder), "tokens": 40}


LAYERS = {
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16, "num_queries": 6,
}  # fmt: skip


def detr_config(**settings) -> DetrConfig:
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    backbone = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return DetrConfig(**LAYERS, **backbone, backbone_config=resnet, d_model=16, decoder_layers=1, **settings)


def geneval(folder: Path) -> dict:
    """A detector that knows the embedded world's shapes by name."""
    torch.manual_seed(0)
    names = dict(enumerate(SHAPES))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    DetrForObjectDetection(detr_config(**labels)).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 64}).save_pretrained(folder)
    colours = open_clip_folder(folder / "colours")
    return {"model": str(folder), "colour_model": str(colours), "confidence": 0.1, "counting": 0.1}


SERVING = []  # a service that nobody holds ends


def remote(folder: Path) -> dict:
    """A service in this process, until the process ends."""
    from services import running

    SERVING.append(running({"shapes": load("shapes"), "jpeg_size": load("jpeg_size")}))
    return {"url": SERVING[-1].__enter__()}


def owlv2(folder: Path) -> None:
    torch.manual_seed(0)
    letters = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    end = len(letters) - 1
    side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(letters), "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": 0}
    config = Owlv2Config(
        text_config=side | tokens | {"max_position_embeddings": 16},
        vision_config=side | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(letters)}, merges=[], model_max_length=16)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)


def grounded(folder: Path) -> dict:
    owlv2(folder)
    return {"model": str(folder), "confidence": 0.2}


REPLY = '{"reason": "so it is", "score": 0.5, "regions": [{"box": [0, 0, 20, 10], "score": -0.25, "label": "1 it"}]}'


REPLIES = {  # the reply of a model that knows only one
    "places": REPLY,
    "rational": '{"faithfulness": {"score": 3}, "quality": {"score": 2}, "text": 4, "refined_request": "a better one"}',
    "checklist": '{"verdicts": [{"id": 1, "answer": true, "box": [0, 0, 20, 10]}]}',
    "pairwise": "<answer>Image 1 is better</answer>",
    "unified": "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2.5",
    "visual_erm": '{"errors": [{"category": "shape", "severity": 2, "location": "left", "box": [0, 0, 20, 10]}]}',
}


def parrot(folder: Path, reply: str) -> dict:
    """A model that gives one reply, a single token of its own and the end, whatever it is asked."""
    tiny_vlm.folder_of(folder, [reply])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids(reply)
    end = tokenizer.eos_token_id
    GenerationConfig(sequence_bias=[[[token], 1e4], [[token, end], 1e5]], eos_token_id=end).save_pretrained(folder)
    return {"model": str(folder), "tokens": 2}


def places(folder: Path) -> dict:
    return parrot(folder, REPLY)


def vqa(folder: Path) -> dict:
    return {"model": str(tiny_vlm.folder_of(folder))}


def hpsv3(folder: Path) -> dict:
    """The released layout: one file, with the names of transformers before version 5 and the head's own."""
    base = tiny_vlm.folder_of(folder / "base", seed=1)
    weights = {before_version_5(name): value for name, value in read(base / "model.safetensors").items()}
    token = "<|Reward|>"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.randn(9, 16)])[: len(tokenizer)].clone()
    weights |= head((16, 12, 5, 2), (0, 3, 5), "rm_head.")
    save_file(weights, folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text(f"How good is this picture of {{prompt}}? {token}")
    return {
        "weights": str(folder), "base": str(base), "instruction": str(folder / "instruction.txt"), "dtype": "float32",
        "pixels": 4 * 28 * 28,
    }  # fmt: skip


def before_version_5(name: str) -> str:
    """How transformers called a weight of Qwen2-VL before its version 5."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def fitted(folder: Path) -> dict:
    fit(drawn_pairs(12), folder / "fitted", members=2, epochs=1)
    return {"folder": str(folder / "fitted")}


def natural(folder: Path) -> dict:
    pictures = [side.read() for pair in drawn_pairs(12) for side in (pair.a, pair.b)]
    naturals.train(pictures, folder / "natural", settings=naturals.Settings(steps=5))
    return {"folder": str(folder / "natural")}


BUILDERS = {
    "context": context,
    "natural": natural,
    "fitted": fitted,
    "geneval": geneval,
    "grounded": grounded,
    **{name: partial(parrot, reply=reply) for name, reply in REPLIES.items()},
    "vlm_yes_no": vqa,
    "voted": lambda folder: {"of": "jpeg_size"},
    "zoomed": lambda folder: {"of": "clip"},
    "hpsv3": hpsv3,
    "remote": remote,
    "vqa": vqa,
    "hpsv2": hpsv2,
    "pickscore": pickscore,
    "aesthetic": aesthetic,
    "image_reward": image_reward,
}


def settings(scorer: str, folder: Path) -> dict:
    """The settings with which `reward_models.load` makes this scorer without any download."""
    return BUILDERS[scorer](folder) if scorer in BUILDERS else {}
