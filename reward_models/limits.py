"""What a stranger may make this project hold or wait for: one bound for each kind of thing.

A bound is checked before the thing is read, decoded or waited for, and its breach is a reason or a line that names the
value and the bound.
"""

TEXT = 2**30  # bytes of a file of text: prompts, tables, rows of a run
PIXELS = 64 * 2**20  # pixels of a picture on disk: 8192 x 8192, 768 MiB as float32
CONFIG = 16 * 2**20  # bytes of a JSON file of settings in a model's folder
TEMPLATE = 2**20  # bytes of a chat template
VOCABULARY = 256 * 2**20  # bytes of a tokenizer's file
SIDE = 8192  # pixels of a side of the images that a model is shown
LAYERS = 200  # layers, blocks or levels that a model's config may ask for
STEPS = 100_000  # training steps that a scheduler may count
