"""Extension: further trajectories of an iteration, by what its judged rollout shows.

An extension is called as `extension(tree, judged, requests) -> Draws`: the states from which the rest of a trajectory
is drawn again, round by round until it wants none. It never reads a latent or an image. Add one: a short file here, a
frozen dataclass with its settings that derives from `mmalign.extension.extension.Extension`, and its name in the table.
"""

from mmalign.extension.frontier import Frontier
from mmalign.extension.revise import Revise
from mmalign.extension.salvage import Salvage

EXTENSIONS = (Frontier, Salvage, Revise)
