"""Which of several processes this is, and what they do together.

`torchrun` and `accelerate launch` start one process a device, on one machine or on many, and tell each its number.
Alone there is one rank, nothing is started, and everything here is the identity.
"""

import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

# Its functions have the group there is when it is imported as a default, and so keep it. Imported by DDP and optimizers
# as they begin, it would keep ours beyond its end, with threads that now and then abort the interpreter's
import torch.distributed.nn.functional
from accelerate import PartialState
from accelerate.utils import gather
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed import DistError
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among several.

    Attributes:
        device: what this one computes on.
        rank: its number, from 0.
        total: how many there are.
    """

    device: torch.device
    rank: int = 0
    total: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.total > 1:
            PartialState().wait_for_everyone()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in their order, on every rank's device. All must have equally many."""
        # GPUs speak to each other of what is on them only
        return gather(rows.to(self.device)) if self.total > 1 else rows

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """What this rank does of work that can be divided."""
        return rows[self.rank :: self.total]

    def collect(self, part: T) -> list[T]:
        """Each rank's part, whatever it is, in their order, on the first; nothing on the others."""
        if self.total == 1:
            return [part]
        parts: list[Any] = [None] * self.total
        torch.distributed.gather_object(part, parts if self.first else None)
        return parts if self.first else []

    def any(self, said: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.each(said).any())

    def each(self, number: int) -> Int[Tensor, "total"]:
        """What each rank says."""
        # alone, no device need be waited for
        home = self.device if self.total > 1 else "cpu"
        return self.gather(torch.tensor([int(number)], device=home)).cpu()

    def lead(self, act: Callable[[], object]) -> None:
        """The first acts, the others wait, and what it fails at ends them all.

        Raises:
            Exception: on the first, what `act` raised.
            SystemExit: on the others, of which nothing need be heard.
        """
        failure: Exception | None = None
        try:
            act() if self.first else None
        except Exception as error:
            failure = error
        if self.any(failure is not None):
            raise failure or SystemExit(1)

    def told(self, find: Callable[[], T]) -> T:
        """What the first finds, on every rank; what it fails at ends them all, as with `lead`."""
        found: list[Any] = [None]
        self.lead(lambda: found.__setitem__(0, find()))
        if self.total > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        answer: T = found[0]
        return answer

    @contextmanager
    def company(self) -> Iterator[None]:
        """What is done together.

        Raises:
            ConnectionError: another rank has gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.total > 1 and (isinstance(error, DistError) or "gloo" in str(error)):
                raise ConnectionError(
                    f"rank {self.rank} of {self.total} has lost the others; the run can go on from its checkpoint"
                ) from error
            raise

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are the means over all ranks. Its weights become those of the first."""
        return DistributedDataParallel(module, broadcast_buffers=False) if self.total > 1 else module


def apart(module: nn.Module) -> AbstractContextManager[object]:
    """Gradients stay on their rank for now: more of the batch is to come."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """This process's place among those that were started together; they part at the end.

    Args:
        device: what to compute on; of several GPUs each rank takes its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device)
        return
    state = PartialState(cpu=device.type == "cpu")
    try:
        with warnings.catch_warnings():
            for harmless in ("Grad strides do not match", ".*broadcast_buffers. is deprecated"):
                warnings.filterwarnings("ignore", harmless)
            yield Ranks(state.device, state.process_index, state.num_processes)
    except BaseException as error:
        _forget(error)
        raise
    finally:
        state.destroy_process_group()
        PartialState._reset_state()  # another may be begun in this process


def _forget(error: BaseException | None) -> None:
    """Drop the variables of where an error arose: a wrapped module among them would keep the group beyond its end."""
    met = set[int]()  # where a cause is raised anew, errors are each other's
    while error is not None and id(error) not in met:
        met.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
