"""Odd and hostile lists of prompts, tables and settings: small builders, each with what must come of it.

`READ`: name of a file, its bytes, the prompts that must come out. `REFUSED`: name, bytes, and what the one line of
refusal says. `WORDS`: words of YAML with the value that YAML 1.2's core schema gives them.
"""

import json
from io import BytesIO
from pathlib import Path

BOM = b"\xef\xbb\xbf"
ODD = "a\u2028b\u2029c\x85d\x0ce\x0bf"  # white space that str.splitlines takes for line ends and that are none

READ = {
    "a byte-order mark is no character": ("p.txt", BOM + b"a cat\n", ["a cat"]),
    "nor is it one before JSON": ("p.jsonl", BOM + b'{"prompt": "a cat"}\n', ["a cat"]),
    "nor in a heading": ("p.csv", BOM + b"prompt,id\na cat,3\n", ["a cat"]),
    "lines may end with both": ("p.txt", b"a cat\r\na dog\r\n", ["a cat", "a dog"]),
    "tables too": ("p.csv", b"prompt\r\na cat\r\na dog\r\n", ["a cat", "a dog"]),
    "lines end at a line feed alone": ("p.txt", f"{ODD}\na dog\n".encode(), [ODD, "a dog"]),
    "the same in JSON lines": ("p.ndjson", json.dumps({"prompt": ODD}, ensure_ascii=False).encode(), [ODD]),
    "the same in CSV": ("p.csv", f"prompt\n{ODD}\n".encode(), [ODD]),
    "what is not Latin is UTF-8": ("p.txt", "ein Kätzchen\n猫\n".encode(), ["ein Kätzchen", "猫"]),
    "a comma in quotes": ("p.csv", b'prompt\n"a cat, a dog"\n', ["a cat, a dog"]),
    "a line end in quotes": ("p.csv", b'prompt\n"a cat\na dog"\n', ["a cat\na dog"]),
    "quotes in quotes": ("p.csv", b'prompt\n"a ""big"" cat"\n', ['a "big" cat']),
    "a comma between tabs": ("p.tsv", b"id\tprompt\n1\ta cat, a dog\n", ["a cat, a dog"]),
    "spaces around a heading": ("p.csv", b"id , prompt\n1,a cat\n", ["a cat"]),
    "a list": ("p.json", b'[{"prompt": "a cat"}, {"prompt": "a dog"}]', ["a cat", "a dog"]),
    "an ending in capitals": ("P.CSV", b"prompt\na cat\n", ["a cat"]),
    "blank lines between rows": ("p.csv", b"prompt\n\na cat\n\n", ["a cat"]),
    "a cell that was kept from being a formula": ("p.csv", b"prompt\n'=1+1\n", ["=1+1"]),
}

REFUSED = {
    "a cell too many": ("p.csv", b"prompt,id\na cat, a dog,1\n", "row 1: 3 cells under 2 headings"),
    "a cell too few": ("p.csv", b"prompt,id\na cat,1\na dog\n", "row 2: 1 cells under 2 headings"),
    "a tab too many": ("p.tsv", b"prompt\tid\na\tb\t1\n", "row 1: 3 cells under 2 headings; a text with a tab"),
    "a heading twice": ("p.csv", b"prompt, prompt\na,b\n", "two columns are called 'prompt'"),
    "a key twice": (
        "p.jsonl",
        b'{"prompt": "a", "prompt": "b"}\n',
        "line 1: not a JSON object: 'prompt' is there",
    ),
    "a key twice but for spaces": ("p.jsonl", b'{"prompt": "a", "prompt ": "b"}\n', "two columns are called 'prompt'"),
    "quotes without an end": ("p.csv", b'prompt\n"a cat\n', "row 1: unexpected end of data"),
    "quotes that end early": ("p.csv", b'prompt\n"a" cat\n', "row 1: ',' expected after '\"'"),
    "old line ends": ("p.txt", b"a cat\ra dog\r", "line 1 holds a carriage return"),
    "old line ends in CSV": ("p.csv", b"prompt\ra cat\r", "new-line character seen in unquoted field"),
    "a blank cell": ("p.csv", b"prompt,id\na cat,1\n,2\n", "row 2: an object with a `prompt`, a text, is needed"),
    "a cell of spaces": ("p.csv", b"prompt,id\n  ,2\n", "row 1: the prompt is blank"),
    "a blank text": ("p.jsonl", b'{"prompt": " \\t"}\n', "line 1: the prompt is blank"),
    "NUL": ("p.txt", b"a cat\na \0dog\n", "line 2: the prompt holds U+0000"),
    "NUL by an escape": ("p.jsonl", b'{"prompt": "a\\u0000"}\n', "line 1: the prompt holds U+0000"),
    "a terminal's escape": ("p.csv", b"prompt\n\x1b[31ma\n", "row 1: the prompt holds U+001B"),
    "a C1 control": ("p.json", '[{"prompt": "a\x9b"}]'.encode(), "row 1: the prompt holds U+009B"),
    "half a surrogate pair": ("p.jsonl", b'{"prompt": "\\ud800"}\n', "line 1: not a JSON object: JSON with half a"),
    "a remark": ("p.txt", b"a cat\n# dogs\n", "line 2 begins with #"),
    "Latin-1": ("p.txt", b"a cat\nK\xe4tzchen\n", "line 2 is not UTF-8 (byte 0xe4)"),
    "Latin-1 in CSV": ("p.csv", b"prompt\nK\xe4tzchen\n", "line 2 is not UTF-8 (byte 0xe4)"),
    "UTF-16": ("p.txt", "a cat\n".encode("utf-16"), "the text is UTF-16; save it as UTF-8"),
    "UTF-16 JSON": ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "the text is UTF-16; save it as UTF-8"),
    "an infinite id": (
        "p.jsonl",
        b'{"prompt": "a", "id": Infinity}\n',
        "line 1: not a JSON object: Infinity is not",
    ),
    "an id too large to be finite": ("p.jsonl", b'{"prompt": "a", "id": 1e999}\n', "1e999 is too large for a number"),
    "an id that is true": ("p.jsonl", b'{"prompt": "a", "id": true}\n', "must be a whole number of 64 bits, got True"),
    "an id with a point": ("p.csv", b"prompt,id\na,1.5\n", "must be a whole number of 64 bits, got '1.5'"),
    "a thousand's underscore": ("p.csv", b"prompt,id\na,1_000\n", "must be a whole number of 64 bits, got '1_000'"),
    "ground truth that is no number": ("p.jsonl", b'{"prompt": "a", "x": NaN}\n', "line 1: not a JSON object: NaN"),
    "JSON nested deeply": ("p.jsonl", b'{"prompt": ' + b"[" * 10**5 + b"}\n", "JSON nested too deeply"),
    "a list nested deeply": ("p.json", b"[" * 10**5, "JSON nested too deeply"),
    "an object in the place of a list": ("p.json", b'{"prompt": "a"}', "a list of objects is needed, got dict"),
    "JSON lines called JSON": ("p.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', "Extra data"),
    "a list of texts": ("p.json", b'["a cat"]', "row 1: not a JSON object, but str"),
    "a number with 5,000 digits": ("p.jsonl", b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}\n", "4300 digits"),
    "YAML": ("p.yaml", b"- a cat\n", "a list of prompts is .txt, with a prompt a line, or a table: .jsonl"),
    "Markdown": ("p.md", b"a cat\n", "a list of prompts is .txt"),
    "no ending": ("prompts", b"a cat\n", "a list of prompts is .txt"),
    "a picture": ("p.png", b"\x89PNG\r\n\x1a\n", "a list of prompts is .txt"),
    "a packed table": ("p.csv.gz", b"\x1f\x8b", "a list of prompts is .txt"),
    "semicolons": ("p.csv", b"prompt;id\na cat;1\n", "no column 'prompt'; there are prompt;id"),
    "no Parquet": ("p.parquet", b"PAR1PAR1", "no Parquet that can be read"),
    "nothing": ("p.csv", b"", "no column 'prompt'"),
    "a heading alone": ("p.tsv", b"prompt\n", "no prompts in it"),
}

TEXTS = [  # that YAML 1.1 takes for something else
    "no", "No", "on", "off", "yes", "y", "n", "1_000", "0b11", "1:30", "190:20:30", "2024-01-01", "2024-01-01 10:00:00",
    "=", "<<", "0o8", "0x", "1e", "+", ".", "e1", "1__0", "nan", "inf", "none", "None", "tRUE",
]  # fmt: skip
WORDS = {text: text for text in TEXTS} | {
    "010": 10, "08": 8, "-07": -7, "+12": 12, "0": 0, "0o10": 8, "0x1F": 31, "0o17": 15, "7e-1": 0.7, "1e3": 1000.0,
    "1E+2": 100.0, ".5": 0.5, "5.": 5.0, "-1.5": -1.5, "0.0": 0.0, "~": None, "": None, "null": None, "Null": None,
    "NULL": None, "true": True, "True": True, "TRUE": True, "false": False, "FALSE": False, "'7e-1'": "7e-1",
    '"\\u2028"': "\u2028", "!!int 010": 10, "!!str 5": "5", "[no, 010]": ["no", 10], "{on: off}": {"on": "off"},
}  # fmt: skip
NO_YAML = [  # one line each, and no more than that
    "[", "{a: 1, a: 2}", "{a: {b: 1, b: 1}}", "[&a 1, *a]", "{1: 2}", "{null: 1}", "? [a]\n: 1", "--- 1\n--- 2",
    "!!timestamp 2024-01-01", "!!set {a}", "!!binary aGk=", "!!python/name:os.system", "!!int x", "!!bool no",
    "!!map [1]", "!!omap [a: 1]", "!own x", ".nan", "-.inf", "1e999", "9" * 5000, "9223372036854775808", '"\\0"',
    '"\\ud800"', "a\u2028b", "a\x85b", "[" * 3000, "a: b: c", "\t", "@a", "%", "*", "&",
]  # fmt: skip


def stored(pictures: list[bytes | None], paths: list[str | None], prompts: list[str]) -> bytes:
    """Parquet as `datasets` writes it: each picture's file in a column of `{bytes, path}`."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"image": {"bytes": data, "path": path}, "prompt": prompt}
        for data, path, prompt in zip(pictures, paths, prompts, strict=True)
    ]
    file = BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def folder_of_all_kinds(folder: Path, picture: bytes) -> tuple[list[str], str]:
    """A folder with everything that lies about in folders of pictures: the names that must be scored, and what must be
    said of the rest."""
    scored = ["00000/samples/0000.png", "00000/samples/0001.jpg", "a.PNG", "b.tif", "c.gif", "d.avif", "grid.png"]
    aside = [
        "._a.png", ".ipynb_checkpoints/a-checkpoint.png", ".thumbnails/a.png", "checkpoints/a.png", "Thumbs/a.png",
        "00000/grid.png", "notes.md", "LICENSE",
    ]  # fmt: skip
    for name in scored + aside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture)
    (folder / "00000/metadata.jsonl").write_text('{"prompt": "a cat"}\n')
    (folder / "a.txt").write_text("a caption\n")
    return scored, "1 x .md, 1 x GenEval's grid, 1 x LICENSE, 3 x hidden, 2 x of checkpoints or thumbnails"
