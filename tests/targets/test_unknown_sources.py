"""Laws of the exact posterior for noisy data whose sources are not known, as samplers have them."""

import pytest
import torch
from noisy_data import SIX, images, mean_by_differences, noisy_batch, streamed
from torch import Tensor

from stablefield import VE, VP, ExactTarget, Flow, Heun, IdealDenoiser, Pool
from stablefield.process import Process
from stablefield.targets import cells


def many() -> Pool:
    """Images of more dimensions than a screen sees, too many to be streamed for few examples."""
    return images(2000, side=16, classes=3)


@pytest.fixture(autouse=True)
def small_data_are_screened_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "SMALL_DATA", 0)


@pytest.mark.parametrize("process", [VE(), VP(), Flow()], ids=repr)
@pytest.mark.parametrize("labelled", [False, True])
def test_the_ideal_denoiser_is_exact_at_every_noise_level(process: Process, labelled: bool) -> None:
    pool = many()
    data = pool.take(torch.arange(len(pool)))
    noisy = noisy_batch(pool, process.time(torch.logspace(-3, 2, 40, dtype=torch.float64)), process, labelled=labelled)
    found = IdealDenoiser(pool, process)(noisy.x_t, noisy.t, noisy.label)
    rms = float(data.square().flatten(1).sum(1).mean().sqrt())
    error = (found.double() - mean_by_differences(noisy, data, pool.labels)).flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-5 * rms


def test_noisy_data_from_elsewhere_are_compared_with_all_data() -> None:
    # 128 directions, of which the screen sees the 64 of large variance: there 0 is nearest, in the others 1 is
    data = torch.zeros(200, 128)
    data[:, :64] = 5 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    data[:2] = 0
    data[1, :2], data[1, 64:] = 2.0, 1.0
    x_t = torch.zeros(1, 128)
    x_t[0, 64:] = 1.0
    target, label = ExactTarget(Pool(data)), torch.tensor([-1])
    for sigma in (0.3, 0.4):
        level = torch.full((1,), sigma)
        found = target.posterior(x_t, level, torch.ones(1), label).mean
        torch.testing.assert_close(found, data[1:2], rtol=0, atol=1e-5)


def test_samples_are_those_of_the_denoiser_that_streams_all_data() -> None:
    pool = many()
    samples = [
        Heun(steps=8)(IdealDenoiser(pool, VE(), mass), shape=pool.shape, seeds=range(8), label=torch.arange(8) % 3).x
        for mass in (1e-8, 0.0)
    ]
    torch.testing.assert_close(*samples, rtol=0, atol=1e-4)


def test_few_data_points_are_summed_where_few_can_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, summed = many(), list[int]()
    sums_of = cells._sums

    def counted(query: object, mask: Tensor, *known: object, **options: bool) -> object:
        summed.append(int(mask.sum()))
        return sums_of(query, mask, *known, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cells, "_sums", counted)
    noisy = noisy_batch(pool, torch.full((16,), 0.1))
    IdealDenoiser(pool, VE())(noisy.x_t, noisy.t)
    assert 16 <= sum(summed) < 16 * len(pool) / 100


@pytest.mark.parametrize("sigma", [0.0, 1e-4, 0.2, 5.0])
def test_the_posterior_of_any_point_is_that_over_all_data_where_the_screen_sees_all_dimensions(sigma: float) -> None:
    x_t = 3 * torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    level, label = torch.full((20,), sigma, dtype=torch.float64), torch.full((20,), -1)
    found, wanted = (
        target.posterior(x_t, level, torch.ones_like(level), label)
        for target in (ExactTarget(Pool(SIX)), streamed(Pool(SIX)))
    )
    torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.ess, wanted.ess, rtol=1e-6, atol=1e-7)


def test_values_that_are_not_finite_and_unknown_labels_are_refused() -> None:
    denoiser = IdealDenoiser(many(), VE())
    x_t = torch.zeros(2, 1, 16, 16)
    x_t[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="x_t is not finite in example 1"):
        denoiser(x_t, torch.ones(2))
    with pytest.raises(ValueError, match="no data point has label 7"):
        denoiser(torch.zeros(2, 1, 16, 16), torch.ones(2), torch.tensor([0, 7]))
