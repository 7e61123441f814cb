"""Noise levels for data that nobody has trained on yet.

sigma_data   the standard deviation of the data (Karras et al. 2022, table 1).
sigma_max    the greatest distance between two members, beyond which all are alike (Song & Ermon 2020, technique 1).
sigma_min    a quarter of a step between two values of a byte, which is gone once rounded: for 256 values EDM's 0.002.
             For other data 0.004 sigma_data, EDM's ratio.
mean, std    of ln sigma: 95 % of training noise lies where at least half is learnable of what is learnable at best;
             but std is never below EDM's 1.2, for a network learns more than is counted here, at more levels. The
             reason is EDM's ("only at intermediate noise levels", Karras et al. 2022, section 5), the rule is ours.

What is learnable at a level is the share of the loss of a network in EDM's scalings that the best linear denoiser
removes (`Linear`): at small noise there is nothing to see, at large noise nothing but the mean. The posterior over the
data at hand would not do in its place: where it is one image there is nothing to learn for one who knows all images,
and everything for a network that shall draw new ones.
"""

import math
from dataclasses import dataclass

import torch

from stablefield.evaluate.field.extent import Extent
from stablefield.evaluate.field.linear import Linear
from stablefield.reference import Pool
from stablefield.times import LogNormal


@dataclass(frozen=True)
class Proposal:
    """Settings of noise for data, for a variance-exploding process (EDM), in units of x.

    Attributes:
        sigma_data: spread of the data.
        sigma_min, sigma_max: the ends of sampling.
        mean, std: of ln sigma in training.
        least: what sigma_min comes from.
        learnable: the ends of the range that `mean` and `std` come from; none where the data are white noise, of
            which nothing can be learnt linearly: then they are EDM's, moved to this sigma_data.
    """

    sigma_data: float
    sigma_min: float
    sigma_max: float
    mean: float
    std: float
    least: str
    learnable: tuple[float, float] | None

    @classmethod
    def of(cls, pool: Pool, sigma_data: float, extent: Extent, linear: Linear) -> "Proposal":
        """The rules above, for data of this spread."""
        if pool.data.dtype == torch.uint8:
            sigma_min, least = 2 / (pool.levels - 1) / 4, f"a quarter of a step between {pool.levels} values"
        else:
            sigma_min, least = 0.004 * sigma_data, "0.004 sigma_data, EDM's ratio"
        ends = learnable_range(linear)
        low, high = ends or (0.0, 0.0)
        usual = LogNormal()
        mean = math.log(low * high) / 2 if ends else usual.mean + math.log(sigma_data / 0.5)
        std = math.log(high / low) / 4 if ends else usual.std
        return cls(
            _digits(sigma_data),
            _digits(sigma_min),
            _digits(extent.farthest),
            round(mean, 1),
            max(usual.std, round(std, 1)),
            least,
            ends,
        )

    def times(self) -> LogNormal:
        """The proposed density of training noise."""
        return LogNormal(self.mean, self.std)

    def settings(self) -> list[str]:
        """As keys of a configuration."""
        return [
            f"scaling.sigma_data={self.sigma_data:g}",
            f"weight.sigma_data={self.sigma_data:g}",
            f"times.mean={self.mean:g}",
            f"times.std={self.std:g}",
            f"grid.sigma_min={self.sigma_min:g}",
            f"grid.sigma_max={self.sigma_max:g}",
        ]

    def reasons(self) -> list[str]:
        """Where they come from, in words."""
        if self.learnable is None:
            density = "times: EDM's, moved to this sigma_data, for nothing can be learnt linearly of these data"
        else:
            low, high = self.learnable
            density = f"times: most at {low:.2g} to {high:.2g}, where half is learnable linearly of what is at best"
        return [
            density,
            f"sigma_min: {self.least}",
            "sigma_max: the greatest distance found between two members (Song & Ermon 2020)",
        ]


def _digits(value: float) -> float:
    """Two of them: more are not known."""
    return float(f"{value:.2g}")


def learnable_range(linear: Linear, share: float = 0.5) -> tuple[float, float] | None:
    """Between which sigma at least this share is learnable of what is at best; none where next to nothing is."""
    spread = float(linear.variances.mean().sqrt())
    level = spread * torch.logspace(-5, 4, 1801, dtype=torch.float64)
    learnable = linear.learnable(level)
    if learnable.max() < 0.01:
        return None
    inside = level[learnable >= share * learnable.max()]
    return float(inside[0]), float(inside[-1])
