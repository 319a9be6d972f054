"""Credit: from what the reward models saw to advantages over steps and latent positions.

A credit is a function `(Trajectories, Judgement, **settings) -> advantages [N, T, a, b]`; credit never sees an image.
The grid `a b` is 1x1 unless the credit says where in the image. Add one: a short file here and a line in the table.
"""

from collections.abc import Callable

from mmalign.credit.branch import branch
from mmalign.credit.gain import gain
from mmalign.credit.terminal import terminal

CREDITS: dict[str, Callable] = {"terminal": terminal, "branch": branch, "gain": gain}
