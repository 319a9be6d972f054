"""Limits on the memory and time that untrusted input may cost.

A limit is checked before the input is read, decoded or waited for; an error names the value and the limit.
"""

TEXT = 2**30  # bytes of a file of text: prompts, tables, rows of a run
JSON = 2**26  # bytes of JSON parsed at once: a table .json, a line of a .jsonl; parsed it takes up to 24 times as much
ROWS = 10**7  # rows of a table, and lines of a list of prompts
PAIRS = 10**6  # preference pairs of one source: about 1 GB of records
PICTURE = 2**28  # bytes of a picture file
HEADER = 2**20  # bytes of a header of a tar's member
MEMBERS = 64  # members of a sample in a tar
CAPTION = 2**20  # bytes of a text or JSON in a tar
PIXELS = 2**25  # pixels of a picture on disk: 8192 x 4096, 384 MiB as float32

# the reward service
IMAGE = 2048 * 2048  # pixels of one image in a request
TOGETHER = 2**25  # pixels of the images of one request, and of one batch: 384 MiB as float32
AT_ONCE = 2**23  # pixels in one call of a scorer whose images do not depend on each other, at least one image
QUEUED = 2**29  # pixels of the waiting images
BODY = 2**27  # bytes of a request
BODIES = 2**28  # bytes of all open requests
VALUES = 2**17  # values in the JSON of a request or an answer
PROMPT = 2**15  # characters of a prompt
WANTS = 2**16  # bytes of a prompt's ground truth as JSON
DEPTH = 32  # nesting of lists and objects in it
NAMES = 256  # scorers in one request
HEAD = 10  # seconds for a connection to send the head of its next request, and to read its last answer
ARRIVAL = 60  # seconds for the body of a request to arrive
CONNECTIONS = 512  # simultaneous

# clients of services and judges
ANSWER = 2**22  # bytes of an answer
REPLY = 2**18  # characters of a judge's reply
WRITTEN = 10**6  # prompts whose criteria or descriptions, which a judge has written, are kept

# adapters and checkpoints
TENSORS = 2**33  # bytes of a safetensors file: an adapter, its average, its optimiser's state
TENSORS_HEADER = 2**24  # bytes of such a file's header, which names each tensor: about 100 for one
STATE = 2**26  # bytes of a checkpoint's state and manifest, and of an adapter's config

# model folders
CONFIG = 16 * 2**20  # bytes of a JSON file of settings in a model's folder
TEMPLATE = 2**20  # bytes of a chat template
VOCABULARY = 256 * 2**20  # bytes of a tokenizer's file
SIDE = 8192  # pixels of a side of a model's input images
LAYERS = 200  # layers, blocks or levels in a model's config
STEPS = 100_000  # training steps of a scheduler
