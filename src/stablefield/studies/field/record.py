"""Results of a variance study: estimates with standard errors at several noise levels, and their units."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from stablefield.studies.field.estimate import Estimate

__all__ = ["Field", "STFErrors"]


@dataclass(frozen=True, eq=False)
class STFErrors:
    """Errors of the STF target for one size of the support, with and without the source in it, in units of x squared.

    Attributes:
        variance: V_STF, the mean squared distance to E[x | x_t] with the source in the support. It is all variance,
            because that target is unbiased.
        squared_bias: squared bias with the source in the support; 0 up to chance.
        error_without_source: mean squared distance to E[x | x_t] if the support is drawn independently of the source.
        squared_bias_without_source: squared bias without the source, a part of `error_without_source`.
    """

    variance: Estimate
    squared_bias: Estimate
    error_without_source: Estimate
    squared_bias_without_source: Estimate


@dataclass(frozen=True, eq=False)
class Field:
    """Variance and bias of training targets, and statistics of the posterior, at several noise levels.

    Attributes:
        t: times, (L,).
        alpha: scale of the data in x_t at each time, (L,).
        sigma: noise level at each time, (L,).
        num_data_points: N, the number of data points.
        dim: number of dimensions of a data point.
        examples: number of x_t at each noise level.
        draws: number of reference batches of each size.
        dsm: V_DSM, the variance of the DSM target, in units of x squared, summed over the dimensions.
        rounding: squared error of the exact posterior mean when rounded to the data type of the data, in the same unit.
        ess_share: effective sample size 1 / sum w^2 of the posterior, divided by N.
        kl: KL divergence of the posterior from the prior, sum w log(N w), in nats.
        divergence: the paper's D(t), sum w f(1 / (N w)), dimensionless (Xu et al. 2023, section 4).
        single_source: fraction of the x_t for which one data point has at least 99 % of the posterior.
        stf: errors of the STF target by size of the support.
    """

    t: Float[Tensor, "L"]
    alpha: Float[Tensor, "L"]
    sigma: Float[Tensor, "L"]
    num_data_points: int
    dim: int
    examples: int
    draws: int
    dsm: Estimate
    rounding: Estimate
    ess_share: Estimate
    kl: Estimate
    divergence: Estimate
    single_source: Estimate
    stf: Mapping[int, STFErrors]

    @property
    def noise_level(self) -> Float[Tensor, "L"]:
        """Noise level sigma / alpha, which is comparable between processes."""
        return self.sigma / self.alpha

    def in_noise_units(self, estimate: Estimate) -> Estimate:
        """Convert from units of x squared to noise units per dimension, in which V_DSM is between 0 and 1.

        Args:
            estimate: a variance in units of x squared, summed over the dimensions.
        """
        return estimate.scaled((self.alpha / self.sigma).square() / self.dim)

    def in_score_units(self, estimate: Estimate) -> Estimate:
        """Convert from units of x squared to score units, summed over the dimensions.

        Args:
            estimate: a variance in units of x squared, summed over the dimensions.
        """
        return estimate.scaled(self.alpha.square() / self.sigma**4)
