"""Noise levels and noise distribution for data that no model has been trained on yet.

sigma_data   standard deviation of the data (Karras et al. 2022, table 1).
sigma_max    where x_t still explains 1 % of the variance of the data: above, the best prediction is their mean, the
             floor of the loss is their variance, and nothing can be learned. It is 82 on CIFAR-10, where EDM's tuned
             value is 80. (The largest distance between two data points, technique 1 of Song & Ermon 2020, is 110.)
sigma_min    a quarter of the step between two byte values, which rounding removes: EDM's 0.002 for 256 values. For
             other data 0.004 sigma_data, EDM's ratio.
mean, std    of ln sigma in training: 95 % of the training noise is where the learnable share is at least half its
             maximum, but std is at least EDM's 1.2, because a network learns more than a linear denoiser, and at more
             noise levels. The reason is EDM's ("only at intermediate noise levels", Karras et al. 2022, section 5);
             the rule is ours.

The learnable share at a noise level is the share of the loss of a network with output 0, in EDM's preconditioning, that
the best linear denoiser removes (`LinearDenoiser`): at small noise nothing can be removed, at large noise only the mean
can be predicted. The posterior mean over the training data would not do in its place: where it is a single image, it
suggests that nothing remains to be learned, although a network that generates new images has everything to learn there.
"""

import math
from dataclasses import dataclass

import torch

from stablefield.data import Progress, silent
from stablefield.pool import Pool
from stablefield.studies.field.linear import LinearDenoiser
from stablefield.studies.field.study import VarianceStudy, measure
from stablefield.times import LogNormal

MAX_VALUES = 2 * 10**8  # numbers of the data that are examined, but those of no less than 1,024 data points


@dataclass(frozen=True)
class NoiseProposal:
    """Proposed noise settings for a variance-exploding process (EDM), in units of x.

    Attributes:
        sigma_data: standard deviation of the data.
        sigma_min: smallest noise level of sampling.
        sigma_max: largest noise level of sampling.
        mean: mean of ln sigma in training.
        std: standard deviation of ln sigma in training.
        sigma_min_rule: the rule that sigma_min comes from, as text.
        learnable: range of noise levels that `mean` and `std` come from. None for white noise, of which a linear
            denoiser can learn nothing; then they are EDM's, shifted to this sigma_data.
    """

    sigma_data: float
    sigma_min: float
    sigma_max: float
    mean: float
    std: float
    sigma_min_rule: str
    learnable: tuple[float, float] | None

    @classmethod
    def from_pool(cls, pool: Pool, sigma_data: float, linear: LinearDenoiser) -> "NoiseProposal":
        """Apply the rules of this module to a data set.

        Args:
            pool: the data.
            sigma_data: standard deviation of the data.
            linear: the linear denoiser of the data.
        """
        if pool.data.dtype == torch.uint8:
            sigma_min = 2 / (pool.num_levels - 1) / 4
            rule = f"a quarter of the step between two of {pool.num_levels} values"
        else:
            sigma_min, rule = 0.004 * sigma_data, "0.004 sigma_data, EDM's ratio"
        ends = _learnable_range(linear)
        low, high = ends or (0.0, 0.0)
        edm = LogNormal()
        mean = math.log(low * high) / 2 if ends else edm.mean + math.log(sigma_data / 0.5)
        std = math.log(high / low) / 4 if ends else edm.std
        return cls(
            _two_digits(sigma_data),
            _two_digits(sigma_min),
            _two_digits(linear.noise_level_explaining(0.01)),
            round(mean, 1),
            max(edm.std, round(std, 1)),
            rule,
            ends,
        )

    def times(self) -> LogNormal:
        """The proposed distribution of t (noise distribution) of training."""
        return LogNormal(self.mean, self.std)

    def settings(self) -> list[str]:
        """The proposal as configuration settings, each "section.key=value"."""
        return [
            f"preconditioning.sigma_data={self.sigma_data:g}",
            f"weight.sigma_data={self.sigma_data:g}",
            f"times.mean={self.mean:g}",
            f"times.std={self.std:g}",
            f"grid.sigma_min={self.sigma_min:g}",
            f"grid.sigma_max={self.sigma_max:g}",
        ]

    def reasons(self) -> list[str]:
        """The reasons for the proposal, as lines of text."""
        if self.learnable is None:
            reason = "times: EDM's, shifted to this sigma_data: a linear denoiser can learn nothing of these data"
        else:
            low, high = self.learnable
            reason = (
                f"times: mostly sigma = {low:.2g} to {high:.2g}, where the learnable share is at least half its maximum"
            )
        return [
            reason,
            f"sigma_min: {self.sigma_min_rule}",
            "sigma_max: where x_t explains 1 % of the variance of the data (best linear denoiser)",
        ]


def propose_noise(
    pool: Pool,
    sigma_data: float,
    *,
    examples: int = 16,
    progress: Progress = silent,
) -> tuple[NoiseProposal, VarianceStudy]:
    """Propose noise levels for data, and measure the variance of targets at them.

    Args:
        pool: the data. Of large data, evenly spaced data points are examined.
        sigma_data: standard deviation of the data.
        examples: number of x_t at each noise level.
        progress: called with (done, total).

    Returns:
        The proposal; a variance study with VE and a support of up to 1,024 of the `num_data_points` examined.

    Raises:
        ValueError: all data points are the same.
    """
    index = pool.evenly_spaced(max(1024, MAX_VALUES // math.prod(pool.shape)))
    few = pool if len(index) == len(pool) else pool.subset(index)
    size = min(1024, max(2, len(few) // 4))
    study = measure(few, sizes=[size], examples=examples, draws=4, progress=progress)
    return NoiseProposal.from_pool(few, sigma_data, study.linear), study


def _learnable_range(linear: LinearDenoiser, share: float = 0.5) -> tuple[float, float] | None:
    """Range of sigma in which the learnable share is at least a part of its maximum; None if that is below 1 %."""
    spread = float(linear.variances.mean().sqrt())
    noise_level = spread * torch.logspace(-5, 4, 1801, dtype=torch.float64)
    learnable = linear.learnable_share(noise_level)
    if learnable.max() < 0.01:
        return None
    inside = noise_level[learnable >= share * learnable.max()]
    return float(inside[0]), float(inside[-1])


def _two_digits(value: float) -> float:
    """A value rounded to two digits; more are not significant."""
    return float(f"{value:.2g}")
