"""Pictures on disk as the first images of a refinement."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from reward_models import Prompt
from reward_models.tools import picture_files


def read_pictures(source: Path, size: tuple[int, int]) -> tuple[list[Prompt], dict[int, Float[Tensor, "1 3 H W"]]]:
    """The prompts of the pictures in a folder or table (`reward_models.tools.picture_files.read`), numbered from 0, and
    the pictures by the prompt's number. ValueError for a picture without prompt, one that cannot be read, or one that
    has not the policy's image size (height, width)."""
    items, _ = picture_files.read(source, None)
    prompts, pictures = [], {}
    for number, item in enumerate(items):
        if item.prompt is None:
            raise ValueError(f"{source} has no prompt for {item.name}")
        prompts.append(Prompt(item.prompt.text, item.prompt.wants, number))
    for number, item in enumerate(items):
        try:
            pictures[number] = picture_files.picture(item)
        except ValueError as error:
            raise ValueError(f"{item.name} {error}") from None
        if tuple(pictures[number].shape[2:]) != size:
            (height, width), (tall, wide) = pictures[number].shape[2:], size
            raise ValueError(f"{item.name} has {width} x {height} pixels; the model draws {wide} x {tall}")
    return prompts, pictures
