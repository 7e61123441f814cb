"""Laws of computations that run in lockstep: each gets its own answers, by one transfer per stage."""

import torch
from pretend_gpu import CUDA, PretendGPU
from torch import Tensor

from stablefield.targets.lockstep import Task, run_together


def doubled(x: Tensor, stages: int) -> Task[list[Tensor]]:
    """Ask for x in several types and shapes, once per stage."""
    found = list[Tensor]()
    for stage in range(stages):
        found += yield [x + stage, (x > 0)[None], x.double()[:0]]
    return found


def test_each_task_gets_its_own_answers_however_many_stages_it_has() -> None:
    inputs = [torch.randn(number, generator=torch.Generator().manual_seed(number)) for number in (1, 5, 3)]
    here = run_together([doubled(x, stages) for stages, x in enumerate(inputs)])
    with PretendGPU() as gpu:
        on_gpu = [x.to(CUDA) for x in inputs]
        gpu.clear()
        there = run_together([doubled(x, stages) for stages, x in enumerate(on_gpu)])
        assert not any(x.is_cuda for found in there for x in found)
    assert sum(gpu.waits.values()) == 2
    assert [len(found) for found in there] == [0, 3, 6]
    for one, other in zip(here, there, strict=True):
        for x, y in zip(one, other, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_nothing_runs_where_there_are_no_tasks() -> None:
    assert run_together(list[Task[int]]()) == []
