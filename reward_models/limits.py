"""What a stranger may make this project hold or wait for: one bound for each kind of thing.

A bound is checked before the thing is read, decoded or waited for, and its breach is a reason or a line that names the
value and the bound.
"""

TEXT = 2**30  # bytes of a file of text: prompts, tables, rows of a run
JSON = 2**26  # bytes of JSON parsed at once: a table .json, a line of a .jsonl; parsed it takes up to 24 times as much
ROWS = 10**7  # rows of a table, and lines of a list of prompts
PICTURE = 2**28  # bytes of a picture file
PIXELS = 2**25  # pixels of a picture on disk: 8192 x 4096, 384 MiB as float32

# the reward service
IMAGE = 2048 * 2048  # pixels of one image in a request
TOGETHER = 2**25  # pixels of the images of one request, and of one batch: 384 MiB as float32
AT_ONCE = 2**23  # pixels that a scorer is shown at once, if its images do not depend on each other, or one image
QUEUED = 2**29  # pixels of the images that wait
BODY = 2**27  # bytes of a request
BODIES = 2**28  # bytes of all requests that have no answer yet
VALUES = 2**17  # values in the JSON of a request or an answer
PROMPT = 2**15  # characters of a prompt
WANTS = 2**16  # bytes of a prompt's ground truth as JSON
DEPTH = 32  # lists and objects within each other in it
NAMES = 256  # scorers that one request asks
HEAD = 10  # seconds until a connection has sent the head of its next request, and taken its last answer
ARRIVAL = 60  # seconds until the body of a request is here
CONNECTIONS = 512  # at once

# clients of services and judges
ANSWER = 2**22  # bytes of an answer
REPLY = 2**18  # characters of a judge's reply

# adapters and checkpoints
TENSORS = 2**33  # bytes of a safetensors file: an adapter, its average, its optimiser's state
TENSORS_HEADER = 2**24  # bytes of such a file's header, which names each tensor: about 100 for one
STATE = 2**26  # bytes of a checkpoint's state and manifest, and of an adapter's config

# model folders
CONFIG = 16 * 2**20  # bytes of a JSON file of settings in a model's folder
TEMPLATE = 2**20  # bytes of a chat template
VOCABULARY = 256 * 2**20  # bytes of a tokenizer's file
SIDE = 8192  # pixels of a side of the images that a model is shown
LAYERS = 200  # layers, blocks or levels that a model's config may ask for
STEPS = 100_000  # training steps that a scheduler may count
