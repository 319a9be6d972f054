"""Selection: which of a prompt's images are learnt from.

A selection is called as `selection(reward [N], prompt [N]) -> Bool [N]` on the trajectories of all ranks, and never
reads a latent or an image. `scouts` chooses before images are sampled in full, by the same rule. Add one: a short file
here, a frozen dataclass with its settings that derives from `mmalign.selection.selection.Selection`, and its name in
the table.
"""

from mmalign.selection.extremes import Extremes

SELECTIONS = (Extremes,)
