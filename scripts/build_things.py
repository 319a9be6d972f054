"""Render the pictures of the embedded world of things to assets/things: one sheet of sprites for each style.

    npm pack @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9
    pip install resvg-py==0.5.0                       # nothing else needs it
    python scripts/build_things.py iconify-json-fluent-emoji-flat-1.2.6.tgz iconify-json-noto-1.2.9.tgz

The files are the same each time. A sprite is cropped to what is visible and scaled so that its longer side is 28
pixels; colours are not premultiplied. `index.json` names the sprites in order, `columns` to a row, and the packages.
The licences of the drawings, MIT (Fluent) and Apache-2.0 (Noto), are in `assets/things/LICENSE.*`.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from reward_models import files

THINGS = Path(__file__).parents[1] / "assets/things"
SIDE, COLUMNS = 28, 10
NOUNS = (  # distinct by eye at 20 pixels, in both styles
    "ant", "apple", "backpack", "ball", "banana", "bed", "bell", "boat", "bomb",
    "bucket", "bulb", "burger", "butterfly", "cactus", "cake", "camel", "camera", "candle", "car", "carrot",
    "castle", "cat", "chair", "crab", "crocodile", "crown", "door", "donut", "dress", "drum", "duck",
    "elephant", "fish", "frog", "ghost", "gift", "guitar", "hammer", "hat", "hedgehog",
    "helicopter", "house", "key", "laptop", "leaf", "magnet", "mushroom", "octopus", "owl",
    "panda", "pencil", "penguin", "pig", "pineapple", "pizza", "pumpkin", "robot", "rocket", "shoe", "snail",
    "snowman", "spider", "strawberry", "sunflower", "teapot", "tent", "train", "tree", "turtle", "umbrella",
)  # fmt: skip
ICONS = {  # where the collections have another name
    "apple": "red-apple", "ball": "soccer-ball", "boat": "sailboat", "bulb": "light-bulb", "burger": "hamburger",
    "cake": "birthday-cake", "car": "automobile", "donut": "doughnut", "gift": "wrapped-gift",
    "hat": "top-hat", "leaf": "maple-leaf", "pumpkin": "jack-o-lantern", "shoe": "running-shoe",
    "snowman": "snowman-without-snow", "tree": "deciduous-tree",
}  # fmt: skip


def member(package: Path, name: str) -> Any:
    with tarfile.TarFile.gzopen(package) as archive:
        return json.loads(archive.extractfile(f"package/{name}").read())


def svg(icons: dict[str, Any], name: str) -> str:
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (icon.get(key, icons.get(key, default)) for key, default in defaults.items())
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
    return f"<svg {names} {box}>{icon['body']}</svg>"


def sprite(text: str) -> Image.Image:
    """The visible part of a drawing, its longer side SIDE pixels, in the middle of a square."""
    import resvg_py

    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text, width=256, height=256))))
    visible = picture.convert("RGBA").convert("RGBa")  # premultiplied, so that transparent pixels have no colour
    visible = visible.crop(visible.getchannel("a").point(lambda alpha: 255 * (alpha > 25)).getbbox())
    scale = SIDE / max(visible.size)
    width, height = (max(1, round(length * scale)) for length in visible.size)
    small = visible.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBa", (SIDE, SIDE))
    square.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    return square.convert("RGBA")


def main(
    flat: Annotated[Path, typer.Argument(help="package of @iconify-json/fluent-emoji-flat")],
    shaded: Annotated[Path, typer.Argument(help="package of @iconify-json/noto")],
    out: Annotated[Path, typer.Option(help="folder to write to")] = THINGS,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"nouns": NOUNS, "side": SIDE, "columns": COLUMNS, "styles": {}}
    for style, package in (("flat", flat), ("shaded", shaded)):
        about, icons = member(package, "package.json"), member(package, "icons.json")
        sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(NOUNS) // COLUMNS) * SIDE))
        for k, noun in enumerate(NOUNS):
            sheet.paste(sprite(svg(icons, ICONS.get(noun, noun))), (k % COLUMNS * SIDE, k // COLUMNS * SIDE))
        encoded = io.BytesIO()
        sheet.save(encoded, "PNG", optimize=True)
        files.put(out / f"{style}.png", encoded.getvalue())
        licence = member(package, "info.json")["license"]["spdx"]
        index["styles"][style] = {"package": f"{about['name']} {about['version']}", "licence": licence}
    files.write(out / "index.json", json.dumps(index, indent=1) + "\n")
    print(f"{out}: {len(NOUNS)} things, {sum(file.stat().st_size for file in out.iterdir()):,} bytes")


if __name__ == "__main__":
    typer.run(main)
