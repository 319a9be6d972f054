"""What the builders of the embedded models know of each world: captions, drawings, sizes, the verifier."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import typer
from build_prompts import OF_SHAPES
from jaxtyping import Float, Int, UInt8
from numpy.lib.format import open_memmap
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTokenizer

from mmalign.config.paths import locate
from mmalign.data.prompts import read as read_prompts
from reward_models import shapes_world, things_world
from reward_models.classifier import Classes
from reward_models.scorers import shapes_classifier, things_classifier
from reward_models.scorers.shapes import find_blobs
from reward_models.scorers.things import find_things
from reward_models.types import Prompt
from reward_models.verdicts import Blob
from reward_models.worlds import COUNTS, caption

OF_A_TAG = 20_000  # random requests of each tag from which the training captions of things are taken
MAX_TOKENS = 10
CHUNK = 2000
console = Console()


def progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console)


@dataclass(frozen=True)
class World:
    """A world, and what differs between its models and those of the other."""

    name: str  # also of its verifier
    about: str  # what its pictures show
    side: int  # of a picture, px
    share: dict[str, int]  # of the pictures, by tag
    training: Callable[[], Sequence[Prompt]]  # captions
    draw: Callable[[dict, np.random.Generator], Float[np.ndarray, "3 S S"]]
    find: Callable[[Float[np.ndarray, "n 3 S S"]], list[list[Blob]]]  # the objects that the verifier sees
    prompts: str  # how the names of its lists of captions begin
    noun: str  # what `nouns` are called
    nouns: Collection[str]
    colours: Collection[str]
    counts: Collection[int]
    model: str  # folders in assets/
    clip: str
    classes: Classes  # of its classifier
    pictures: int  # drawn
    crop: int  # px, the side of the parts of pictures from which the VAE learns
    vae_steps: int
    layers: int  # of the transformer
    half: bool  # whether to train in bfloat16 from weights in float32
    decay: float  # of the matrices that Muon trains, which keeps them from growing in long runs
    average: float  # decay of the average of the flow's weights, a step
    named: float  # weight of the loss by which the middle of the flow learns to name what is in each cell
    guided: float  # guidance that the flow learns while its rate falls, so that samples need none; 1 for none
    steps: int
    batch: int
    clip_steps: int

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(self.share)

    def held_out(self, part: str) -> list[Prompt]:
        """The captions of a part, "validation" or "test"."""
        return read_prompts(locate(f"assets/prompts/{self.prompts}{part}.jsonl"))


@cache
def _shapes() -> list[Prompt]:
    return shapes_world.split(OF_SHAPES)[0]


@cache
def _things() -> list[Prompt]:
    """Random requests of the training part, no caption twice."""
    rng, texts = random.Random("pictures"), {}
    for tag in things_world.TAGS:
        for _ in range(OF_A_TAG):
            wants = things_world.request(tag, rng)
            if things_world.part(wants) == "train":
                texts.setdefault(caption(wants), wants)
    return [Prompt(text, wants, number) for number, (text, wants) in enumerate(texts.items())]


SHAPES = World(
    name="shapes",
    about="coloured shapes and letters",
    side=shapes_world.SIDE,
    share=dict(one_object=1, two_objects=3, colors=2, counting=4, position=5, color_attr=4, text=4),
    training=_shapes,
    draw=shapes_world.draw,
    find=find_blobs,
    prompts="",
    noun="shape",
    nouns=shapes_world.SHAPES,
    colours=shapes_world.COLOURS,
    counts=COUNTS.values(),
    model="tiny_sd3",
    clip="tiny_clip",
    classes=shapes_classifier.CLASSES,
    pictures=160_000,
    crop=shapes_world.SIDE,
    vae_steps=1_800,
    layers=5,
    half=False,
    decay=0.0,
    average=0.0,
    named=0.0,
    guided=1.0,
    steps=2_200,
    batch=192,
    clip_steps=300,
)
THINGS = World(
    name="things",
    about="everyday nouns, tinted or not, in two styles",
    side=things_world.SIDE,
    share=dict(one_object=2, two_objects=3, colors=3, counting=4, position=6, color_attr=4, style=3),
    training=_things,
    draw=things_world.draw,
    find=find_things,
    prompts="things_",
    noun="noun",
    nouns=things_world.NOUNS,
    colours=things_world.COLOURS,
    counts=things_world.NUMBERS.values(),
    model="tiny_things",
    clip="tiny_things_clip",
    classes=things_classifier.CLASSES,
    pictures=100_000,
    crop=32,
    vae_steps=6_000,
    layers=6,
    half=True,
    decay=0.01,
    average=0.999,
    named=0.1,
    guided=3.0,
    steps=30_000,
    batch=128,
    clip_steps=1_500,
)
WORLDS = {world.name: world for world in (SHAPES, THINGS)}


def world_of(name: str) -> World:
    """The world of this name. BadParameter if there is none."""
    if name not in WORLDS:
        raise typer.BadParameter(f"no world {name!r}; known: {', '.join(WORLDS)}")
    return WORLDS[name]


# ---------------------------------------------------------------------------------------------------- pictures


def draw_chunk(name: str, chunk: int, count: int = CHUNK) -> tuple[UInt8[np.ndarray, "n 3 S S"], np.ndarray]:
    """`count` pictures and the index of each one's training caption."""
    world, rng = WORLDS[name], np.random.default_rng([2024, chunk])
    train = world.training()
    by_tag = {tag: np.array([i for i, p in enumerate(train) if p.wants["tag"] == tag]) for tag in world.tags}
    weights = np.array([*world.share.values()]) / sum(world.share.values())
    captions = np.array([rng.choice(by_tag[world.tags[k]]) for k in rng.choice(len(weights), count, p=weights)])
    return np.stack([to_uint8(world.draw(train[i].wants, rng)) for i in captions]), captions


def to_uint8(image: np.ndarray) -> np.ndarray:
    return (image * 255).round().astype(np.uint8)


def build_pictures(world: World, work: Path, images: int) -> tuple[UInt8[Tensor, "n 3 S S"], Tensor]:
    """At least `images` pictures, which stay on disk, and the indices of their captions."""
    size = min(images, CHUNK)
    chunks = -(-images // size)
    path, indices = work / f"pictures-{images}.npy", work / f"captions-{images}.npy"
    if not indices.exists():
        pictures = open_memmap(path, "w+", np.uint8, (chunks * size, 3, world.side, world.side))
        captions = np.empty(chunks * size, np.int64)
        with ProcessPoolExecutor(torch.get_num_threads()) as pool, progress() as bar:
            task = bar.add_task("drawing", total=chunks, note="")
            for k, drawn in enumerate(pool.map(draw_chunk, [world.name] * chunks, range(chunks), [size] * chunks)):
                pictures[k * size : (k + 1) * size], captions[k * size : (k + 1) * size] = drawn
                bar.advance(task)
        pictures.flush()
        np.save(indices, captions)
    return torch.from_numpy(np.load(path, mmap_mode="c")), torch.from_numpy(np.load(indices))


def build_names(world: World, pictures: UInt8[Tensor, "n 3 S S"], work: Path, cells: int) -> Int[Tensor, "n 3 c c"]:
    """What the verifier sees in each of `cells` x `cells` cells of the pictures: its noun, its colour and its style, by
    number, 0 where there is nothing. A cell belongs to the object whose box has its middle."""
    path = work / f"names-{len(pictures)}.npy"
    if not path.exists():
        noun, colour, style = ({kind: number for number, kind in enumerate(kinds)} for kinds in kinds_of(world))
        names = np.zeros((len(pictures), 3, cells, cells), np.uint8)
        middles = (np.arange(cells) + 0.5) * world.side / cells
        with progress() as bar:
            task = bar.add_task("naming", total=len(pictures), note="")
            for start in range(0, len(pictures), CHUNK):
                images = pictures[start : start + CHUNK].numpy().astype(np.float32) / 255
                for name, blobs in zip(names[start : start + CHUNK], world.find(images), strict=True):
                    for blob in blobs:
                        left, top, right, bottom = blob.box
                        rows, columns = (middles >= top) & (middles < bottom), (middles >= left) & (middles < right)
                        numbers = noun.get(blob.name, 0), colour.get(blob.colour, 0), style.get(blob.style, 0)
                        name[:, rows[:, None] & columns] = np.array(numbers, np.uint8)[:, None]
                bar.advance(task, len(images))
        np.save(path, names)
    return torch.from_numpy(np.load(path)).long()


def kinds_of(world: World) -> tuple[list[str], list[str], list[str]]:
    """The nouns, colours and styles of a world, after an empty one."""
    colours, styles = (world.classes.attributes.get(name, ()) for name in ("color", "style"))
    return ["", *world.classes.kinds], ["", *colours], ["", *styles]


# ---------------------------------------------------------------------------------------------------- tokenizer


def new_tokenizer(world: World) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary in which each word of the world is one token."""
    words = sorted({word for p in world.training() for word in p.text.lower().replace('"', ' " ').split()})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = merges_of(words, alphabet)
    vocab = dict.fromkeys([*alphabet, *(a + "</w>" for a in alphabet), *("".join(pair) for pair in merges)])
    numbers = {token: i for i, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=MAX_TOKENS)


def merges_of(words: Sequence[str], alphabet: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until each word is one token: the most frequent pair, and of several the one of the oldest
    tokens. `tokenizers` chooses among several by chance."""
    pieces, merges = [[*word[:-1], word[-1] + "</w>"] for word in words], []
    age = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *(word[-1] for word in pieces)]))}
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        first, second = best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        age.setdefault(first + second, len(age))
        merges.append(best)
        for word in pieces:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = [first + second]
                at += 1
    return merges
