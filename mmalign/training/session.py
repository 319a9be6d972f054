"""Everything a run needs, loaded and checked before anything is written."""

from dataclasses import dataclass

from torch import Tensor

from mmalign.config.schema import Config
from mmalign.data.judged_images import Records
from mmalign.data.prompts import PromptBatches
from mmalign.distributed.processes import Ranks
from mmalign.policy.protocol import Trainable
from mmalign.rewards.rewards import Rewards
from mmalign.training.clock import Clock
from mmalign.training.learner import Learner
from mmalign.training.microbatch import AdaptiveBatch
from mmalign.training.planning import Cost
from mmalign.training.refit import Refit
from mmalign.training.step_rewards import StepRewards
from mmalign.training.values import Head, Values
from reward_models import Prompt


@dataclass(frozen=True)
class Session:
    """Everything a run needs, built once by `open_session`.

    `config` is the one after the planner has fitted it to the budget; `prompts(iteration)` are those of an iteration,
    until they are learnt from; `times` the schedule of the rollout; `cost` an iteration's. `records` are the judged
    images to learn from instead of rollouts, if any. `origin` names by hash what the run is made of, which must not
    change under it. `fits` bounds the rows of the config's `batch` and `decode_batch` by what memory allows. `refit`
    fits a reward again, if the config has a `refresh`. Where the credit has them: `values`, the value head;
    `step_rewards`, those of steps that an adapter learns. `scouting` is the head of another run that scouts read.
    """

    config: Config
    policy: Trainable
    prompts: PromptBatches
    held_out: list[Prompt]
    times: Tensor
    cost: Cost
    rewards: Rewards
    learner: Learner
    records: Records | None
    origin: dict[str, str]
    clock: Clock
    fits: dict[str, AdaptiveBatch]
    ranks: Ranks
    refit: Refit | None = None
    values: Values | None = None
    scouting: Head | None = None
    step_rewards: StepRewards | None = None

    def fitted(self) -> dict[str, int]:
        """The rows at once of the batches that memory has made smaller, as a row for the metrics."""
        fits = self.fits | {"micro_batch": self.learner.micro_batch}
        return {f"fit/{name}": fit.rows for name, fit in fits.items() if fit.rows < getattr(self.config, name)}
