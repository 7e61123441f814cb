"""Computations that need numbers on the host, run together so that the host waits for a GPU once per stage.

A computation is a generator: it yields the tensors that it needs on the CPU, is sent their copies, and goes on. All
computations that run together are answered together, by one copy.
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Task = Generator[list[Tensor], list[Tensor], T]


def run_together(tasks: Sequence[Task[T]]) -> list[T]:
    """Results of computations that run in lockstep.

    Args:
        tasks: the computations.
    """
    results: dict[int, T] = {}
    answers: dict[int, list[Tensor] | None] = dict.fromkeys(range(len(tasks)))
    while answers:
        asked: dict[int, list[Tensor]] = {}
        for number, answer in answers.items():
            try:
                asked[number] = next(tasks[number]) if answer is None else tasks[number].send(answer)
            except StopIteration as end:
                results[number] = end.value
        copies = iter(_on_host([x for tensors in asked.values() for x in tensors]))
        answers = {number: [next(copies) for _ in tensors] for number, tensors in asked.items()}
    return [results[number] for number in range(len(tasks))]


def _on_host(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copies on the CPU, made by one transfer."""
    if all(x.device.type == "cpu" for x in tensors):
        return tensors
    found = torch.cat([x.contiguous().reshape(-1).view(torch.uint8) for x in tensors]).cpu()
    parts = found.split([x.numel() * x.itemsize for x in tensors])
    return [part.clone().view(x.dtype).reshape(x.shape) for part, x in zip(parts, tensors, strict=True)]
