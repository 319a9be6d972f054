"""The cost of `mmalign score`, relative to the bare CLIP model.

    python scripts/benchmark_score.py

Ratio = images per second of the scoring loop (read PNG files, resize, score, make rows) / images per second of the bare
model's two encoders on the same batches, read and resized beforehand. 1 would mean that everything around the network
is free. Both are measured in one process, in turn, and medians are printed. The weights are random unless a folder is
given: they do not change the speed.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import open_clip
import torch
import typer
from safetensors.torch import save_file

from reward_models import files, load
from reward_models.images import from_file, to_pil
from reward_models.tools import picture_files, score_files as batches


def random_model(architecture: str, folder: Path) -> Path:
    """The architecture with random weights, in the layout `clip` loads."""
    save_file(open_clip.create_model(architecture).state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {"size": 224}}
    files.write(folder / "open_clip_config.json", json.dumps(config))
    return folder


def pictures(folder: Path, count: int, side: int) -> Path:
    """Soft random pictures: PNG files of about the size photographs have."""
    folder.mkdir()
    rough = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for i, picture in enumerate(rough):
        smooth = torch.nn.functional.interpolate(picture[None], (side, side), mode="bicubic").clamp(0, 1)
        to_pil(smooth)[0].save(folder / f"{i:04d}.png")
        files.write(folder / f"{i:04d}.txt", f"picture number {i % 20}")
    return folder


def main(
    model: Annotated[str, typer.Option(help="folder, or open_clip architecture for random weights")] = "ViT-B-16",
    count: Annotated[int, typer.Option(help="images")] = 80,
    side: Annotated[int, typer.Option(help="pixels a side")] = 512,
    batch: Annotated[int, typer.Option(help="images scored at once")] = 16,
    repeats: Annotated[int, typer.Option(help="runs of each")] = 3,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = model if Path(model).is_dir() else str(random_model(model, Path(place)))
        scorer = load("clip", model=folder, device=device, batch=batch)
        items, _ = picture_files.read(pictures(Path(place) / "pictures", count, side))
        parts = [items[i : i + batch] for i in range(0, count, batch)]
        ready = [
            (
                scorer.prepared(torch.cat([from_file(item.path) for item in part])),
                scorer.tokenizer([*dict.fromkeys(item.prompt.text for item in part)]).to(device),
            )
            for part in parts
        ]

        @torch.no_grad()
        def bare() -> None:
            for images, texts in ready:
                scorer.model.encode_image(images, normalize=True)
                scorer.model.encode_text(texts, normalize=True)

        def scoring() -> None:
            assert not any(row["failures"] for row in batches.score(items, {"clip": scorer}, batch))

        times: dict[str, list[float]] = {"bare": [], "scoring": []}
        for function in (bare, scoring) * (repeats + 1):
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[function.__name__].append(time.perf_counter() - start)
        seconds = {name: statistics.median(runs[1:]) for name, runs in times.items()}  # the first of each warms up
        print(
            json.dumps(
                {
                    "model": model,
                    "device": device,
                    "threads": torch.get_num_threads(),
                    "images": f"{count} of {side} x {side}",
                    "bare_images_per_second": round(count / seconds["bare"], 1),
                    "scored_images_per_second": round(count / seconds["scoring"], 1),
                    "ratio": round(seconds["bare"] / seconds["scoring"], 3),
                }
            )
        )


if __name__ == "__main__":
    typer.run(main)
