"""Ranks: the processes that train or sample together, and their collective operations.

`torchrun` and `accelerate launch` start one process per device, on one machine or several, and give each its rank.
Without them there is a single rank, no process group is created, and every operation here is the identity.
"""

import logging
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch

# The functions of this module keep the process group that exists at import as a default argument. DDP and optimizers
# import it when they are created; it would then keep our group alive after its end, with threads that sometimes abort
# the interpreter at exit.
import torch.distributed.nn.functional
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed import DistError
from torch.nn.parallel import DistributedDataParallel

from stablefield.extras import how_to_install

LOGGER = logging.getLogger("stablefield")

T = TypeVar("T")

LONGEST_WORK = timedelta(hours=24)
"""Time that ranks wait for work of the main rank, such as decoding data or writing files."""


class _Group:
    """The gloo group of the process: beside NCCL, for integers and objects that need no GPU."""

    current: torch.distributed.ProcessGroup | None = None


@dataclass(frozen=True)
class Ranks:
    """This process, its device, and its collective operations with the other ranks.

    Every collective operation must be called on all ranks. Integers and objects are exchanged between the hosts, so
    that no rank waits for a GPU, and the main rank may work for hours meanwhile.

    Attributes:
        device: device that this rank computes on.
        rank: number of this process, from 0.
        world_size: number of processes.
        around: contexts that are entered around every exchange of tensors (see `engine.stopping`).
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    around: list[Callable[[], AbstractContextManager[object]]] = field(default_factory=list, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks have reached this point."""
        self.all_gather_int(0)

    def all_gather(self, values: Tensor) -> Tensor:
        """Tensors of all ranks, concatenated in the order of the ranks, on every rank's device.

        Args:
            values: tensor of this rank (b, ...), of the same shape on all ranks.
        """
        if self.world_size == 1:
            return values
        from accelerate.utils import gather

        with ExitStack() as stack:
            for context in self.around:
                stack.enter_context(context())
            return gather(values.to(self.device))  # tensors must be on the GPU for GPUs to exchange them

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of work that can be divided: every `world_size`-th item, beginning at `rank`.

        Args:
            items: the whole work, the same on all ranks.
        """
        return items[self.rank :: self.world_size]

    def gather_objects(self, value: T) -> list[T]:
        """Objects of all ranks in the order of the ranks, on the main rank; an empty list on the others.

        Args:
            value: object of this rank, which must be picklable.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.gather_object(value, values if self.is_main else None, group=_Group.current)
        return values if self.is_main else []

    def any(self, condition: bool) -> bool:
        """True if the condition holds on any rank.

        Args:
            condition: the condition on this rank.
        """
        return bool(self.all_gather_int(condition).any()) if self.world_size > 1 else condition

    def all_gather_int(self, value: int) -> Int[Tensor, "world_size"]:
        """The integers of all ranks, in the order of the ranks, on the CPU.

        Args:
            value: integer of this rank.
        """
        own = torch.tensor([int(value)])
        if self.world_size == 1:
            return own
        values = [torch.empty_like(own) for _ in range(self.world_size)]
        torch.distributed.all_gather(values, own, group=_Group.current)
        return torch.cat(values)

    def on_main(self, function: Callable[[], object]) -> None:
        """Call a function on the main rank while the others wait; if it fails, all ranks end.

        Args:
            function: called without arguments.

        Raises:
            Exception: on the main rank, the exception of `function`.
            SystemExit: on the others, which end without a message.
        """
        failure: Exception | None = None
        try:
            function() if self.is_main else None
        except Exception as error:
            failure = error
        if self.any(failure is not None):
            raise failure or SystemExit(1)

    def from_main(self, function: Callable[[], T]) -> T:
        """The result of a function that the main rank calls while the others wait; if it fails, all ranks end.

        Args:
            function: called without arguments; its result must be picklable, with tensors on the CPU.

        Raises:
            Exception: on the main rank, the exception of `function`.
            SystemExit: on the others, which end without a message.
        """
        made: list[Any] = []
        self.on_main(lambda: made.append(function()))
        if self.world_size > 1:
            made = made or [None]
            torch.distributed.broadcast_object_list(made, group=_Group.current)
        result: T = made[0]
        return result

    @contextmanager
    def reraise_lost_rank(self) -> Iterator[None]:
        """Context in which the failure of a collective operation is raised as a clear error.

        Raises:
            ConnectionError: another rank has ended or cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size > 1 and (isinstance(error, DistError) or "gloo" in str(error)):
                raise ConnectionError(
                    f"rank {self.rank} of {self.world_size} has lost the others; resume the run from its checkpoint"
                ) from error
            raise

    def wrap(self, module: nn.Module) -> nn.Module:
        """Module whose gradients are averaged over all ranks, and whose weights are those of the main rank.

        Args:
            module: a module on `device`; returned as it is for a single rank.
        """
        if self.world_size == 1:
            return module
        # Gradients are views of the buckets that are exchanged, which saves a copy of all of them. The graph is not
        # declared static: this saves a search for unused parameters, of which there are none, and would refuse networks
        # that use a parameter more often in some steps than in others.
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync(module: nn.Module) -> AbstractContextManager[object]:
    """Context in which gradients are accumulated without being averaged over the ranks.

    Args:
        module: as `Ranks.wrap` returned it.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
_UNUSED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


def refuse_accelerate_settings(environment: Mapping[str, str], precision: str) -> None:
    """Refuse settings of `accelerate launch` that would be ignored: it passes them in environment variables.

    Args:
        environment: the environment variables.
        precision: precision of the run.

    Raises:
        ValueError: there is such a setting.
    """
    found = {name.removeprefix("ACCELERATE_"): value.lower() for name, value in environment.items() if value}
    mixed, steps = found.get("MIXED_PRECISION", "no"), found.get("GRADIENT_ACCUMULATION_STEPS", "1")
    if mixed != "no" and _PRECISIONS.get(mixed, mixed) != precision:
        raise ValueError(
            f"accelerate was launched with mixed_precision={mixed}, but the precision is {precision}; launch with "
            "mixed_precision=no, and set training.precision to change it"
        )
    if steps != "1":
        raise ValueError(
            f"accelerate was launched with gradient_accumulation_steps={steps}; set training.micro_batch_size instead, "
            "the number of examples that pass through the network at once"
        )
    if found.get("DYNAMO_BACKEND", "no") != "no":
        raise ValueError("accelerate was launched with a dynamo backend; set training.compile=true instead")
    for name in _UNUSED:
        if found.get(f"USE_{name}") in ("true", "1", "yes"):
            raise ValueError(
                f"accelerate was launched with {name}, which is not supported: every rank holds the whole network; "
                "launch with --multi_gpu, or use torchrun"
            )


def _warn_of_shared_store(environment: Mapping[str, str]) -> None:
    """Warn on rank 0 if torchrun could not restart the ranks.

    By default torchrun shares its key-value store with the ranks (torch 2.13). After a restart this store still holds
    the addresses of the ranks that ended, and the new ones fail to connect to them.
    """
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and environment.get("RANK") == "0" and environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        LOGGER.warning(
            "torchrun --max-restarts=%d: restarted ranks may fail to connect; set the environment variable "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun",
            restarts,
        )


@contextmanager
def process_group(device: torch.device, precision: str = "float32") -> Iterator[Ranks]:
    """Context with the process group of all ranks, which is destroyed at the end.

    Args:
        device: device to compute on; with several GPUs each rank uses its own.
        precision: precision of the run, which `accelerate launch` must not contradict.

    Raises:
        ValueError: `accelerate launch` was given a setting that this package does not follow.
        ModuleNotFoundError: there are several ranks, and accelerate is not installed.
    """
    refuse_accelerate_settings(os.environ, precision)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device)
        return
    try:
        from accelerate import PartialState  # imported here, because a single rank does not need it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(how_to_install("training with several ranks"), name=error.name) from error
    _warn_of_shared_store(os.environ)
    state = PartialState(cpu=device.type == "cpu")
    _Group.current = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WORK)
    try:
        with warnings.catch_warnings():
            for harmless in ("Grad strides do not match", ".*broadcast_buffers. is deprecated"):
                warnings.filterwarnings("ignore", harmless)
            yield Ranks(state.device, state.process_index, state.num_processes)
    except BaseException as error:
        if isinstance(error, ConnectionError) and threading.current_thread() is threading.main_thread():
            # the launcher sends it to the ranks that are left: this one is to report the error before it ends
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _forget(error)
        raise
    finally:
        _Group.current = None
        state.destroy_process_group()
        PartialState._reset_state()  # so that another group can be created in this process


def _forget(error: BaseException | None) -> None:
    """Clear the local variables in an error's traceback: a wrapped module there would keep the group alive."""
    seen = set[int]()  # errors can be each other's cause, where a cause is raised again
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
