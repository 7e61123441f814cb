"""Laws of the screen: it keeps about the fewest data points, and never drops more mass than allowed."""

import pytest
import torch
from noisy_data import on_ranks, seeded
from torch import Tensor

from stablefield.targets import Shard
from stablefield.targets.lockstep import run_together
from stablefield.targets.screening import likely


@pytest.mark.parametrize("total", [1, 3])
@pytest.mark.parametrize("sigma", [0.2, 0.3, 0.5])
def test_about_the_fewest_data_points_are_kept_that_leave_at_most_the_missing_mass(sigma: float, total: int) -> None:
    missing_mass, energy = 1e-3, 20 * torch.rand(50, 999, generator=seeded(2), dtype=torch.float64)

    def keep(shard: Shard) -> Tensor:
        part = energy[:, shard.rank :: shard.total].float()
        task = likely(part, torch.full((50,), sigma), torch.full((50,), 1e-6), missing_mass, 999, shard)
        return run_together([task])[0]

    inside = torch.zeros(50, 999, dtype=torch.bool)
    for rank, found in enumerate(on_ranks(total, keep)):
        inside[:, rank::total] = found
    q = torch.softmax(-energy / (2 * sigma**2), 1)
    assert float((q * ~inside).sum(1).max()) <= missing_mass
    fewest = (q.sort(1).values.cumsum(1) > missing_mass).sum(1)
    least_likely = energy.sort(1).values.gather(1, fewest[:, None] - 1)
    half_a_nat = sigma**2
    assert (inside.sum(1) <= (energy <= least_likely + half_a_nat).sum(1)).all()
    assert (inside.sum(1) < 999 / 4).all()


def test_no_more_mass_is_missing_for_millions_of_data_points() -> None:
    # a million equal numbers summed in float32 one after the other would be wrong by some thousandths
    near, far, beyond = torch.zeros(1, 1000), torch.full((1, 10**6), 7.3), torch.full((1, 2 * 10**6), 60.0)
    energy, sigma = torch.cat([near, far, beyond], 1), torch.full((1,), 0.5**0.5)
    weight = torch.exp(-energy.double())
    share = float(weight[:, 1000:].sum() / weight.sum())
    for missing_mass, kept in ((0.999 * share, len(energy[0]) - 2 * 10**6), (1.001 * share, 1000)):
        (inside,) = run_together([likely(energy, sigma, torch.zeros(1), missing_mass, energy.shape[1], Shard())])
        assert int(inside.sum()) == kept


def test_a_larger_rounding_bound_keeps_more_data_points() -> None:
    energy = torch.rand(8, 640, generator=seeded(3)) * 30
    sigma, bounds = torch.full((8,), 0.5), (0.0, 0.1, 1.0, 10.0, 100.0)
    masks = run_together([likely(energy, sigma, torch.full((8,), bound), 1e-4, 640, Shard()) for bound in bounds])
    kept = [int(inside.sum()) for inside in masks]
    assert kept == sorted(kept)
    assert kept[0] < kept[2] < kept[-1] == energy.numel()
