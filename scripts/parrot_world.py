"""Distil a critic of the embedded world from preferences, as PARROT of RationalRewards does, and measure it.

    OMP_NUM_THREADS=1 python scripts/parrot_world.py

The pairs are those of `scripts/compare_fits.py`: images of the embedded model, labelled by the verifier. The teacher is
a chat server on this machine that writes its replies from the verifier. The student is a Qwen2-VL of a million weights,
which first learns to describe drawings of the world. It is measured on pairs of other captions, beside itself before
the distillation, and a Bradley-Terry head on the same pairs. Files are written below `--out`, where a second run
continues.
"""

import json
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from compare_fits import collected
from torch import Tensor

from reward_models import Prompt, files, limits, load
from reward_models.images import PNG, from_base64, from_pil
from reward_models.scorers.shapes import find_blobs, judge
from reward_models.shapes_world import COLOURS, LARGE_MIN, SIDE, SMALL_MAX, draw, requests, understood
from reward_models.training import evaluate, fit, parrot
from reward_models.training.parrot import student
from reward_models.training.parrot.samples import ASPECTS, reply_of, tidy
from reward_models.verdicts import UNKNOWN, Blob, revised
from reward_models.vlm import critiques
from reward_models.vlm.templates import quoted
from reward_models.vlm.types import Question
from reward_models.worlds import caption

LONGEST = 2**20  # bytes of a question to the teacher
MAIN = "student.overall"  # what is compared with the others
REQUEST = "The request: "  # begins the line of the request in a question
CELL = 4  # px: positions are described in such steps


def described(blobs: Sequence[Blob]) -> str:
    """What there is in a picture: size, colour, shape and position of each object, from left to right."""
    words = []
    for blob in sorted(blobs, key=lambda blob: (blob.centre, blob.colour)):
        size = "small" if blob.extent <= SMALL_MAX else "large" if blob.extent >= LARGE_MIN else "medium"
        x, y = (int(edge // CELL) for edge in blob.centre)
        words.append(f"{size} {blob.colour} {blob.name} at {x} {y}")
    return "; ".join(words) or "nothing"


def tokenizer_of(texts: Sequence[str]) -> Any:
    """A tokenizer of bytes and of the pieces of words that are frequent in the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=sorted(letters), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=MARKS[0], eos_token=MARKS[2])
    fast.add_special_tokens({"additional_special_tokens": MARKS})
    return fast


MARKS = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def new_model(tokenizer: Any, seed: int) -> tuple[Any, Any]:
    """A Qwen2-VL of random weights that sees a picture of 32 x 32 pixels as 16 tokens, and its processor."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    pixels = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    images = Qwen2VLImageProcessor(size=pixels, patch_size=4, merge_size=2)
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    processor.tokenizer.padding_side = "left"
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    text = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3}
    text |= {"intermediate_size": 384, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        vision_config={
            "depth": 3, "embed_dim": 96, "num_heads": 3, "hidden_size": 128, "mlp_ratio": 3, "patch_size": 4,
            "spatial_merge_size": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, processor


def describe(image: Tensor) -> Question:
    """The question of the pretraining."""
    return Question((image, "\ndescribe"))


def notes(prompt: Prompt, blobs: Sequence[Blob]) -> dict[str, Any]:
    """A critique of an image in the form that the teacher's question asks for, from the verdict of the verifier."""
    verdict = judge(prompt, blobs)
    clean = [blob for blob in blobs if blob.name != UNKNOWN]
    score = round(1 + 3 * verdict.partial, 1)
    right = {"justification": f"{described(blobs)}. {verdict.critique}", "score": score}
    text = {"justification": verdict.critique, "score": score} if prompt.wants["tag"] == "text" else None
    quality = {
        "justification": f"{len(clean)} of {len(blobs)} objects are clean",
        "score": round(1 + 3 * len(clean) / max(1, len(blobs)), 1),
    }
    request = "" if verdict.strict or prompt.wants["tag"] == "text" else revised(prompt, verdict.regions, COLOURS, SIDE)
    none = {"justification": "", "score": None}
    return {"faithfulness": right, "quality": quality, "text": text or none, "refined_request": request}


# ------------------------------------------------------------------------------------------------------------- teacher


def answer(request: Mapping[str, Any]) -> str:
    """The teacher's reply: the notes, or to a question without the label the image with the higher score."""
    content = request["messages"][-1]["content"]
    text = "".join(part["text"] for part in content if part["type"] == "text")
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    pictures = [from_base64(url.removeprefix(PNG), limits.IMAGE) for url in urls]
    request_line = next(line for line in text.split("\n") if line.startswith(REQUEST))
    prompt = Prompt(json.loads(request_line.removeprefix(REQUEST)))
    prompt = Prompt(prompt.text, understood(prompt.text))
    first, second = find_blobs(from_pil(pictures).numpy())
    if "The better picture" in text:
        return json.dumps({"image_1": notes(prompt, first), "image_2": notes(prompt, second)})
    difference = judge(prompt, first).partial - judge(prompt, second).partial
    return f"<answer>{'tie' if difference == 0 else f'Image {1 if difference > 0 else 2} is better'}</answer>"


class Teacher(BaseHTTPRequestHandler):
    """Answers chat completions, one bounded request after another."""

    protocol_version, timeout = "HTTP/1.1", 10

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LONGEST:
            self.send_error(413)
            return
        reply = answer(files.parsed(self.rfile.read(length)))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
        body = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[str]:
    """The address of the teacher, on this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------------------------- student


def corpus(seed: int) -> list[str]:
    """Descriptions and critiques of random drawings of random captions: what the tokenizer is made of."""
    rng, wants = np.random.default_rng(seed), requests()
    images = np.stack([draw(wants[i], rng) for i in rng.integers(len(wants), size=1000)])
    texts = ["<|im_start|>user\ndescribe\n", "assistant\n"] * 100
    for blobs in find_blobs(images):
        request = wants[rng.integers(len(wants))]
        written = notes(Prompt(caption(request), request), blobs)
        critique = tidy(critiques.read(json.dumps(written), ASPECTS))
        texts += [described(blobs), quoted(caption(request)), reply_of(critique)]
    return texts


def pretrain(folder: Path, steps: int, seed: int, batch: int = 32, rate: float = 1e-3) -> None:
    """Train a model of random weights to describe drawings of the world, all its parameters, and write it."""
    rng = np.random.default_rng(seed)
    wants = requests()
    model, processor = new_model(tokenizer_of(corpus(seed)), seed)
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    start, total = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        images = np.stack([draw(wants[i], rng) for i in rng.integers(len(wants), size=batch)])
        replies = [student.reply_tokens(model, processor, described(blobs)) for blobs in find_blobs(images)]
        inputs, targets = student.encode(processor, [describe(one) for one in torch.from_numpy(images)], replies, "cpu")
        losses, counts = student.token_losses(model, inputs, targets)
        loss = losses.sum() / counts.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step}: loss {total / 50:.3f}, {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
    student.save(model.eval(), processor, folder)


def main(
    out: Annotated[Path, typer.Option(help="folder of images, rationales and models")] = Path("runs/parrot"),
    pairs: Annotated[int, typer.Option(min=10, help="pairs that the teacher gets")] = 2000,
    steps: Annotated[int, typer.Option(min=1, help="of 32 drawings, that the student is pretrained for")] = 1500,
    epochs: Annotated[int, typer.Option(min=1, help="of the distillation at most")] = 12,
    rank: Annotated[int, typer.Option(min=0, help="of LoRA; 0 trains the language model itself")] = 0,
    rate: Annotated[float, typer.Option(help="of the distillation")] = 1e-3,
    captions: Annotated[str, typer.Option(help="those that are measured on: validation or test")] = "test",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    every = collected("train", range(6), out / "train")
    train = random.Random(0).sample(every, min(pairs, len(every)))
    held_out = collected(captions, range(4), out / captions)
    short, base, student_folder = (
        out / "short.txt",
        out / f"base-{steps}-{seed}",
        out / f"student-{rank}-{rate:g}-{epochs}-{seed}",
    )
    files.write(short, "{image}\n{prompt}")
    seconds = {}
    if not (base / "config.json").exists():
        start = time.monotonic()
        pretrain(base, steps, seed)
        seconds["pretraining"] = time.monotonic() - start
    start = time.monotonic()
    with serving() as url:
        by = parrot.teacher("verifier", url, candidates=1, concurrency=4)
        print(json.dumps(parrot.rationalise(train, by, out / "rationales")), flush=True)
    seconds["rationales"] = time.monotonic() - start
    if not (student_folder / "card.json").exists():
        start = time.monotonic()
        settings = {"rank": rank or None, "learning_rate": rate, "epochs": epochs, "batch": 32, "together": 32}
        card = parrot.distil(
            out / "rationales", student_folder, model=str(base), instruction=str(short), seed=seed, **settings
        )
        print(json.dumps({key: card[key] for key in ("samples", "epoch", "losses")}), flush=True)
        seconds["distillation"] = time.monotonic() - start
    head = out / "head"
    if not (head / "card.json").exists():
        fit(train, head)
    asking = {"instruction": str(short), "batch": 64, "tokens": 256}
    scorers = {
        "untrained": load("rational", model=str(base), **asking),
        "student": load("rational", model=str(student_folder), **asking),
        "clip_head": load("fitted", folder=str(head)),
        "clip": load("clip"),
    }
    start = time.monotonic()
    result = evaluate(held_out, scorers)
    seconds["evaluation"] = time.monotonic() - start
    files.replace(student_folder / f"{captions}.json", json.dumps(result).encode())
    print(json.dumps({key: round(value) for key, value in seconds.items()}))
    report(result, len(train), captions)


def report(result: Mapping[str, Any], count: int, captions: str) -> None:
    """Print the accuracies, and for the student the exact test of McNemar against the others."""
    print(f"{count} pairs to learn from; {captions}: {result['pairs']} pairs of {result['prompts']} captions\n")
    print("| | ties half | 95 % | without ties | pairs | no score | p |\n|---|---|---|---|---|---|---|")
    for name, row in result["rewards"].items():
        half, decided = row["with_ties"], row["accuracy"]
        if half["mean"] is None:
            print(f"| `{name}` | | | | 0 | {row['missing']} | |")
            continue
        p = next(
            (f"{v['p']:.2g}" for pair, v in result["compared"].items() if {*pair.split(" ~ ")} == {name, MAIN}), ""
        )
        interval = f"{half['low']:.3f} to {half['high']:.3f}"
        shown = f"{half['mean']:.3f} | {interval} | {decided['mean']:.3f} | {decided['pairs']}"
        print(f"| `{name}` | {shown} | {row['missing']} | {p} |")


if __name__ == "__main__":
    typer.run(main)
