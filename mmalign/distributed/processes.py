"""The processes of a run: who holds which prompts, what they tell one another, and how one's end is the end of all.

accelerate joins them and moves their tensors; here is what a run asks of it. Groups are dealt whole: of `P` prompts,
process (rank) r of W holds r, r + W, ..., so a prompt's number among all is `number` of its row here. Whatever looks
over the batch is computed by every process from the rows of all, in the order that one process would have them.

Before a collective the processes meet: each writes on a board, torch's store, where it is, and waits until all have
come. That wait has a limit, knows what is waited for and who is late, and sees a failure that another wrote there.
Nothing is pickled: tensors travel as they are, everything else as JSON. With one process all of it does nothing.
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

from mmalign.errors import BadInput, Lost, Orphaned, refusing

T = TypeVar("T")
FAREWELL = 10.0  # seconds a process that failed stays, so that the others can read why
DEEPSPEED = "0.19.8"  # the oldest that adds gradients up, instead of averaging them, once a step
_opened = count()


@dataclass
class Ranks:
    """`size` processes, of which this is number `rank`. A wait takes at most `patience` seconds. `zero` holds the
    settings of DeepSpeed, where it is asked for (`mmalign.distributed.deepspeed`)."""

    accelerator: Accelerator
    patience: float
    board: distributed.Store | None = None
    zero: DeepSpeedPlugin | None = None
    met: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------------- who holds which rows

    def local(self, items: Sequence[T]) -> list[T]:
        """What of `items` is this process's."""
        return [*items[self.rank :: self.size]]

    def global_index(self, row: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        """The row among all of each own row."""
        return row * self.size + self.rank

    def is_local(self, number: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
        """Whether a row among all is this process's."""
        return number % self.size == self.rank

    # --------------------------------------------------------------------------------------------- telling one another

    def gather(self, values: Shaped[Tensor, "n *rest"], what: str) -> Shaped[Tensor, "N *rest"]:
        """The rows of all processes, one process after the other; each may have any number. On the device they came
        from, in their own type."""
        if self.size == 1:
            return values
        own = values.to(self.accelerator.device)
        with self.collective(what):
            counts = self.accelerator.gather(torch.tensor([len(own)], device=own.device)).tolist()
            if max(counts) == 0:
                return values
            padded = own.new_zeros(max(counts), *own.shape[1:])
            padded[: len(own)] = own
            rows = self.accelerator.gather(padded).unflatten(0, (self.size, -1))
        return torch.cat([part[:n] for part, n in zip(rows, counts, strict=True)]).to(values.device)

    def in_order(
        self, values: Shaped[Tensor, "n *rest"], prompt: Int[Tensor, "n"], what: str
    ) -> Shaped[Tensor, "N *rest"]:
        """The rows of all processes as one would have them, prompt by prompt; `prompt` is each row's here."""
        return self.gather(values, what)[self.order(prompt, what)]

    def local_rows(self, prompt: Int[Tensor, "n"], what: str) -> Bool[Tensor, "N"]:
        """Of each row of the whole batch, whether it is here."""
        return self.is_local(self.gather(self.global_index(prompt), what).sort(stable=True).values)

    def order(self, prompt: Int[Tensor, "n"], what: str) -> Int[Tensor, "N"]:
        """Where in what `gather` gives each row of the whole batch is."""
        return self.gather(self.global_index(prompt), what).sort(stable=True).indices

    def all_gather_object(self, value: Any, what: str) -> list[Any]:
        """What each process says, by rank; anything that JSON can hold."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(text)]), what).tolist()
        return [json.loads(bytes(part.tolist())) for part in self.gather(text, what).split(sizes)]

    def all_reduce_sum(self, counts: Mapping[str, int | float], what: str) -> dict[str, int | float]:
        """Numbers by name, summed over the processes."""
        told = self.all_gather_object(dict(counts), what)
        return {
            name: sum(own.get(name, 0) for own in told) for name in dict.fromkeys(key for own in told for key in own)
        }

    def assert_equal(self, value: Any, what: str) -> None:
        """Raises Lost unless all processes have the same `value`."""
        told = self.all_gather_object(value, what)
        odd = [rank for rank, own in enumerate(told) if own != told[0]]
        if odd:
            raise Lost(f"{what}: rank {odd[0]} has {told[odd[0]]!r}, rank 0 {told[0]!r}; they must be the same")

    def any(self, flag: bool, what: str) -> bool:
        return any(self.all_gather_object(flag, what))

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the network alone, so that all must take part in every forward."""
        return self.size > 1 and getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def replayed(self, rows: int) -> int:
        """How many rows a process with so many must replay: as many as any, where the network is sharded."""
        return max(self.all_gather_object(rows, "the shares of a minibatch")) if self.sharded else rows

    def shard(self, network: nn.Module) -> None:
        """Leave each process its part of the frozen weights, block by block (FSDP2). The adapter stays whole in each:
        it is small, and is averaged, clipped and saved as ever. BadInput where a block would not be sharded."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
            raise BadInput("fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false are needed; every process loads")
        plugin.ignored_modules = [
            module for module in network.modules() if any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        with refusing():
            fsdp2_prepare_model(self.accelerator, network)
        lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
        whole = {type(block).__name__ for blocks in lists for block in blocks if not isinstance(block, FSDPModule)}
        if whole or not lists:
            raise BadInput(
                f"fsdp_transformer_layer_cls_to_wrap: {', '.join(sorted(whole)) or 'no block'} of a "
                f"{type(network).__name__} is not sharded; leave it out to have all the model names"
            )

    def add_gradients(self, parameters: Sequence[Parameter]) -> bool:
        """Leave in each process the sum of all processes' gradients, None where none has one. Whether there is any."""
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        if self.size > 1:
            flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
            with self.collective("the sum of the gradients"):
                summed = self.accelerator.reduce(torch.cat([*flat, has.to(flat[0])]), "sum")
            *grads, has = summed.split([*(p.numel() for p in parameters), len(parameters)])
            for p, grad, some in zip(parameters, grads, has.tolist(), strict=True):
                p.grad = grad.view_as(p).clone() if some else None
        return bool(has.any())

    # ------------------------------------------------------------------------------------------- meeting, and ending

    def barrier(self, what: str) -> None:
        """Wait until all processes have come here, for `what`. Raises Lost."""
        if self.size > 1:
            self.met += 1
            self._write(what)
            self._wait(what)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What ends this process ends all, with its reason; without one they end together."""
        try:
            yield
            self.barrier("the end")
        except BaseException as error:
            if self.size > 1:
                why = f"rank {self.rank} failed: {type(error).__name__}: {error}"
                with suppress(Lost):  # nobody is left to tell
                    self._leave(str(error) if isinstance(error, Lost) else " ".join(why.split()))
            raise
        if self.size > 1:
            self._leave(None)

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """A collective, begun when all have come; if it breaks off, those who do not answer any more are named."""
        self.barrier(what)
        try:
            yield
        except RuntimeError as error:
            self.barrier(f"an answer, for {what} broke off")
            raise Lost(f"{what}: {error}") from error

    def _write(self, what: str, **more) -> None:
        with self._reaching():
            self.board.set(str(self.rank), json.dumps({"met": self.met, "what": what} | more))

    def _read(self) -> list[dict[str, Any]]:
        with self._reaching():
            return [json.loads(line) for line in self.board.multi_get([str(rank) for rank in range(self.size)])]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except distributed.DistError as error:
            raise Orphaned(f"the process that keeps the board is gone: {str(error).partition(chr(10))[0]}") from None

    def _wait(self, what: str) -> None:
        end = time.monotonic() + self.patience
        while True:
            lines = self._read()
            late = {rank: line["what"] for rank, line in enumerate(lines) if line["met"] < self.met}
            if not late:
                return
            for line in lines:
                if line.get("failed"):
                    raise Lost(line["failed"])
            if time.monotonic() > end:
                who = ", ".join(f"rank {rank} (last at {last})" for rank, last in late.items())
                raise Lost(f"waited {self.patience:g} s for {what}, in vain for {who}")
            time.sleep(min(0.5, 0.001 * self.size))

    def _leave(self, failed: str | None) -> None:
        """Say that this process goes, and why. The main one, with which the board may go, stays until the others have
        read it, and so does one that failed; but not for ever."""
        self._write("its end", failed=failed, gone=True)
        end = time.monotonic() + FAREWELL
        while (self.main or failed) and not all(line.get("gone") for line in self._read()):
            if time.monotonic() > end:
                return
            time.sleep(0.05)


def join(patience: float) -> Ranks:
    """The processes that `accelerate launch` or `torchrun` started, of which this is one; itself alone, where none
    did. Raises Lost where they do not all come."""
    limit, started = timedelta(seconds=patience), int(os.environ.get("WORLD_SIZE", "1"))
    bare = started > 1 and not torch.accelerator.is_available()  # else accelerate takes each process for one alone
    zero = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if zero and not (is_deepspeed_available() and compare_versions("deepspeed", ">=", DEEPSPEED)):
        raise BadInput(f"DeepSpeed {DEEPSPEED} or newer is not installed; pip install 'mmalign[zero]'")
    if zero and "LOCAL_RANK" not in os.environ:
        raise BadInput("ACCELERATE_USE_DEEPSPEED is set without a launcher; use accelerate launch or torchrun")
    try:
        accelerator = Accelerator(cpu=bare, kwargs_handlers=[InitProcessGroupKwargs(timeout=limit)])
    except distributed.DistError as error:
        raise Lost(f"waited {patience:g} s for all processes to start: {str(error).partition(chr(10))[0]}") from None
    if accelerator.num_processes != started:
        raise BadInput(f"WORLD_SIZE is {started} and accelerate joined {accelerator.num_processes}; check the launcher")
    if accelerator.mixed_precision != "no":
        raise BadInput(
            f"mixed_precision: {accelerator.mixed_precision} in accelerate's settings; set `precision` in the config"
        )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # accelerate passes it over without a GPU
    ranks = Ranks(accelerator, patience)
    if zero:
        ranks.zero = accelerator.state.deepspeed_plugin or DeepSpeedPlugin()  # the same
    if ranks.size > 1:
        store = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=limit)
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        ranks.board = distributed.PrefixStore(f"mmalign/{again}/{next(_opened)}", store)
        ranks._write("the start")
    return ranks


def main() -> bool:
    """Whether this process, once it has joined, is the one that writes and speaks."""
    return PartialState().is_main_process
