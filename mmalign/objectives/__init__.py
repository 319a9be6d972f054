"""Objectives: what the policy learns from a judged rollout.

An objective gives rows to train on and their loss; the update is the same for all, and for a sum of them. Add one: a
file with a frozen dataclass that derives from `mmalign.objectives.objective.OnImages` (it learns from finished images)
or `Objective`, and its name in the table.
"""

from mmalign.objectives.advantage_flow import AdvantageFlow
from mmalign.objectives.awm import Awm
from mmalign.objectives.backprop import Backprop
from mmalign.objectives.dpo import Dpo, OnlineDpo
from mmalign.objectives.grpo import Grpo
from mmalign.objectives.nft import Nft
from mmalign.objectives.outcome import Outcome
from mmalign.objectives.rft import Rft
from mmalign.objectives.rgdpo import Rgdpo
from mmalign.objectives.srum import Srum
from mmalign.objectives.sum import Sum

OBJECTIVES = (Grpo, Nft, Awm, AdvantageFlow, Rft, Dpo, OnlineDpo, Srum, Rgdpo, Backprop, Outcome, Sum)
