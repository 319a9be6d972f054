"""Credit: from rewards to advantages over steps and latent positions.

A credit is called as `credit(tree, judged, units) -> advantages [N, T, a, b]`; it never sees a latent or an image. What
it gives a deterministic step is not learnt from. The grid `a b` is 1x1 unless the credit is regional. Add one: a short
file here, a frozen dataclass with its settings derived from `mmalign.credit.groups.Credit`, and its name in the table.
"""

from mmalign.credit.branch import Branch
from mmalign.credit.gain import Gain
from mmalign.credit.more.implicit import Implicit
from mmalign.credit.more.mix import Mix as Mix  # a list of credits in a config
from mmalign.credit.more.prl import Prl
from mmalign.credit.more.renorm import Renorm
from mmalign.credit.more.value import Value
from mmalign.credit.terminal import Terminal

CREDITS = (Terminal, Branch, Gain, Value, Implicit, Renorm, Prl)
