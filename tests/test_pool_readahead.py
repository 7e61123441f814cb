"""Prefetching of mapped data: blocks are those of a split, and each is announced to the system before it is used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from noisy_data import noisy_batch
from torch import Tensor

from stablefield import ExactTarget, Pool
from stablefield import pool as pool_module
from stablefield.data.arrays import as_tensor, map_array


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 400))
def test_blocks_are_those_of_a_split_and_each_is_prefetched_once_before_use(n: int, size: int, span: int) -> None:
    data, prefetched, used = torch.arange(3 * n).view(n, 3), [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "_prefetch", lambda part: prefetched.extend(part[:, 0].tolist()))
        patch.setattr(pool_module, "_PREFETCH_BYTES", span)
        blocks = pool_module._prefetched_blocks(data, size)
        for block, expected in zip(blocks, data.split(size), strict=True):
            assert torch.equal(block, expected)
            used += len(block)
            ahead = max(size, span // 24)
            assert len(prefetched) >= min(n, used + 1)  # including the next block, unless there is none
            assert len(prefetched) <= used + 2 * ahead  # and not all data, which may be larger than memory
    assert prefetched == data[:, 0].tolist()


def test_prefetching_changes_no_data_of_any_layout(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100_000, dtype=np.uint8).reshape(-1, 10))
    stored = as_tensor(map_array(tmp_path / "x.npy"))
    for data in (stored, stored[7:9], stored[:0], torch.randn(3, 4), torch.randn(4, 3).T, torch.empty(2, 0)):
        before = data.clone()
        pool_module._prefetch(data)
        assert torch.equal(data, before)


def test_results_are_the_same_on_a_system_without_madvise(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(torch.arange(0, 240, dtype=torch.uint8).view(60, 4))
    noisy = noisy_batch(pool, torch.full((5,), 0.5))

    def mean() -> Tensor:
        return ExactTarget(pool, missing_mass=0.0)(noisy).mean

    expected = mean()
    monkeypatch.setattr(pool_module, "_madvise", lambda: None)
    assert torch.equal(mean(), expected)
