"""What a stranger may make this project hold or wait for: one bound for each kind of thing.

A bound is checked before the thing is read, decoded or waited for, and its breach is a reason or a line that names the
value and the bound.
"""

TEXT = 2**30  # bytes of a file of text: prompts, tables, rows of a run
PIXELS = 64 * 2**20  # pixels of a picture on disk: 8192 x 8192, 768 MiB as float32
JSON = 2**26  # bytes of JSON parsed at once: a table .json, a line of a .jsonl; parsed it takes up to 24 times as much
ROWS = 10**7  # rows of a table, and lines of a list of prompts
