"""What a stranger may make this project hold or wait for: one bound for each kind of thing.

A bound is checked before the thing is read, decoded or waited for, and its breach is a reason or a line that names the
value and the bound.
"""

TEXT = 2**30  # bytes of a file of text: prompts, tables, rows of a run
PIXELS = 64 * 2**20  # pixels of a picture on disk: 8192 x 8192, 768 MiB as float32
TENSORS = 2**33  # bytes of a safetensors file: an adapter, its average, its optimiser's state
TENSORS_HEADER = 2**24  # bytes of such a file's header, which names each tensor: about 100 for one
STATE = 2**26  # bytes of a checkpoint's state and manifest, and of an adapter's config
