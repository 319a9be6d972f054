"""Train the embedded model on a reward function of ten lines: make it redder.

Run it: python examples/reward_function.py. A config can name the same function, since Python finds this file's folder:

    PYTHONPATH=examples mmalign train quickstart --allow reward_function \
        rewards='{reward_function:redness.score: 1}' watch='[]' out=runs/redder
"""

from pathlib import Path

import numpy as np

import mmalign

PROMPTS = ["a circle", "two squares", "a triangle above a cross", "three circles"]


def redness(images, prompts):
    """How much redder than green and blue each image is, in [-1, 1]; `images` are PIL images, `prompts` texts."""
    means = [np.asarray(image, np.float64).mean((0, 1)) / 255 for image in images]
    return [red - (green + blue) / 2 for red, green, blue in means]


def main(iterations: int = 40, out: Path | None = None) -> mmalign.Run:
    place = {} if out is None else {"out": out}
    run = mmalign.align(
        "assets/tiny_sd3", PROMPTS, redness, iterations=iterations, prompts_per_iteration=4, learning_rate=1e-3, **place
    )
    before, after = (run.evaluate(base=base).means()["redness.score"] for base in (True, False))
    print(f"redness {before:+.3f} before, {after:+.3f} after; {run.save_lora(run.folder / 'lora')}; {run.report}")
    return run


if __name__ == "__main__":
    main()
