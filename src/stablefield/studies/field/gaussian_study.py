"""Estimates of the variance study for two Gaussians, from fresh draws, beside their closed forms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.data import Progress, silent
from stablefield.kernel.gaussian import posterior
from stablefield.process import draw_noise
from stablefield.seeding import generator
from stablefield.studies.field.estimate import Estimate, squared_bias, squared_error
from stablefield.studies.field.gaussians import TwoGaussians

__all__ = ["DSM_SAMPLES", "GaussianStudy", "divergence_integrand", "normal_errors", "study_gaussians"]

# Samples for the quantities that need no references. At small noise, few of them lie between the two Gaussians, and
# these cause all of the variance.
DSM_SAMPLES = 50_000


@dataclass(frozen=True, eq=False)
class GaussianStudy:
    """Estimates and closed forms for two Gaussians at several noise levels; variances in units of x squared.

    Attributes:
        sigma: noise levels, (L,).
        dsm: estimate of V_DSM.
        dsm_closed: V_DSM in closed form.
        kl: estimate of the mean KL divergence of the posterior from the prior, in nats.
        kl_closed: the same in closed form.
        divergence: estimate of the paper's D(t). Below sigma^2 = 15 v it has no finite variance, and its standard error
            is too small.
        divergence_closed: D(t) by quadrature.
        limit: mean trace of A, the limit of (n - 1) V_STF.
        stf: V_STF by size of the support.
        stf_squared_bias: squared bias by size of the support; 0 up to chance.
    """

    sigma: Float[Tensor, "L"]
    dsm: Estimate
    dsm_closed: Float[Tensor, "L"]
    kl: Estimate
    kl_closed: Float[Tensor, "L"]
    divergence: Estimate
    divergence_closed: Float[Tensor, "L"]
    limit: Estimate
    stf: Mapping[int, Estimate]
    stf_squared_bias: Mapping[int, Estimate]


def study_gaussians(
    population: TwoGaussians,
    sigma: Float[Tensor, "L"],
    *,
    sizes: Sequence[int] = (16, 64, 256, 1024),
    examples: int = 256,
    draws: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> GaussianStudy:
    """Compare targets from fresh draws of two Gaussians with the exact E[x | y].

    Args:
        population: the distribution of x and of the references.
        sigma: noise levels, (L,).
        sizes: sizes of the support, the source included.
        examples: number of y at each noise level.
        draws: number of reference batches of each size, each with a source drawn anew from the posterior.
        seed: seed of all draws.
        progress: called with (done, total), in noise levels.
    """
    results = []
    for done, noise_level in enumerate(sigma.tolist()):
        g = generator(seed, "gaussians", done)
        results.append(_measure(population, noise_level, sizes, examples, draws, g))
        progress(done + 1, len(sigma))
    estimates = {
        name: Estimate.over_examples(torch.stack([values[name] for values, _ in results])) for name in results[0][0]
    }
    products = {n: torch.stack([gram[n] for _, gram in results]) for n in sizes}
    return GaussianStudy(
        sigma,
        dsm_closed=population.dsm(sigma),
        kl_closed=population.kl(sigma),
        divergence_closed=population.divergence(sigma),
        stf={n: squared_error(gram.diagonal(dim1=2, dim2=3)) for n, gram in products.items()},
        stf_squared_bias={n: squared_bias(gram) for n, gram in products.items()},
        **estimates,
    )


def normal_errors(
    population: TwoGaussians, y: Float[Tensor, "1 D"], sigma: float, n: int, draws: int, generator: torch.Generator
) -> Float[Tensor, "draws"]:
    """Standardized errors of the STF target at one y, which tend to N(0, 1) as n grows.

    They are sqrt(n) <u, T_n - E[x | y]> / sqrt(u A u), with u the direction between the means.

    Args:
        population: the distribution of x and of the references.
        y: one noisy data point, (1, D).
        sigma: noise level.
        n: size of the support, the source included.
        draws: number of independent reference batches.
        generator: source of randomness.
    """
    u = torch.nn.functional.normalize(population.means[:1], dim=1)
    scale = torch.einsum("bi,bij,bj->", u, population.limit(y, sigma), u).sqrt()
    parts = [_targets(population, y.expand(part, -1), sigma, n, generator) for part in _parts(draws)]
    return n**0.5 * ((torch.cat(parts) - population.mean(y, sigma)) * u).sum(1) / scale


def _parts(total: int, most: int = 100) -> list[int]:
    """Sizes of parts that add up to a total."""
    return [min(most, total - start) for start in range(0, total, most)]


def _targets(
    population: TwoGaussians, y: Float[Tensor, "B D"], sigma: float, n: int, g: torch.Generator
) -> Float[Tensor, "B D"]:
    """STF target of each y, from its own reference batch and a source drawn from its posterior."""
    support = population.draw(len(y) * (n - 1), g).unflatten(0, (len(y), n - 1))
    return posterior(y, support, sigma=sigma, source=population.draw_source(y, sigma, g)).mean


def _measure(
    population: TwoGaussians, sigma: float, sizes: Sequence[int], examples: int, draws: int, g: torch.Generator
) -> tuple[dict[str, Tensor], dict[int, Float[Tensor, "B R R"]]]:
    """Quantities of each example at one noise level, and inner products of its errors for each size."""
    y = _noisy(population.draw(examples, g), sigma, g)
    mean = population.mean(y, sigma)
    sources = torch.stack([population.draw_source(y, sigma, g) for _ in range(draws)], 1)
    products = {}
    for n in sizes:
        targets = [
            posterior(y, population.draw(n - 1, g), sigma=sigma, source=sources[:, r]).mean for r in range(draws)
        ]
        errors = torch.stack(targets, 1) - mean[:, None]
        products[n] = errors @ errors.mT
    limit = population.limit(y, sigma).diagonal(dim1=1, dim2=2).sum(1)
    return {**_without_references(population, sigma, g), "limit": limit}, products


def _without_references(population: TwoGaussians, sigma: float, g: torch.Generator) -> dict[str, Float[Tensor, "S"]]:
    """Squared error of the DSM target, log p(y | x) / p(y) and the f of D(t), for many samples."""
    x = population.draw(DSM_SAMPLES, g)
    y = _noisy(x, sigma, g)
    log_given = -(y - x).square().sum(1) / (2 * sigma**2) - population.dim / 2 * math.log(2 * math.pi * sigma**2)
    squares = (x - population.mean(y, sigma)).square().sum(1)
    log_ratio = log_given - population.log_density(y, sigma)
    return {"dsm": squares, "kl": log_ratio, "divergence": divergence_integrand(log_ratio)}


def divergence_integrand(log_ratio: Float[Tensor, "S"]) -> Float[Tensor, "S"]:
    """The paper's f(r) of r = exp(-log_ratio), without the term 8 r / 27 - 8 / 27, whose mean is 0.

    Where the two Gaussians are far apart, half of E r = 1 comes from x of the one and y of the other, which no sample
    contains; so the term must be replaced by its mean.

    Args:
        log_ratio: l = log p(y | x) / p(y) of each sample.
    """
    r = (-log_ratio).exp()
    return 8 / 27 + torch.where(r < 1.5, (log_ratio.exp() - 1).square() - 8 * r / 27, -1 / 3)


def _noisy(x: Float[Tensor, "B D"], sigma: float, g: torch.Generator) -> Float[Tensor, "B D"]:
    return x + sigma * draw_noise(x, g)
