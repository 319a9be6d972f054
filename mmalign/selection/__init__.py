"""Selection: which of a prompt's images are learnt from.

A selection is called as `selection(reward [N], prompt [N]) -> Bool [N]` on the trajectories of all ranks, or has a
`choose(tree, judged) -> Bool [N]` that reads more than rewards. It never reads a latent or an image. `scouts` chooses
before images are sampled in full, by the rule of `extremes`. Add one: a short file here, a frozen dataclass with its
settings that derives from `mmalign.selection.selection.Selection`, and its name in the table.
"""

from mmalign.selection.extremes import Extremes
from mmalign.selection.prof import Prof

SELECTIONS = (Extremes, Prof)
