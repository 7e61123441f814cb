"""Processes that share a command's work, as `torchrun` or `accelerate launch` started them; usually there is one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks, and writes what is written once."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """What this process does of the work."""
        return rows[self.rank :: self.size]

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def gather(self, part: T) -> list[T]:
        """Everybody's part, in the order of the ranks, for the first of them; nothing for the others."""
        if self.size == 1:
            return [part]
        parts: list[Any] = [None] * self.size
        torch.distributed.gather_object(part, parts if self.first else None)
        return parts if self.first else []


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that were started together, for as long as they work together."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    # gloo, whatever the device: the ranks wait for each other, and exchange results
    torch.distributed.init_process_group("gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()


def device_of(name: str) -> str:
    """The device of that name; for "auto", each process of a machine takes its own GPU."""
    if name == "auto" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name
