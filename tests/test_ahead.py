"""Laws of reading ahead: the parts are those of a split, and the system is told of each before it is used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pruned import batch
from torch import Tensor

from stablefield import FullDataset, Pool, ahead
from stablefield.ahead import in_turn, soon
from stablefield.data.mapping import as_tensor, mapped


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 400))
def test_parts_are_those_of_a_split_and_all_is_told_once_and_before_it_is_used(n: int, size: int, span: int) -> None:
    data, told, used = torch.arange(3 * n).view(n, 3), [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "soon", lambda part: told.extend(part[:, 0].tolist()))
        patch.setattr(ahead, "SPAN", span)
        for part, wanted in zip(in_turn(data, size), data.split(size), strict=True):
            assert torch.equal(part, wanted)
            used += len(part)
            many = max(size, span // 24)
            assert len(told) >= min(n, used + 1)  # the next, too, unless there is none
            assert len(told) <= used + 2 * many  # and not all of what may be larger than memory
    assert told == data[:, 0].tolist()


def test_the_system_may_be_told_of_anything(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100_000, dtype=np.uint8).reshape(-1, 10))
    stored = as_tensor(mapped(tmp_path / "x.npy"))
    for data in (stored, stored[7:9], stored[:0], torch.randn(3, 4), torch.randn(4, 3).T, torch.empty(2, 0)):
        before = data.clone()
        soon(data)
        assert torch.equal(data, before)


def test_without_a_system_that_listens_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(torch.arange(0, 240, dtype=torch.uint8).view(60, 4))
    noisy = batch(pool, torch.full((5,), 0.5))

    def found() -> Tensor:
        return FullDataset(pool)(noisy).mean

    usual = found()
    monkeypatch.setattr(ahead, "_madvise", lambda: None)
    assert torch.equal(found(), usual)
