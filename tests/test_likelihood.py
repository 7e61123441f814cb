"""Laws of the likelihood: closed forms, bits of quantized data, and unbiased estimates."""

import math

import pytest
import torch
from analytic import PROCESSES, Gaussian, Mixture

from stablefield import VE, VP, Flow, IdealDenoiser, Pool, Preconditioned
from stablefield.likelihood import bits_per_dim
from stablefield.networks import MLP
from stablefield.preconditioning import EDMPreconditioning, VEPreconditioning

STD = 0.25


def named(part: object) -> str:
    return type(part).__name__


def isotropic(process, dim=3):
    return Gaussian(process, torch.zeros(dim).double(), STD**2 * torch.eye(dim).double())


def quantized(n, num_levels, dim=3):
    """Normal data of standard deviation `STD` on the nearest levels, and -log2 of the probability of each bin."""
    generator = torch.Generator().manual_seed(0)
    x = STD * torch.randn(n, dim, generator=generator, dtype=torch.float64)
    integers = ((x + 1) * (num_levels - 1) / 2).round().clamp(0, num_levels - 1)
    edges = (2 * (torch.stack([integers - 0.5, integers + 0.5])) / (num_levels - 1) - 1) / STD
    low, high = torch.special.ndtr(edges)
    return integers.to(torch.uint8), -(high - low).log2().mean(1)


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("probes", [1, None], ids=["hutchinson", "exact"])
def test_the_density_of_a_gaussian_is_right(process, probes):
    denoiser = Gaussian(process)
    x = denoiser.mean + torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double() @ denoiser.axes / 4
    expected = -denoiser.log_density(x) / 2 / math.log(2)
    found = bits_per_dim(denoiser, x, num_levels=None, probes=probes)
    assert found.mean() == pytest.approx(float(expected.mean()), abs=1e-2 if probes is None else 0.1)
    if probes is None:
        # at noise level 80 the distribution is taken to be N(0, 80^2), although its mean is 0.5, which is 0.006 of 80
        assert torch.allclose(found, expected, atol=2e-2)
        higher = bits_per_dim(denoiser, x, num_levels=None, probes=None, sigma_max=800.0)
        assert torch.allclose(higher, expected, atol=2e-3)


@pytest.mark.parametrize("process", [VE(), VP(), Flow()], ids=named)
def test_the_density_of_a_mixture_is_right(process):
    x = torch.rand(32, 2, generator=torch.Generator().manual_seed(0)).double() - 0.5
    parts = [torch.distributions.Normal(mean, Mixture.std).log_prob(x).sum(1) for mean in Mixture.means]
    expected = -torch.logsumexp(torch.stack(parts) - math.log(2), 0) / 2 / math.log(2)
    found = bits_per_dim(Mixture(process), x, num_levels=None, probes=None)
    assert torch.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_bits_per_dimension_of_8_bit_data_are_those_of_their_bins(process):
    data, expected = quantized(200, 256)
    found = bits_per_dim(isotropic(process), data)
    # within a bin of 0.008 the density of one value varies by 4 %; over 600 values that averages out
    assert found.mean() == pytest.approx(float(expected.mean()), abs=1e-2)


def test_bits_per_dimension_follow_the_number_of_levels():
    data, expected = quantized(2000, 17)
    found = bits_per_dim(isotropic(VE()), data, num_levels=17)
    # a point within a wide bin costs more than the bin: by the variance of log p there, bin^2 / (24 STD^2) nats
    excess = float((found - expected).mean())
    assert excess == pytest.approx((2 / 16) ** 2 / (24 * STD**2) / math.log(2), abs=1e-2)
    assert excess > 0


def test_integers_and_their_scaled_values_are_the_same_data():
    data, _ = quantized(8, 17)
    scaled = Pool(data, num_levels=17).take(torch.arange(8))
    for x in (scaled, scaled.double()):
        found, wanted = (bits_per_dim(isotropic(VP()), values, num_levels=17) for values in (x, data))
        assert torch.allclose(found, wanted, atol=1e-5)


def test_each_doubling_of_the_levels_costs_one_bit():
    bits = [
        bits_per_dim(isotropic(VE()), quantized(200, num_levels)[0], num_levels=num_levels).mean()
        for num_levels in (128, 256)
    ]
    assert bits[1] - bits[0] == pytest.approx(math.log2(255 / 127), abs=1e-2)


def test_random_signs_estimate_the_divergence_without_bias():
    denoiser = Gaussian(VE())  # correlated, so that the estimate depends on the signs
    x = torch.tensor([[0.5, -0.2]]).double().expand(400, 2)
    exact = bits_per_dim(denoiser, x[:1], num_levels=None, probes=None)
    once, often = (bits_per_dim(denoiser, x, num_levels=None, probes=probes) for probes in (1, 16))
    assert once.std() > 3 * often.std() > 0
    assert once.mean() == pytest.approx(float(exact), abs=4 * float(once.std()) / 20)


def test_the_bits_of_an_example_depend_on_its_seed_and_not_on_its_batch():
    data, _ = quantized(4, 256)
    denoiser = Gaussian(VE(), torch.zeros(3).double(), torch.diag(torch.tensor([0.04, 0.09, 0.01])).double())
    together = bits_per_dim(denoiser, data, seeds=[7, 3, 5, 1])
    single = bits_per_dim(denoiser, data[2:3], seeds=[5])
    assert single.item() == pytest.approx(together[2].item(), abs=1e-4)
    assert bits_per_dim(denoiser, data[2:3], seeds=[6]).item() != single.item()


@pytest.mark.parametrize("preconditioning", [EDMPreconditioning(), VEPreconditioning()], ids=named)
def test_a_network_has_finite_bits_per_dimension(preconditioning):
    denoiser = Preconditioned(MLP((1, 4, 4), width=16, layers=1), VE(), preconditioning)
    images = torch.randint(0, 17, (4, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    found = bits_per_dim(denoiser, images, num_levels=17)
    assert found.shape == (4,)
    assert torch.isfinite(found).all()
    assert all(parameter.grad is None for parameter in denoiser.parameters())


def test_data_that_are_not_on_the_levels_are_refused():
    x = torch.rand(4, 3) * 2 - 1
    with pytest.raises(ValueError, match="do not lie on 256 levels"):
        bits_per_dim(isotropic(VE()), x)
    with pytest.raises(ValueError, match="do not lie on 17 levels"):
        bits_per_dim(isotropic(VE()), torch.full((1, 3), 200, dtype=torch.uint8), num_levels=17)


def test_wrong_seeds_probes_and_denoisers_are_refused():
    data, _ = quantized(4, 256)
    with pytest.raises(ValueError, match="need one seed per example: 4, not 1"):
        bits_per_dim(isotropic(VE()), data, seeds=[0])
    with pytest.raises(ValueError, match="at least 1 probe, not 0"):
        bits_per_dim(isotropic(VE()), data, probes=0)
    with pytest.raises(ValueError, match="IdealDenoiser is not differentiable"):
        bits_per_dim(IdealDenoiser(Pool(data), VE()), data)
