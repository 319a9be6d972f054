"""Preference pairs: each layout gives exactly the pairs that its rows state."""

import io
import json

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from reward_models import Prompt, limits, pairs
from reward_models.images import from_pil
from reward_models.tools import picture_files

PICTURES = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue", "white")]


def png(number):
    file = io.BytesIO()
    PICTURES[number].save(file, "PNG")
    return file.getvalue()


def lines(tmp_path, *rows, name="pairs.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / name


def stored(tmp_path, *rows):
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def short(source, **options):
    """The names, preference and aspect of each pair."""
    return [(p.a.name, p.b.name, p.preference, p.aspect) for p in pairs.read(source, **options)]


OURS = {"image_a": "a.png", "image_b": "b.png", "prompt": "p"}


def test_choices_with_ground_truth_gap_and_ties(tmp_path):
    file = lines(
        tmp_path,
        OURS | {"chosen": "a", "gap": 0.25, "id": 7, "tag": "colors"},
        OURS | {"chosen": "B"},
        OURS | {"chosen": "tie", "aspect": "style"},
    )
    one, two, three = pairs.read(file)
    assert one.prompt == Prompt("p", {"tag": "colors"}, 7)
    assert (one.a.path, one.b.path, one.gap) == (tmp_path / "a.png", tmp_path / "b.png", 0.25)
    assert [(p.preference, p.aspect, p.gap) for p in (one, two, three)] == [
        (1.0, "", 0.25),
        (0.0, "", None),
        (0.5, "style", None),
    ]


def test_a_choice_for_each_aspect(tmp_path):
    file = lines(
        tmp_path,
        OURS | {"aspects": {"style": "a", "text": "tie"}},
        OURS | {"aspects": {"text": "b"}, "chosen": "a"},
    )
    assert short(file) == [
        ("a.png", "b.png", 1.0, "style"),
        ("a.png", "b.png", 0.5, "text"),
        ("a.png", "b.png", 1.0, ""),
        ("a.png", "b.png", 0.0, "text"),
    ]


@pytest.mark.parametrize(("name", "mark"), [("t.csv", ","), ("t.tsv", "\t")])
def test_choices_in_separated_tables(tmp_path, name, mark):
    rows = [["image_a", "image_b", "prompt", "chosen", "gap"], ["a.png", "b.png", "p", "tie", "0.5"]]
    (tmp_path / name).write_text("".join(mark.join(row) + "\n" for row in rows))
    (pair,) = pairs.read(tmp_path / name)
    assert (pair.preference, pair.gap, pair.prompt) == (0.5, 0.5, Prompt("p"))


def test_a_ranking_of_four_gives_six_pairs(tmp_path):
    images = ["0.png", "1.png", "2.png", "3.png"]
    file = lines(tmp_path, {"images": images, "ranks": [2, 1, 3, 2], "prompt": "p", "tag": "x"})
    assert short(file) == [
        ("0.png", "1.png", 0.0, ""),
        ("0.png", "2.png", 1.0, ""),
        ("0.png", "3.png", 0.5, ""),
        ("1.png", "2.png", 1.0, ""),
        ("1.png", "3.png", 1.0, ""),
        ("2.png", "3.png", 0.0, ""),
    ]
    assert {json.dumps(p.prompt.wants) for p in pairs.read(file)} == {'{"tag": "x"}'}
    same = lines(tmp_path, {"images": images, "ranking": [2, 1, 3, 2], "prompt": "p"}, name="same.jsonl")
    assert short(same) == short(file)


def pick_a_pic(first, **other):
    return {
        "jpg_0": png(0), "jpg_1": png(1), "label_0": first, "label_1": 1 - first, "caption": "p",
        "image_0_uid": "u0", "image_1_uid": "u1", "user_id": 3,
    } | other  # fmt: skip


def test_pick_a_pic(tmp_path):
    file = stored(
        tmp_path,
        pick_a_pic(1.0, has_label=True),
        pick_a_pic(0.5, has_label=True),
        pick_a_pic(0.0, has_label=True, jpg_1=png(2), image_1_uid="u2"),
        pick_a_pic(0.5, has_label=False),
    )
    messages = []
    assert short(file, warn=messages.append) == [("u0", "u1", 1.0, ""), ("u0", "u1", 0.5, ""), ("u0", "u2", 0.0, "")]
    assert messages == [f"{file}: 1 rows compare no images, and give no pair"]
    one = pairs.read(file)[0]
    assert one.prompt == Prompt("p")
    assert one.b.read().equal(from_pil([PICTURES[1]]))


def test_hpd(tmp_path):
    rows = [
        {"prompt": "p", "image_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1], "user_hash": "x"},
        {"prompt": "q", "image_path": ["c.jpg", "d.jpg"], "human_preference": [1, 1]},
        {"prompt": "r", "image_path": ["c.jpg", "d.jpg", "e.jpg"], "human_preference": [0, 1, 0]},
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(rows))
    assert short(file) == [
        ("a.jpg", "b.jpg", 0.0, ""),
        ("c.jpg", "d.jpg", 0.5, ""),
        ("c.jpg", "d.jpg", 0.0, ""),
        ("d.jpg", "e.jpg", 1.0, ""),
    ]
    file.write_text(json.dumps([{"prompt": "p", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [2, 1, 2]}]))
    assert [one[2] for one in short(file)] == [0.0, 0.5, 1.0]
    assert pairs.read(file)[0].a.path == tmp_path / "a.jpg"


def test_image_reward_db(tmp_path):
    rows = [
        {"prompt_id": "x", "prompt": "p", "image_path": "a.webp", "rank": 2, "overall_rating": 5},
        {"prompt_id": "y", "prompt": "q", "image_path": "b.webp", "rank": 1, "overall_rating": 5},
        {"prompt_id": "x", "prompt": "p", "image_path": "c.webp", "rank": 1, "overall_rating": 7},
        {"prompt_id": "x", "prompt": "p", "image_path": "d.webp", "rank": 2, "overall_rating": 5},
    ]
    messages = []
    file = stored(tmp_path, *rows)
    assert short(file, warn=messages.append) == [
        ("a.webp", "c.webp", 0.0, ""),
        ("a.webp", "d.webp", 0.5, ""),
        ("c.webp", "d.webp", 1.0, ""),
    ]
    assert len(messages) == 1
    rows[2]["prompt"] = "another"
    with pytest.raises(ValueError, match="row 3: another prompt than row 1, with the same `prompt_id`"):
        pairs.read(lines(tmp_path, *rows))


def test_chosen_and_rejected_as_bytes_and_as_datasets_stores_them(tmp_path):
    cell = {"bytes": png(1), "path": "b.png"}
    (plain,) = pairs.read(stored(tmp_path, {"chosen": png(0), "rejected": png(1), "prompt": "p", "task": "t2i"}))
    assert (plain.a.name, plain.b.name, plain.preference) == ("chosen of row 1", "rejected of row 1", 1.0)
    assert plain.prompt == Prompt("p", {"task": "t2i"})
    (nested,) = pairs.read(stored(tmp_path, {"chosen": {"bytes": png(0), "path": "a.png"}, "rejected": cell}))
    assert (nested.a.name, nested.b.name, nested.prompt) == ("a.png", "b.png", None)
    assert nested.b.read().equal(from_pil([PICTURES[1]]))


def test_datasets_of_hugging_face_keep_the_bytes_of_their_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images, one = datasets.List(datasets.Image()), datasets.Image()
    features = {"chosen": one, "rejected": one, "prompt": datasets.Value("string")}
    rows = {"chosen": [PICTURES[0]], "rejected": [PICTURES[1]], "prompt": ["p"]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "two")
    (pair,) = pairs.read(f"hf:{tmp_path / 'two'}:train")
    assert (pair.preference, pair.prompt) == (1.0, Prompt("p"))
    assert pair.b.data.startswith(b"\x89PNG")
    assert pair.b.read().equal(from_pil([PICTURES[1]]))
    ranked = {"images": images, "ranks": datasets.List(datasets.Value("int64")), "prompt": datasets.Value("string")}
    rows = {"images": [PICTURES[:3]], "ranks": [[1, 2, 3]], "prompt": ["p"]}
    datasets.Dataset.from_dict(rows, datasets.Features(ranked)).save_to_disk(tmp_path / "three")
    result = pairs.read(f"hf:{tmp_path / 'three'}:train")
    assert [p.preference for p in result] == [1.0, 1.0, 1.0]
    assert [p.b.name for p in result] == [f"images {k} of row 1" for k in (2, 3, 3)]
    with pytest.raises(ValueError, match="hf:NAME"):
        pairs.read("hf:a/b")


def test_equal_names_are_equal_images(tmp_path):
    def row(a, b):
        return {"image_a": {"bytes": png(a), "path": "x"}, "image_b": {"bytes": png(b), "path": "y"}, "chosen": "a"}

    one, two = pairs.read(stored(tmp_path, row(0, 1), row(2, 1)))
    assert (two.a.name, two.b.name) == ("x of row 2", "y")
    assert two.b is one.b


def test_score_reads_every_layout(tmp_path):
    file = stored(tmp_path, pick_a_pic(0.0), pick_a_pic(0.5))
    items, choices = picture_files.read(file)
    assert [item.name for item in items] == ["u0", "u1"]
    assert choices == [picture_files.Choice("p", "u1", "u0"), picture_files.Choice("p", "u0", "u1", tie=True)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"left": "a", "right": "b"}, "no pairs; its columns are left, right, and those of choices: image_a, image_b"),
        (OURS | {"chosen": "c"}, "row 1: `chosen` must be a, b or tie, got 'c'"),
        (OURS | {"chosen": "a", "gap": -1}, "`gap` must be at least 0, got -1"),
        (OURS | {"chosen": "a", "gap": "much"}, "`gap` must be a number, got 'much'"),
        (OURS | {"chosen": "a", "gap": True}, "`gap` must be a number, got 'True'"),
        (OURS | {"chosen": "a", "gap": 10**400}, "`gap` must be a number"),
        (OURS | {"chosen": "a", "prompt": ""}, "the prompt is blank"),
        (OURS | {"chosen": "a", "image_b": ["x"]}, "`image_b` must be the name of a file or its bytes"),
        (OURS | {"chosen": "a", "aspect": 3}, "`aspect` must be a text"),
        (OURS | {"aspects": {}}, "`aspects` must be an object"),
        (OURS | {"aspects": {"style": 1}}, "`aspects.style` must be a, b or tie, got '1'"),
        ({"images": ["a", "b"], "ranks": [1]}, "2 images but 1 ranks"),
        ({"images": ["a", "b"], "ranks": "12"}, "`ranks` must be a list, got '12'"),
        ({"images": ["a", None], "ranks": [1, 2]}, "`images` must be the name of a file or its bytes"),
        ({"images": ["a"], "ranks": [1]}, "no pairs in it"),
        ({"images": ["a", "b"], "ranks": [1, "x"]}, "`ranks` must be a number, got 'x'"),
        ({"prompt": "p", "image_path": ["a", "b"], "human_preference": 1}, "`human_preference` must be a list"),
    ],
)
def test_a_row_that_is_invalid_is_named(tmp_path, row, says):
    file = lines(tmp_path, row)
    with pytest.raises(ValueError, match="pairs") as error:
        pairs.read(file)
    assert says in str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_labels_must_sum_to_one(tmp_path):
    with pytest.raises(ValueError, match=r"row 1: `label_0` and `label_1` must be 0, 0\.5 or 1 and sum to 1"):
        pairs.read(stored(tmp_path, pick_a_pic(1.0, label_1=1.0)))


def test_the_number_of_pairs_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "PAIRS", 5)
    file = lines(tmp_path, {"images": ["a", "b", "c", "d"], "ranks": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match="row 1: more than 5 pairs; split the table"):
        pairs.read(file)


def test_a_missing_table_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl: No such file"):
        pairs.read(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="its name must end in"):
        pairs.read(tmp_path / "pairs.txt")
