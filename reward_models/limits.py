"""What a stranger may make this project hold or wait for: one bound for each kind of thing.

A bound is checked before the thing is read, decoded or waited for, and its breach is a reason or a line that names the
value and the bound.
"""

TEXT = 2**30  # bytes of a file of text: prompts, tables, rows of a run
PICTURE = 2**28  # bytes of a picture file
PIXELS = 2**25  # pixels of a picture on disk: 8192 x 4096, 384 MiB as float32
