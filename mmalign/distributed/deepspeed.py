"""DeepSpeed's ZeRO stage 2: each rank stores and steps a shard of the moments and of the summed gradient.

The adapter is complete on each rank and is the source: its shard is read again before each step, so that code that
loads an adapter need not know of DeepSpeed. Gradients accumulate on each rank as usual and are summed once a step, so
that ranks may replay different numbers of rows, and start again where memory does not suffice.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from mmalign.distributed.processes import Ranks
from mmalign.errors import BadInput, refusing
from mmalign.learn.update import Bounded

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")
DECIDED = {  # settings that the run decides: nothing is averaged or clipped a second time
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_allreduce_op": "sum",
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}


class ZeroOptimizer(Optimizer):
    """The AdamW `optimizer` of the trainable parameters of `network`, sharded over `ranks`.

    All ranks must call each method. `state_dict` is complete, in the form that `optimizer` has in one process. Raises
    BadInput where DeepSpeed would do something else.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.AdamW, ranks: Ranks):
        self.parameters: list[Parameter] = [*optimizer.param_groups[0]["params"]]
        super().__init__(self.parameters, optimizer.defaults)
        self.ranks, self.adamw = ranks, optimizer
        self.engine = _engine(network, optimizer, self.parameters, ranks)
        self.any_gradient = False

    def summing(self, bounded: Bounded) -> Bounded:
        """`bounded`, after whose work the gradients of all ranks are summed, and each rank has its shard of the sum."""

        def run(work: Callable[[int], T]) -> T:
            with ExitStack() as adding:
                adding.enter_context(self.engine.coalesce_grad_reduction())
                try:
                    done = bounded(work)
                    what = "the sum of the gradients"
                    self.any_gradient = self.ranks.any(any(p.grad is not None for p in self.parameters), what)
                    for p in self.parameters if self.any_gradient else ():
                        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    with self.ranks.collective(what):
                        adding.close()
                except BaseException:
                    self.zero_grad()  # else it would be summed on the way out, which waits for the others
                    raise
            return done

        return run

    def add_gradients(self, parameters: Sequence[Parameter]) -> bool:
        """Whether any rank had a gradient; they are summed already."""
        return self.any_gradient

    def clip(self, parameters: Sequence[Parameter], bound: float) -> float:
        """The norm of the summed gradient, infinite where it is not finite; `step` will clip it to `bound`."""
        self.engine.optimizer.clip_grad = bound
        with self.ranks.collective("the norm of the gradient"):
            return float(self.engine.optimizer.scaled_global_norm())

    def padded(self, forwards: int) -> int:
        return forwards

    def all_gather_object(self, value: Any, what: str) -> list[Any]:
        return self.ranks.all_gather_object(value, what)

    def step(self, closure: None = None) -> None:
        for group, inner in zip(self.param_groups, self.adamw.param_groups, strict=True):
            inner.update({name: value for name, value in group.items() if name != "params"})
        self.engine.optimizer.refresh_fp32_params()
        with self.ranks.collective("the optimiser's step"):
            self.engine.step()

    @property
    def _shard(self) -> torch.Tensor:
        """This rank's shard of the parameters, to which the moments belong."""
        return self.adamw.param_groups[0]["params"][0]

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        if self._shard in self.adamw.state:
            step = self.adamw.state[self._shard]["step"]
            with self.ranks.collective("the optimiser's state"):
                for i, p in enumerate(self.parameters):
                    state[i] = {"step": step} | {name: safe_get_full_optimizer_state(p, name) for name in MOMENTS}
        return super().state_dict() | {"state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Matrices without moments, because they have had no gradient, start with 0."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

        super().load_state_dict(state_dict | {"state": {}})
        self.adamw.state.clear()
        moments = state_dict["state"]
        if moments:
            steps = max(each["step"] for each in moments.values())
            self.adamw.state[self._shard] = {"step": steps} | {name: torch.zeros_like(self._shard) for name in MOMENTS}
            lazy_init_hp_params_optimizer_state(self.parameters, self._shard, self.adamw.state)
            for i, each in moments.items():
                for name in MOMENTS:
                    safe_set_full_optimizer_state(self.parameters[i], each[name], name)


def _settings(given: dict[str, Any], parameters: Sequence[Parameter], processes: int) -> dict[str, Any]:
    """DeepSpeed's settings: the launcher's, with those that the run decides. BadInput where they disagree."""
    decided, zero = DECIDED | {"train_batch_size": processes}, given["zero_optimization"]
    if zero.get("stage") != 2:
        raise BadInput(f"zero_stage: {zero.get('stage')} in accelerate's settings; only 2 is supported")
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in (None, "none"):
            raise BadInput(f"{name}_device: {device} in accelerate's settings; the adapter's moments stay where it is")
    for name in ("fp16", "bf16"):
        if (given.get(name) or {}).get("enabled", False) not in (False, "auto"):
            raise BadInput(f"{name} in DeepSpeed's settings; set `precision` in the config")
    for name, value in decided.items():
        if given.get(name, "auto") not in ("auto", value):
            raise BadInput(f"{name}: {given[name]} in DeepSpeed's settings; leave it out, the run's config decides")
    for name in ("optimizer", "scheduler"):
        if name in given:
            raise BadInput(f"{name} in DeepSpeed's settings; leave it out, the run's config decides")
    bucket = {"reduce_bucket_size": sum(p.numel() for p in parameters)}  # by default 2 GB, however small the adapter
    zero = bucket | {name: value for name, value in zero.items() if value != "auto"}
    precision = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    return copy.deepcopy(given | decided | precision | {"zero_optimization": zero})


def _engine(network: nn.Module, optimizer: Optimizer, parameters: Sequence[Parameter], ranks: Ranks):
    settings = _settings(ranks.zero.deepspeed_config, parameters, ranks.size)
    import deepspeed

    if ranks.accelerator.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler; gloo does not
    with refusing():
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    shared = [p for group in engine.optimizer.bit16_groups for p in group]
    if engine.module is not network or {*map(id, shared)} != {*map(id, parameters)}:
        raise BadInput(
            f"DeepSpeed has a {type(engine.module).__name__} and shards {len(shared)} of its parameters; a "
            f"{type(network).__name__} and the {len(parameters)} of the adapter are expected"
        )
    return engine
