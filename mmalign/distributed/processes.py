"""The processes (ranks) of a run: which prompts each holds, what they exchange, and how a failure on one ends them all.

accelerate starts the process group and moves tensors. Prompt groups are never split across ranks: of `P` prompts rank r
of W holds r, r + W, ..., and `global_index` is a local row's index in the global batch. Statistics over the batch are
computed on every rank from the gathered rows, in single-process order.

Before each collective there is a barrier: every rank posts its position in a shared store (torch's) and waits for the
others. The wait has a time limit, names the late ranks and what they were waited for, and raises a failure that another
rank posted. Nothing is pickled: tensors are sent unchanged, everything else as JSON. With one process all of it does
nothing.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.utils import compare_versions, fsdp2_prepare_model, is_deepspeed_available, parse_flag_from_env
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter

from mmalign.activity import doing
from mmalign.errors import BadInput, Lost, Orphaned, refusing

T = TypeVar("T")
LINGER = 10.0  # seconds that a failed rank stays, so that the others can read the reason
DEEPSPEED = "0.19.8"  # the oldest that sums gradients once a step instead of averaging them
_stores = count()  # a prefix for each store of this process


@dataclass
class Ranks:
    """`size` processes, of which this one is `rank`. A wait takes at most `patience` seconds. `zero` holds the settings
    of DeepSpeed, where the launcher enables it (`mmalign.distributed.deepspeed`)."""

    accelerator: Accelerator
    patience: float
    store: distributed.Store | None = None
    zero: DeepSpeedPlugin | None = None
    barriers: int = field(default=0, init=False)  # that this rank has reached

    @property
    def size(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def main(self) -> bool:
        """Whether this is the main process, the only one that logs and writes files."""
        return self.rank == 0

    # -------------------------------------------------------------------------------------------- sharding of the batch

    def local(self, items: Sequence[T]) -> list[T]:
        """The items of this rank."""
        return [*items[self.rank :: self.size]]

    def global_index(self, row: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        """The index in the global batch of each local row."""
        return row * self.size + self.rank

    def is_local(self, index: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
        """Whether the row with an index in the global batch is on this rank."""
        return index % self.size == self.rank

    # --------------------------------------------------------------------------------------------------------- exchange

    def gather(self, values: Shaped[Tensor, "n *rest"], what: str) -> Shaped[Tensor, "N *rest"]:
        """All-gather: the rows of all ranks, rank by rank, each with any number of rows. Device and type stay."""
        if self.size == 1:
            return values
        local = values.to(self.accelerator.device)
        with self.collective(what):
            counts = self.accelerator.gather(torch.tensor([len(local)], device=local.device)).tolist()
            if max(counts) == 0:
                return values
            padded = local.new_zeros(max(counts), *local.shape[1:])
            padded[: len(local)] = local
            rows = self.accelerator.gather(padded).unflatten(0, (self.size, -1))
        return torch.cat([shard[:n] for shard, n in zip(rows, counts, strict=True)]).to(values.device)

    def in_order(
        self, values: Shaped[Tensor, "n *rest"], prompt: Int[Tensor, "n"], what: str
    ) -> Shaped[Tensor, "N *rest"]:
        """The rows of all ranks in single-process order, prompt by prompt; `prompt` is each row's local prompt."""
        return self.gather(values, what)[self.order(prompt, what)]

    def local_rows(self, prompt: Int[Tensor, "n"], what: str) -> Bool[Tensor, "N"]:
        """Whether each row of the global batch is on this rank."""
        return self.is_local(self.gather(self.global_index(prompt), what).sort(stable=True).values)

    def order(self, prompt: Int[Tensor, "n"], what: str) -> Int[Tensor, "N"]:
        """The positions in the result of `gather` of the rows of the global batch, in single-process order."""
        return self.gather(self.global_index(prompt), what).sort(stable=True).indices

    def all_gather_object(self, value: Any, what: str) -> list[Any]:
        """The value of each rank, by rank; anything that JSON can hold."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(text)]), what).tolist()
        return [json.loads(bytes(shard.tolist())) for shard in self.gather(text, what).split(sizes)]

    def all_reduce_sum(self, counts: Mapping[str, int | float], what: str) -> dict[str, int | float]:
        """Numbers by name, summed over the ranks."""
        ranks = self.all_gather_object(dict(counts), what)
        names = dict.fromkeys(name for each in ranks for name in each)
        return {name: sum(each.get(name, 0) for each in ranks) for name in names}

    def assert_equal(self, value: Any, what: str) -> None:
        """Raises Lost unless all ranks have the same `value`."""
        values = self.all_gather_object(value, what)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise Lost(f"{what}: rank {rank} has {other!r}, rank 0 {values[0]!r}; they must be the same")

    def any(self, flag: bool, what: str) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.all_gather_object(flag, what))

    @property
    def sharded(self) -> bool:
        """Whether the network is sharded (FSDP), so that all ranks must take part in every forward."""
        return self.size > 1 and getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def padded(self, forwards: int) -> int:
        """The number of forwards that a rank must take which needs so many: padded to the largest rank's number when
        the network is sharded."""
        return max(self.all_gather_object(forwards, "the shares of a minibatch")) if self.sharded else forwards

    def shard(self, network: nn.Module) -> None:
        """Shard the frozen weights across the ranks, block by block (FSDP2). The adapter stays complete on each: it
        is small, and is averaged, clipped and saved as usual. BadInput where a block would not be sharded."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
            raise BadInput("fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false are needed; every process loads")
        plugin.ignored_modules = [
            module for module in network.modules() if any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        with refusing():
            fsdp2_prepare_model(self.accelerator, network)
        lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
        complete = {type(block).__name__ for blocks in lists for block in blocks if not isinstance(block, FSDPModule)}
        if complete or not lists:
            raise BadInput(
                f"fsdp_transformer_layer_cls_to_wrap: {', '.join(sorted(complete)) or 'no block'} of a "
                f"{type(network).__name__} is not sharded; leave it out to have all the model names"
            )

    def clip(self, parameters: Sequence[Parameter], bound: float) -> Any:
        """Bound the norm of the gradient, which is the same on all ranks; return what it was."""
        return nn.utils.clip_grad_norm_(parameters, bound)

    def add_gradients(self, parameters: Sequence[Parameter]) -> bool:
        """All-reduce the gradients to their sum, None where no rank has one. Returns whether there is any."""
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        if self.size > 1:
            flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
            with self.collective("the sum of the gradients"):
                summed = self.accelerator.reduce(torch.cat([*flat, has.to(flat[0])]), "sum")
            *grads, has = summed.split([*(p.numel() for p in parameters), len(parameters)])
            for p, grad, some in zip(parameters, grads, has.tolist(), strict=True):
                p.grad = grad.view_as(p).clone() if some else None
        return bool(has.any())

    # ------------------------------------------------------------------------------------------------- barrier and exit

    def barrier(self, what: str) -> None:
        """Wait until all ranks have reached this barrier, which `what` describes. Raises Lost."""
        if self.size > 1:
            self.barriers += 1
            self._post(what)
            with doing("waiting for other processes"):
                self._wait(what)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """An error on this rank ends all ranks, with its reason; without an error they end together."""
        try:
            yield
            self.barrier("the end")
        except BaseException as error:
            if self.size > 1:
                reason = f"rank {self.rank} failed: {type(error).__name__}: {error}"
                with suppress(Lost):  # the store is gone, and with it the other ranks
                    self._leave(str(error) if isinstance(error, Lost) else " ".join(reason.split()))
            raise
        if self.size > 1:
            self._leave(None)

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """A collective behind a barrier; if it breaks off, the error names the ranks that no longer answer."""
        self.barrier(what)
        try:
            yield
        except RuntimeError as error:
            self.barrier(f"an answer after {what} broke off")
            raise Lost(f"{what}: {error}") from error

    def _post(self, what: str, **more: Any) -> None:
        """Write this rank's position into the store."""
        with self._store_errors():
            self.store.set(str(self.rank), json.dumps({"barriers": self.barriers, "what": what} | more))

    def _positions(self) -> list[dict[str, Any]]:
        """The posted positions, by rank."""
        with self._store_errors():
            return [json.loads(line) for line in self.store.multi_get([str(rank) for rank in range(self.size)])]

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except distributed.DistError as error:
            raise Orphaned(f"the process that holds the store is gone: {str(error).partition(chr(10))[0]}") from None

    def _wait(self, what: str) -> None:
        end = time.monotonic() + self.patience
        while True:
            positions = self._positions()
            late = {rank: other["what"] for rank, other in enumerate(positions) if other["barriers"] < self.barriers}
            if not late:
                return
            for other in positions:
                if other.get("failed"):
                    raise Lost(other["failed"])
            if time.monotonic() > end:
                missing = ", ".join(f"rank {rank} (last at {last})" for rank, last in late.items())
                raise Lost(f"waited {self.patience:g} s for {what}; missing: {missing}")
            time.sleep(min(0.5, 0.001 * self.size))

    def _leave(self, failed: str | None) -> None:
        """Announce that this rank is exiting, and why. The main rank, which may hold the store, and a rank that failed
        stay until the others have read it, for `LINGER` seconds at most."""
        self._post("its end", failed=failed, gone=True)
        end = time.monotonic() + LINGER
        while (self.main or failed) and not all(other.get("gone") for other in self._positions()):
            if time.monotonic() > end:
                return
            time.sleep(0.05)


def join(patience: float) -> Ranks:
    """The processes that `accelerate launch` or `torchrun` started, of which this is one; this one alone without a
    launcher. Raises Lost where they do not all start in `patience` seconds."""
    limit, started = timedelta(seconds=patience), int(os.environ.get("WORLD_SIZE", "1"))
    cpu = started > 1 and not torch.accelerator.is_available()  # else accelerate treats each process as a single one
    zero = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if zero and not (is_deepspeed_available() and compare_versions("deepspeed", ">=", DEEPSPEED)):
        raise BadInput(f"DeepSpeed {DEEPSPEED} or newer is not installed; pip install 'mmalign[zero]'")
    if zero and "LOCAL_RANK" not in os.environ:
        raise BadInput("ACCELERATE_USE_DEEPSPEED is set without a launcher; use accelerate launch or torchrun")
    try:
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=limit)])
    except distributed.DistError as error:
        raise Lost(f"waited {patience:g} s for all processes to start: {str(error).partition(chr(10))[0]}") from None
    if accelerator.num_processes != started:
        raise BadInput(f"WORLD_SIZE is {started} and accelerate joined {accelerator.num_processes}; check the launcher")
    if accelerator.mixed_precision != "no":
        raise BadInput(
            f"mixed_precision: {accelerator.mixed_precision} in accelerate's settings; set `precision` in the config"
        )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # accelerate ignores it without a GPU
    ranks = Ranks(accelerator, patience)
    if zero:
        ranks.zero = accelerator.state.deepspeed_plugin or DeepSpeedPlugin()  # ignored too
    if ranks.size > 1:
        store = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=limit)
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        ranks.store = distributed.PrefixStore(f"mmalign/{restart}/{next(_stores)}", store)
        ranks._post("the start")
    return ranks


def main() -> bool:
    """Whether this process, once it has joined, is the main one."""
    return PartialState().is_main_process
