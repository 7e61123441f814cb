"""The example of two Gaussians: closed forms agree with each other, with draws, and with the variance study."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stablefield import Pool
from stablefield.seeding import generator
from stablefield.studies.field import measure

PATH = Path(__file__).parents[2] / "examples" / "two_gaussians.py"
SPEC = importlib.util.spec_from_file_location("two_gaussians", PATH)
example = sys.modules["two_gaussians"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)
GAUSSIANS = example.TwoGaussians(dim=8)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def estimated(sigma: torch.Tensor, *, samples: int = 50_000, seed: int = 0, **counts):
    return example.study(GAUSSIANS, sigma, samples=samples, seed=seed, **counts)


@pytest.mark.parametrize("sigma", [0.03, 0.2, 0.7])
def test_the_posterior_mean_agrees_with_tweedies_formula(sigma):
    y = GAUSSIANS.draw(6, generator(0)) + sigma * torch.randn(6, 8, generator=generator(1), dtype=torch.float64)
    y.requires_grad_()
    (score,) = torch.autograd.grad(GAUSSIANS.log_density(y, sigma).sum(), y)
    torch.testing.assert_close(GAUSSIANS.mean(y, sigma).detach(), (y + sigma**2 * score).detach(), rtol=1e-9, atol=1e-9)


def test_the_derivative_of_the_mutual_information_is_half_the_variance():
    # Guo, Shamai & Verdu 2005: dI / d(1 / sigma^2) = V / 2
    sigma = tensor(0.01, 0.05, 0.1, 0.3, 1.0)
    step = 1e-5 * sigma
    slope = (GAUSSIANS.kl(sigma + step) - GAUSSIANS.kl(sigma - step)) / (2 * step)
    torch.testing.assert_close(-slope * sigma**3, GAUSSIANS.dsm(sigma), rtol=1e-6, atol=1e-12)


def test_estimates_agree_with_the_closed_forms():
    sigma = tensor(0.02, 0.1, 0.2, 0.4)
    study = estimated(sigma, sizes=(8, 256), examples=24, draws=24)
    assert ((study.dsm.by_bin - GAUSSIANS.dsm(sigma)).abs() < 4 * study.dsm.errors_by_bin).all()
    assert ((study.kl.by_bin - GAUSSIANS.kl(sigma)).abs() < 4 * study.kl.errors_by_bin).all()
    for n in (8, 256):
        assert (study.stf[n].by_bin < GAUSSIANS.dsm(sigma)).all()
        assert (study.bias[n].by_bin.abs() < 4 * study.bias[n].errors_by_bin).all()


def test_the_variance_on_many_data_points_is_that_of_their_distribution():
    pool = Pool(GAUSSIANS.draw(3000, generator(5)))
    sigma = tensor(0.15, 0.3, 0.8)
    found = measure(pool, noise_levels=sigma, sizes=(64,), examples=400, draws=3)
    dsm = GAUSSIANS.dsm(sigma)
    assert ((found.dsm.by_bin - dsm).abs() < 4 * found.dsm.errors_by_bin + 0.02 * dsm).all()
    assert ((found.kl.by_bin - GAUSSIANS.kl(sigma)).abs() < 4 * found.kl.errors_by_bin + 0.02).all()


def test_the_asymptotic_covariance_is_centered():
    sigma, g = 0.15, generator(2)
    y = GAUSSIANS.draw(1, g) * 0.5 + 0.1 * torch.randn(1, 8, generator=g, dtype=torch.float64)
    x = GAUSSIANS.draw(400_000, g)
    likelihood = (-(y - x).square().sum(1) / (2 * sigma**2)).exp()
    centered = likelihood[:, None] * (x - GAUSSIANS.mean(y, sigma))
    by_draws = centered.T @ centered / len(x) / likelihood.mean() ** 2
    limit = GAUSSIANS.limit(y, sigma)[0]
    assert (by_draws - limit).norm() < 0.02 * limit.norm()
    not_centered = (likelihood[:, None] * x).T @ (likelihood[:, None] * x) / len(x) / likelihood.mean() ** 2
    assert (not_centered - limit).norm() > 0.1 * limit.norm()


def test_errors_become_normal_with_the_asymptotic_covariance():
    sigma, g = 0.15, generator(3)
    y = GAUSSIANS.draw(1, g) * 0.5 + 0.1 * torch.randn(1, 8, generator=g, dtype=torch.float64)
    errors = example.normal_errors(GAUSSIANS, y, sigma, 400, 1500, g)
    below = torch.special.ndtr(errors.sort().values)
    expected = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    assert (below - expected).abs().max() < 1.95 / 1500**0.5  # Kolmogorov-Smirnov test at level 0.001


def test_variance_falls_as_one_over_n_minus_one():
    study = estimated(tensor(0.1), sizes=(64, 256, 1024), examples=16, draws=200, seed=1)
    ratios = [(n - 1) * float(estimate.by_bin / study.limit.by_bin) for n, estimate in study.stf.items()]
    assert ratios == pytest.approx([1, 1, 1], rel=0.25)
    assert abs(ratios[2] - 1) < 0.12


def test_the_quadrature_gives_the_kl_and_the_mean_of_the_ratio():
    for population in (GAUSSIANS, example.TwoGaussians()):
        for sigma in (0.03, 0.1, 0.7, 3.0):
            closed = float(population.kl(tensor(sigma)))
            assert population._mean_over_ratio(torch.ones_like, sigma) == pytest.approx(1, abs=1e-9)
            assert population._mean_over_ratio(lambda log_ratio: log_ratio, sigma) == pytest.approx(closed, abs=1e-8)
        # E p(y) / p(y | x) is 1, and the closed forms of powers agree with the quadrature
        assert population._mean_over_ratio(lambda log_ratio: (-log_ratio).exp(), 1.0) == pytest.approx(1, abs=1e-9)
        for power in (1, 2):
            mean = population._mean_over_ratio(lambda log_ratio, power=power: (power * log_ratio).exp(), 1.0)
            assert mean == pytest.approx(float(population._power(1.0, power)), rel=1e-9)


def test_the_papers_divergence_agrees_with_many_draws_and_with_many_data_points():
    sigma, g = tensor(0.1, 0.3, 1.0, 3.0), generator(3)
    closed = GAUSSIANS.divergence(sigma)
    study = estimated(sigma, sizes=(4,), examples=4, draws=4)
    assert ((study.divergence.by_bin - closed).abs() < 4 * study.divergence.errors_by_bin).all()
    for noise_level, expected in zip(sigma[2:].tolist(), closed[2:].tolist(), strict=True):
        x = GAUSSIANS.draw(200_000, g)  # f as in the paper, at noise where no draw is too rare
        y = x + noise_level * torch.randn(x.shape, generator=g, dtype=torch.float64)
        log_given = -(y - x).square().sum(1) / (2 * noise_level**2) - 4 * math.log(2 * math.pi * noise_level**2)
        r = (GAUSSIANS.log_density(y, noise_level) - log_given).exp()
        f = torch.where(r < 1.5, (1 / r - 1).square(), 8 * r / 27 - 1 / 3)
        assert abs(float(f.mean()) - expected) < 4 * float(f.std()) / len(f) ** 0.5
    found = measure(Pool(GAUSSIANS.draw(4000, g)), noise_levels=sigma[1:], sizes=(), examples=256)
    assert ((found.divergence.by_bin - closed[1:]).abs() < 4 * found.divergence.errors_by_bin + 0.02 * closed[1:]).all()


def test_the_papers_divergence_is_infinite_at_small_noise():
    edge = (3 * GAUSSIANS.variance) ** 0.5
    divergence = GAUSSIANS.divergence(tensor(0.5 * edge, edge, 1.05 * edge, 2 * edge, 100 * edge))
    assert torch.isinf(divergence).tolist() == [True, True, False, False, False]
    assert (divergence[2:].diff() < 0).all()
    with pytest.raises(ValueError, match="at least 4 dimensions, not 2"):
        example.TwoGaussians(dim=2).divergence(tensor(1.0))


def test_the_example_prints_closed_forms_beside_estimates_and_writes_a_figure(tmp_path):
    few = ("--samples", "500", "--examples", "4", "--draws", "4")
    done = subprocess.run([sys.executable, PATH, *few], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TwoGaussians(dim=64, offset=0.1, variance=0.0001)" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.lstrip()[:1].isdigit()]) == 13
    assert (tmp_path / "two-gaussians.png").stat().st_size > 10_000
