"""Consequences of a variance study for a training, and its files: where target variance is, and how it enters the loss.

Training draws t from its distribution and weighs squared errors by w(t). So the variance of its targets adds

    E_t w(t) V(t) / D

to its loss. Between the measured noise levels, V in noise units is interpolated linearly in log(sigma / alpha); below
the lowest level it is taken as 0, above the highest as constant.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield import __version__
from stablefield.checkpoint import finite
from stablefield.files import atomic_path, write_text
from stablefield.floor import ByNoise
from stablefield.objective import LossWeight
from stablefield.studies.field.plots import plot_bias, plot_field
from stablefield.studies.field.study import COLUMNS, VarianceStudy
from stablefield.times import TimeDistribution

Range = tuple[float, float]
POINTS = 8192  # quantiles that represent the distribution of t


@dataclass(frozen=True)
class VarianceReport:
    """Target variance as a training meets it, for a distribution of t and a loss weight.

    All noise levels are sigma / alpha. "Share of the training noise" means the probability of the distribution of t.

    Attributes:
        phases: noise levels between which several sources compete. Below the first, one source explains most x_t; above
            the second, the posterior is close to the prior. None where that is outside the measured levels.
        high: range in which V_DSM is at least half its maximum, in noise units.
        high_share: share of the training noise in that range.
        competing_share: share of the training noise where several sources compete.
        central: range that contains the middle 90 % of the variance in the loss; None if there is no variance.
        central_share: share of the training noise in that range.
        dsm: contribution of V_DSM to the loss, weighted, per dimension.
        stf: contribution of V_STF for every size of the support, in the same unit.
        linear_loss: loss of the best linear denoiser (variance included), in the same unit.
        mean_share_of_loss: ratio of V_DSM to the loss of the best linear denoiser, averaged over the training noise.
            Loss weights that emphasize small noise hide large noise in the sum; here all noise levels count equally.
        num_data_points: N, the number of data points.
        times: the distribution of t, as text.
    """

    phases: tuple[float | None, float | None]
    high: Range
    high_share: float
    competing_share: float
    central: Range | None
    central_share: float
    dsm: float
    stf: dict[int, float]
    linear_loss: float
    mean_share_of_loss: float
    num_data_points: int
    times: str

    @classmethod
    def from_study(cls, study: VarianceStudy, times: TimeDistribution, weight: LossWeight) -> "VarianceReport":
        """Report for a training with a distribution of t and a loss weight.

        Args:
            study: the measured quantities, with the process of the training.
            times: distribution of t (noise distribution) of the training.
            weight: loss weight of the training.
        """
        t = times.quantile((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS)
        alpha, sigma = study.process.scales(t)
        noise_level = sigma / alpha
        factor = weight(study.process, t) / study.dim
        variance, error = _interpolated(study, study.dsm, noise_level), study.linear.squared_error(noise_level)
        weighted = factor * variance
        high, phases, central = _high(study), study.phases, _central(noise_level, weighted)
        return cls(
            phases,
            high,
            _share(noise_level, high),
            _share(noise_level, (phases[0] or 0.0, phases[1] or math.inf)),
            central,
            _share(noise_level, central) if central else 0.0,
            float(weighted.mean()),
            {n: float((factor * _interpolated(study, e.variance, noise_level)).mean()) for n, e in study.stf.items()},
            float((factor * error).mean()),
            float((variance / error).mean()),
            study.num_data_points,
            repr(times),
        )

    @property
    def share_of_loss(self) -> float:
        """Ratio of the contribution of V_DSM to the loss of the best linear denoiser."""
        return self.dsm / self.linear_loss

    def size_for(self, factor: float) -> tuple[float, bool]:
        """Size of the support for which V_STF is smaller than V_DSM by a factor, and whether it is interpolated.

        Between measured sizes, log V is interpolated linearly in log n. Beyond the largest measured size m, the last
        segment is extrapolated and multiplied by (N - n) / (N - m), the finite population correction of draws without
        replacement, so that V is 0 for n = N.

        Args:
            factor: how many times smaller V_STF must be.

        Returns:
            The size; True if it is between measured sizes, False if it is extrapolated.
        """
        goal = self.dsm / factor
        points = [(1, self.dsm), *((n, v) for n, v in self.stf.items() if n > 1)]
        for (n, v), (m, u) in pairwise(points):
            if u <= goal:
                return n * (m / n) ** (math.log(v / goal) / math.log(v / max(u, 1e-300))), True
        (n, v), (m, u) = points[-2:] if len(points) > 1 else (points[0], (2, self.dsm))
        slope = math.log(v / u) / math.log(m / n)
        beyond = torch.logspace(math.log10(m), math.log10(self.num_data_points), 2000, dtype=torch.float64)
        rest = self.num_data_points - beyond
        enough = u * (beyond / m) ** -slope * rest / (self.num_data_points - m) <= goal
        return float(beyond[int(enough.long().argmax())]) if enough.any() else float(self.num_data_points), False

    def lines(self) -> list[str]:
        """The report as lines of text."""
        one, prior = self.phases
        share, mean_share = _percent(self.share_of_loss), _percent(self.mean_share_of_loss)
        lines = [f"DSM targets vary most at sigma = {_span(self.high)} (at least half the maximum, in noise units)."]
        if one is not None:
            lines += [f"Below sigma = {one:.2g} most x_t have one likely source, and there is nothing to average."]
        if prior is not None:
            lines += [f"Above sigma = {prior:.2g} the posterior is close to the prior, and a few references suffice."]
        lines += [
            f"Of the training noise, {self.times}, {self.high_share:.1%} is where DSM targets vary most,",
            f"  and {self.competing_share:.1%} where several sources compete.",
        ]
        if self.central:
            lines += [
                f"90% of the variance in the loss comes from sigma = {_span(self.central)},",
                f"  where {self.central_share:.1%} of the training noise is.",
            ]
        lines += [
            *(self._sizes() if self.dsm > 0 else ()),
            f"The variance of DSM targets is {share} of the loss of a linear denoiser, {self.linear_loss:.3g};",
            f"  averaged over the training noise, it is {mean_share} of that loss at each noise level.",
            "  A network's loss is smaller, so its shares are larger; other gradient variance is not measured.",
        ]
        if max(self.share_of_loss, self.mean_share_of_loss) < 0.01:
            lines += ["Expect no gain from stable targets in this training: almost every x_t has one likely source."]
        elif self.stf:
            removed = 1 - min(self.stf.values()) / self.dsm
            lines += [f"{max(self.stf):,} references remove {removed:.0%} of that variance, all data remove all of it."]
        return lines

    def summary(self) -> list[str]:
        """The most important results in two or three lines of text."""
        one, prior = (f"{level:.2g}" if level else "?" for level in self.phases)
        lines = [f"several sources compete at sigma = {one} to {prior}, {self.competing_share:.1%} of this noise"]
        for n, variance in self.stf.items():
            reduction = f"; {n:,} references remove {1 - variance / self.dsm:.0%} of it" if self.dsm > 0 else ""
            share = _percent(self.share_of_loss)
            lines.append(f"the variance of DSM targets is {share} of the loss of a linear denoiser{reduction}")
        return lines

    def _sizes(self) -> Iterator[str]:
        yield f"Variance of targets in the weighted loss, per dimension: {self.dsm:.3g} with DSM targets,"
        for n, variance in self.stf.items():
            less = f"{self.dsm / variance:.3g} times less" if variance > 0 else "none left"
            yield f"  {variance:.3g} with {n:,} references ({less}),"
        yield "  0 with all data (target.kind=exact --set target.missing_mass=0)."
        size, measured = self.size_for(10)
        if size > 0.9 * self.num_data_points:
            yield "A 10 times smaller variance needs all data."
        else:
            digits = 10 ** max(0, math.floor(math.log10(size)) - 1)  # two are significant
            rounded, how = math.ceil(size / digits) * digits, "" if measured else " (extrapolated from smaller sizes)"
            yield f"A 10 times smaller variance needs about {rounded:,} references{how}."


def _interpolated(study: VarianceStudy, variance: ByNoise, noise_level: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Variance at other noise levels than the measured ones, in units of x squared."""
    measured, order = study.noise_level.sort()
    in_noise = (variance.by_bin / study.noise_level.square())[order]
    at = np.interp(noise_level.log().numpy(), measured.log().numpy(), in_noise.numpy(), left=0.0)
    return torch.from_numpy(at) * noise_level.square().clamp(max=float(measured[-1]) ** 2)


def _high(study: VarianceStudy) -> Range:
    """Range of the measured noise levels at which V_DSM is at least half its maximum, in noise units."""
    values = study.in_noise_units(study.dsm).by_bin
    inside = study.noise_level[values >= values.max() / 2]
    return float(inside.min()), float(inside.max())


def _central(noise_level: Float[Tensor, "P"], amount: Float[Tensor, "P"], share: float = 0.9) -> Range | None:
    """Range of noise levels that contains the middle part of an amount; None if the amount is 0."""
    noise_level, order = noise_level.sort()
    below = amount[order].cumsum(0)
    if not below[-1] > 0:
        return None
    ends = torch.searchsorted(below, below[-1] * torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64))
    low, high = noise_level[ends.clamp(max=len(noise_level) - 1)].tolist()
    return low, high


def _share(noise_level: Float[Tensor, "P"], ends: Range) -> float:
    """Share of the noise levels that are in a range."""
    return float(((noise_level >= ends[0]) & (noise_level <= ends[1])).double().mean())


def _percent(share: float) -> str:
    return f"{share:.2%}" if share > 1e-4 or share == 0 else f"{share:.1g}"


def _span(ends: Range) -> str:
    return f"{ends[0]:.2g} to {ends[1]:.2g}"


def write_study(
    folder: Path, study: VarianceStudy, report: VarianceReport, *, name: str, description: Mapping[str, Any]
) -> list[str]:
    """Write field.csv, field.json, field.png and bias.png.

    Args:
        folder: where they are written; made if it does not exist.
        study: the measured quantities.
        report: their consequences for a training.
        name: name of the data, for the titles of the figures.
        description: further entries of the JSON file, such as the data and the seed.

    Returns:
        The names of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = list(study.records())
    with atomic_path(folder / "field.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)
    content = {"stablefield": __version__, **description, "report": asdict(report)}
    write_text(folder / "field.json", json.dumps({**content, "records": finite(records)}, indent=1) + "\n")
    plot_field(folder / "field.png", study, f"Variance of training targets: {name}")
    plot_bias(folder / "bias.png", study, f"Squared error with and without the source in the support: {name}")
    return ["field.csv", "field.json", "field.png", "bias.png"]
