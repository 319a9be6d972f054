"""Write the prompt lists that the recipes and the embedded models train on and are evaluated with to assets/prompts.

    python scripts/build_prompts.py                   # the same files each time
    python scripts/build_prompts.py --out /tmp/try

Three kinds for recipes, each with a held-out list of different requests, not just different words:

- `geneval`: objects of COCO with counts, colours and positions, in the layout of GenEval's metadata and in wording of
  its own, so that no text is one of the benchmark's. Flow-GRPO's mix of tasks in training (arXiv 2505.05470), equal
  shares in the held-out list; the same objects in the other order count as the same request.
- `ocr`: a phrase in quotes on an object that carries text. No phrase twice.
- `scenes`: a subject in a scene, for preference scorers. No pair twice.

`train.jsonl`, `validation.jsonl` and `test.jsonl` hold captions of the embedded world of shapes, no meaning in two of
them. Choices are made on validation captions; the test captions give the figures of a release.

`things_*.jsonl` hold captions of the embedded world of things, whose parts are apart by meaning and by pairs of nouns
(`reward_models.things_world.part`); no meaning twice.

The lists are small, so that a recipe runs without other files. To compare results with published ones, use the lists
of those publications.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import permutations, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from reward_models import files, shapes_world, things_world
from reward_models.meaning import meaning
from reward_models.types import Prompt
from reward_models.worlds import COUNTS, RELATIONS, caption, one, plural, thing

PROMPTS = Path(__file__).parents[1] / "assets/prompts"
Request = tuple[str, dict[str, Any], Any]  # text, ground truth, and what makes it another request than the others

THINGS = (  # of COCO's 80 classes, those with a regular plural that are not colours
    "airplane", "apple", "backpack", "banana", "baseball bat", "bear", "bed", "bench", "bicycle", "bird", "boat",
    "book", "bottle", "bowl", "bus", "cake", "car", "carrot", "cat", "cell phone", "chair", "clock", "couch", "cow",
    "cup", "dining table", "dog", "donut", "elephant", "fire hydrant", "fork", "frisbee", "giraffe", "hair drier",
    "handbag", "horse", "hot dog", "keyboard", "kite", "knife", "laptop", "microwave", "motorcycle", "oven",
    "parking meter", "pizza", "potted plant", "refrigerator", "sandwich", "sink", "skateboard", "snowboard", "spoon",
    "sports ball", "stop sign", "suitcase", "surfboard", "teddy bear", "tennis racket", "tie", "toaster", "toilet",
    "toothbrush", "traffic light", "train", "truck", "tv", "umbrella", "vase", "wine glass", "zebra",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SPELT = {"keyboard": "computer keyboard"}

CARRIERS = (
    "a wooden shop sign", "a chalkboard outside a café", "a neon sign in a window at night", "the cover of an old book",
    "a birthday cake with icing", "a T-shirt on a hanger", "a coffee mug on a desk", "a road sign in the desert",
    "a banner across a street", "a note stuck to a fridge", "a film poster", "a label on a jar of jam",
    "a brass plate beside a door", "a balloon at a fair", "graffiti on a brick wall", "a train ticket",
    "a ship's bow in the harbour", "a scoreboard in a stadium", "a postcard on a table", "a stone above a gate",
)  # fmt: skip
FIRST = (
    "Fresh", "Open", "Golden", "Silent", "Lucky", "Winter", "Summer", "Hidden", "Royal", "Little", "Northern", "Quick",
    "Happy", "Midnight", "Silver", "Wild", "Ancient", "Second", "Grand", "Electric",
)  # fmt: skip
SECOND = (
    "Bread", "Harbour", "Garden", "Market", "Station", "Bakery", "Library", "River", "Express", "Theatre", "Coffee",
    "Lantern", "Orchard", "Museum", "Bridge", "Festival", "Kitchen", "Records", "Voyage", "Mountain", "Window",
    "Workshop", "Pharmacy", "Island", "Machine", "Letters", "Corner", "Holiday", "Engine", "Forest",
)  # fmt: skip

STYLES = (
    "a photograph of", "an oil painting of", "a watercolour of", "a pencil drawing of", "a cinematic shot of",
    "a woodcut of", "a children's book illustration of", "a 3D render of", "a poster of", "a pastel sketch of",
)  # fmt: skip
SUBJECTS = (
    "an old fisherman", "a girl with a red umbrella", "a sleeping fox", "a brass robot", "two dancers", "a white horse",
    "a street musician", "a tired astronaut", "a baker with flour on her hands", "a black cat", "a lighthouse keeper",
    "a knight without a helmet", "a grandmother knitting", "a boy flying a kite", "a flock of geese", "a chess player",
    "a gardener with a wheelbarrow", "a red sports car", "a paper boat", "a giant tortoise", "a violinist",
    "a family of hedgehogs", "a wooden caravan", "a queen in a green dress",
)  # fmt: skip
PLACES = (
    "in a narrow alley", "on a frozen lake", "in a field of sunflowers", "at an empty railway station", "by the sea",
    "in a crowded market", "under a stone bridge", "in a greenhouse", "on a rooftop", "in a pine forest",
    "in an abandoned factory", "at the foot of a volcano", "in a library", "on a suspension bridge", "in the desert",
    "in a mountain village", "beside a waterfall", "in a subway car", "on a small island", "in a courtyard with arches",
)  # fmt: skip
LIGHTS = (
    "at dawn", "at noon", "at dusk", "by moonlight", "in the rain", "in thick fog", "in falling snow", "by candlelight",
    "under a stormy sky", "in warm evening light",
)  # fmt: skip


def picture(tag: str, words: str, include: list[dict], exclude: list[dict] | None = None) -> Request:
    """One of GenEval's requests; the same objects in any order are the same."""
    objects = frozenset((item["class"], item["count"], item.get("color")) for item in include)
    wants = {"tag": tag, "include": include} | ({"exclude": exclude} if exclude else {})
    return f"a picture of {words}", wants, (tag, objects)


def geneval(tag: str, rng: random.Random) -> Request:
    """A request of the kind `tag` names."""
    first, second = rng.sample(THINGS, 2)
    red, green = rng.sample(COLOURS, 2)
    a, b = ({"class": name, "count": 1} for name in (first, second))
    name, other = SPELT.get(first, first), SPELT.get(second, second)
    if tag == "single_object":
        return picture(tag, one(name), [a])
    if tag == "two_object":
        return picture(tag, f"{one(name)} and {one(other)}", [a, b])
    if tag == "counting":
        number, n = rng.choice([*COUNTS.items()])
        return picture(tag, f"{number} {plural(name)}", [a | {"count": n}], [{"class": first, "count": n + 1}])
    if tag == "colors":
        return picture(tag, one(f"{red} {name}"), [a | {"color": red}])
    if tag == "color_attr":
        coloured = [a | {"color": red}, b | {"color": green}]
        return picture(tag, f"{one(f'{red} {name}')} and {one(f'{green} {other}')}", coloured)
    relation = rng.choice([*RELATIONS])
    return picture(tag, f"{one(name)} {relation} {one(other)}", [b, a | {"position": [relation, 0]}])


def ocr(rng: random.Random) -> Request:
    phrase = f"{rng.choice(FIRST)} {rng.choice(SECOND)}"
    return f'{rng.choice(CARRIERS)} that says "{phrase}"', {}, phrase


def scene(rng: random.Random) -> Request:
    pair = (rng.choice(SUBJECTS), rng.choice(PLACES))
    return f"{rng.choice(STYLES)} {' '.join(pair)} {rng.choice(LIGHTS)}", {}, pair


# Captions of the embedded world that are held out for validation.
OF_SHAPES = dict(one_object=3, two_objects=50, colors=30, counting=36, position=90, color_attr=80, text=24)


def of_shapes() -> Iterator[tuple[str, list[Prompt]]]:
    """The training and validation captions of the embedded world. Training ones are for RL: at most twice as many of
    each tag as are held out, in the mix that is held out."""
    training, held_out = shapes_world.split(OF_SHAPES)
    chosen: list[Prompt] = []
    for tag, count in OF_SHAPES.items():
        tagged = [p for p in training if p.wants["tag"] == tag]
        chosen += [tagged[i] for i in np.random.default_rng(3).permutation(len(tagged))[: 2 * count]]
    yield "train", sorted(chosen, key=lambda p: p.id)
    yield "validation", held_out


# Test captions of the embedded world: as many meanings as in validation, and twice as many positions and pairs of
# colours, of which validation has each in two wordings. There are no more of colors, one_object and text.
TEST = dict(one_object=3, two_objects=25, colors=6, counting=36, position=90, color_attr=80, text=8)


def world() -> Iterator[dict[str, Any]]:
    """Requests of the embedded world, and some that it was never trained on: small objects in pairs and in twos and
    fours, and letters twice. The model draws hardly any pair with a large object, and no three small ones."""
    yield from shapes_world.requests()
    for first, second in permutations(shapes_world.SHAPES, 2):
        for colour in (None, *shapes_world.COLOURS):
            include = [thing(first, size="small"), thing(second, colour)]
            yield {"tag": "two_objects", "include": include}
    for shape, colour, count in product(shapes_world.SHAPES, (None, *shapes_world.COLOURS), (2, 4)):
        yield {"tag": "counting", "include": [thing(shape, colour, count, size="small")]}
    for letter in shapes_world.GLYPHS:
        yield {"tag": "text", "include": [], "text": 2 * letter}


def world_test(known: Iterable[str]) -> list[dict[str, Any]]:
    """The test captions of the embedded world: none has a meaning of the `known` texts, and each meaning has one
    wording. A meaning is chosen, and worded, by a hash; new ones of the world's requests come before the extensions."""
    requests = len(shapes_world.requests())
    rows = [{"prompt": caption(wants), "id": number, **wants} for number, wants in enumerate(world())]
    rows = sorted(rows, key=lambda row: (row["id"] >= requests, zlib.crc32(row["prompt"].encode())))
    taken, left, chosen = {meaning(text) for text in known}, dict(TEST), []
    for row in rows:
        same = meaning(row["prompt"])
        if same not in taken and left[row["tag"]] > 0:
            taken.add(same)
            left[row["tag"]] -= 1
            chosen.append(row)
    return sorted(chosen, key=lambda row: row["id"])


OF_THINGS = {  # captions by kind
    "train": dict(one_object=50, two_objects=120, colors=120, counting=120, position=200, color_attr=150, style=100),
    "validation": dict(one_object=5, two_objects=45, colors=30, counting=45, position=90, color_attr=60, style=35),
    "test": dict(one_object=5, two_objects=45, colors=30, counting=45, position=90, color_attr=60, style=35),
}


def of_things() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The lists of the world of things: a part, and its rows."""
    number = 0
    for part, counts in OF_THINGS.items():
        rng, known, rows = random.Random(part), set(), []
        for tag, count in counts.items():
            wanted = len(rows) + count
            while len(rows) < wanted:
                wants = things_world.request(tag, rng)
                text = caption(wants)
                if things_world.part(wants) == part and meaning(text) not in known:
                    known.add(meaning(text))
                    rows.append({"prompt": text, "id": number, **wants})
                    number += 1
        yield part, rows


TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TRAIN = {"position": 168, "counting": 120, "color_attr": 72, "colors": 24, "two_object": 24}  # 7 : 5 : 3 : 1 : 1
HELD_OUT = dict.fromkeys(TAGS, 17)
LISTS: dict[str, tuple[Callable[..., Request], dict[str, int], dict[str, int]]] = {
    "geneval": (geneval, HELD_OUT, TRAIN),
    "ocr": (lambda _, rng: ocr(rng), {"": 100}, {"": 400}),
    "scenes": (lambda _, rng: scene(rng), {"": 100}, {"": 300}),
}


def lists() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """File names and their rows; all of a kind are different requests."""
    for kind, (draw, *parts) in LISTS.items():
        rng, known, number = random.Random(kind), set(), 0
        for split, counts in zip(("held_out", "train"), parts, strict=True):
            rows = []
            for tag, count in counts.items():
                wanted = len(rows) + count
                while len(rows) < wanted:
                    text, wants, same = draw(tag, rng)
                    if same not in known:
                        known.add(same)
                        rows.append({"prompt": text, "id": number, **wants})
                        number += 1
            yield f"{kind}_{split}.jsonl", rows
    known = set()
    for part, prompts in of_shapes():
        known |= {p.text for p in prompts}
        yield f"{part}.jsonl", [{"prompt": p.text, "id": p.id, **p.wants} for p in prompts]
    yield "test.jsonl", world_test(known)
    for part, rows in of_things():
        yield f"things_{part}.jsonl", rows


def main(out: Annotated[Path, typer.Option(help="folder to write to")] = PROMPTS) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in lists():
        files.write(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{out / name}: {len(rows)} prompts")


if __name__ == "__main__":
    typer.run(main)
