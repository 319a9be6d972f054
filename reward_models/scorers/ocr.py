"""`ocr`: whether the requested text is written in the image. The text reward of Flow-GRPO (arXiv 2505.05470), read by
PP-OCR (arXiv 2009.09941) through rapidocr, whose wheel contains the models: nothing is downloaded.

The requested text is `Prompt.wants["text"]`, otherwise the text in the prompt's first pair of double quotes, straight
or typographic. Texts are compared after NFKC, in lower case and without white space. Two scores per image, in [0, 1],
higher is better, comparable across prompts:

- `match`: 1 if the requested text occurs in the text read, else 1 - edit distance / length of the requested text, at
  least 0.
- `exact`: 1 if the text read is the requested text and nothing else, else 0; it penalises surplus text, `match` does
  not.

An image in which nothing is read scores 0. Not measured: upper and lower case, spaces, the look of the letters,
malformed but legible letters, text that is upside down, letters of a few pixels. Licence of the models and of rapidocr:
Apache-2.0. Not checked against scores made with PaddleOCR.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib.metadata import version
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from jaxtyping import UInt8

from reward_models.files import lines
from reward_models.images import to_uint8
from reward_models.model_folders import loading
from reward_models.regions import Region, paint
from reward_models.scorers.shapes import edit_distance
from reward_models.scoring import each
from reward_models.types import Card, Images, Prompt, Scores

DETECTOR, READER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"  # in rapidocr's wheel
QUOTED = re.compile('["“”„‟]([^"“”„‟]*)["“”‟]')
Box = tuple[int | float, int | float, int | float, int | float]


@dataclass(frozen=True)
class Line:
    """A piece of text and its box: (left, top, right, bottom) in pixels."""

    text: str
    box: Box


def plain(text: str) -> str:
    """The text in the form in which texts are compared: NFKC, lower case, no white space."""
    return "".join(normalize("NFKC", text).lower().split())


def wanted(prompt: Prompt) -> list[str]:
    """The requested words, each `plain`. ValueError if the prompt requests no text."""
    quoted = QUOTED.search(prompt.text)
    text = prompt.wants.get("text", quoted and quoted[1])
    if text is None:
        raise ValueError("the prompt requests no text: no `text` in wants, no double quotes in the prompt")
    if not isinstance(text, str) or not plain(text):
        raise ValueError(f"the requested text is {text!r}; at least one letter is needed")
    return [word for word in map(plain, text.split()) if word]


def matched(target: str, read: str) -> float:
    """`match` of plain texts: 1 - distance / length of the target, with distance 0 if the target occurs in `read`."""
    distance = 0 if target in read else min(edit_distance(read, target), len(target))
    return 1 - distance / len(target)


def in_order(lines: Sequence[Line]) -> list[Line]:
    """Top to bottom, and left to right within a row. A line belongs to a row if its middle is within the height of the
    row's first box."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.box[1] + line.box[3]):
        _, top, _, bottom = rows[-1][0].box if rows else line.box
        if rows and top < (line.box[1] + line.box[3]) / 2 < bottom:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line.box[0])]


def words(line: Line) -> list[Line]:
    """The words of a line, each with its share of the box, as if all letters had the same width. In a box that is
    higher than wide, each word gets the complete box."""
    left, top, right, bottom = line.box
    if bottom - top > right - left:
        return [Line(word, line.box) for word in line.text.split()]
    width = (right - left) / len(line.text)
    return [
        Line(piece[0], (left + width * piece.start(), top, left + width * piece.end(), bottom))
        for piece in re.finditer(r"\S+", line.text)
    ]


def credited(target: Sequence[str], lines: Sequence[Line]) -> list[Region]:
    """The words read, each with the credit 2 · share - 1, where share is the share of its letters that match letters of
    the target, in the target's order: 1 for a word of the target, -1 for a word that does not belong to it. The label
    is the word of the target that most of these letters belong to, the reason is the word read."""
    pieces = [(word, plain(word.text)) for line in lines for word in words(line)]
    read = "".join(letters for _, letters in pieces)
    of_letter = np.repeat(np.arange(len(target)), [len(word) for word in target])
    meant = np.full(len(read), -1)
    for block in SequenceMatcher(None, "".join(target), read, autojunk=False).get_matching_blocks():
        meant[block.b : block.b + block.size] = of_letter[block.a : block.a + block.size]
    regions, end = [], 0
    for word, letters in pieces:
        start, end = end, end + len(letters)
        votes = np.bincount(meant[start:end][meant[start:end] >= 0])
        label = f"{votes.argmax() + 1} {target[votes.argmax()]}" if votes.size else ""
        if letters:
            regions.append(Region(word.box, float(2 * votes.sum() / len(letters) - 1), label, word.text))
    return regions


class Ocr:
    """The scorer. Text read with less than `confidence`, in [0, 1], is ignored. `detector` and `reader` are ONNX files
    of PP-OCR's two stages, by default those in rapidocr's wheel; another script needs another reader. `grid` is the
    side of the region map, which holds the credits of the words. ValueError if rapidocr or a file cannot be loaded."""

    names = ("match", "exact")

    def __init__(
        self, confidence: int | float = 0.5, detector: str | None = None, reader: str | None = None, grid: int = 8
    ):
        try:
            import onnxruntime  # noqa: F401  (rapidocr can be installed without an engine)
            import rapidocr
        except ImportError as error:
            raise ValueError(f"ocr: {error}; pip install 'mmalign[ocr]'") from error
        if not 0 <= confidence <= 1:
            raise ValueError(f"ocr: confidence is 0 to 1, not {confidence!r}")
        folder = Path(rapidocr.__file__).parent / "models"
        files = [Path(detector or folder / DETECTOR), Path(reader or folder / READER)]
        chosen = {"Det.model_path": str(files[0]), "Rec.model_path": str(files[1]), "Global.text_score": confidence}
        with loading("ocr", " and ".join(file.name for file in files)):
            checkpoint = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
            # rapidocr warns about images without text; failures raise
            chosen |= {"Global.use_cls": False, "Global.log_level": "critical"}
            # by default onnxruntime takes every core, and competes with torch
            chosen["EngineConfig.onnxruntime.intra_op_num_threads"] = torch.get_num_threads()
            self.engine = rapidocr.RapidOCR(params=chosen)
            for stage in (False, True):  # each model is loaded when it is first used
                self._run(np.zeros((32, 32, 3), np.uint8), use_det=stage)
        self.grid = grid
        self.card = Card(
            "ocr",
            model=" ".join(file.stem for file in files),
            licence="the models' own" if detector or reader else "Apache-2.0",
            low=0,
            high=1,
            comparable_across_prompts=True,
            has_map=True,
            size="any size; the shorter side is scaled up to 736 px",
            checkpoint=checkpoint,
            settings={"confidence": confidence, "grid": grid, "rapidocr": version("rapidocr")},
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return each(images, prompts, self.names, self._score_batch, batch=1)

    def _score_batch(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        (image,), (prompt,) = to_uint8(images).cpu().permute(0, 2, 3, 1).numpy(), prompts
        target = wanted(prompt)
        requested = "".join(target)
        lines = self.read(image)
        read = " ".join(line.text for line in lines)
        exact = plain(read) == requested
        regions = credited(target, lines)
        return Scores(
            self.names,
            torch.tensor([[matched(requested, plain(read)), float(exact)]]),
            ("right" if exact else f"reads {read!r}" if read else "nothing to read",),
            paint(regions, tuple(images.shape[2:]), (self.grid, self.grid))[None],
            boxes=(tuple(regions),),
        )

    def read(self, image: UInt8[np.ndarray, "H W 3"]) -> list[Line]:
        """The lines of text in an RGB image, in reading order. RuntimeError if the engine fails."""
        output = self._run(image)
        if output.txts is None:
            return []
        low, high = output.boxes.min(1), output.boxes.max(1)  # [M, 2] of four corners each
        boxes = np.concatenate([low, np.maximum(high, low + 1)], 1).tolist()
        return in_order([Line(text, tuple(box)) for text, box in zip(output.txts, boxes, strict=True)])

    def _run(self, image: UInt8[np.ndarray, "H W 3"], **stages: bool):
        try:
            return self.engine(np.ascontiguousarray(image[..., ::-1]), **stages)  # BGR, as in OpenCV
        except Exception as error:  # its exceptions have no other common base; the message is a traceback
            reason = lines(str(error).strip()) or [type(error).__name__]
            raise RuntimeError(f"the engine failed: {reason[-1]}") from error
