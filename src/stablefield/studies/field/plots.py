"""Plots of a variance study: target variance by noise level, phases of the posterior, proposed noise."""

import math
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stablefield.evaluate.plots import label, save_figure
from stablefield.floor import ByNoise
from stablefield.studies.field.proposal import NoiseProposal
from stablefield.studies.field.study import VarianceStudy

STYLES: tuple[Any, ...] = ("--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (6, 3)))
NOISE_LEVEL = "noise level sigma / alpha (units of the data)"


def plot_field(path: Path, study: VarianceStudy, title: str) -> None:
    """Plot the variance of targets in noise units and the statistics of the posterior, with the paper's three phases.

    Args:
        path: the image file to write.
        study: the measured quantities.
        title: title of the plot.
    """
    figure, (above, below) = _panels(title, 2, 6.4)
    label(above, "", "variance of the target per dimension\n(noise units: x² alpha² / sigma²)")
    _band(above, study, study.in_noise_units(study.dsm), "-", "DSM")
    for style, (n, errors) in zip(cycle(STYLES), study.stf.items(), strict=False):
        _band(above, study, study.in_noise_units(errors.variance), style, f"STF, support of {n:,}")
    above.set_ylim(bottom=0)
    above.legend(frameon=False, loc="best", bbox_to_anchor=(0, 0, 1, 0.94))  # below the names of the phases
    label(below, NOISE_LEVEL, "statistics of the posterior\n(shares, no unit)")
    _band(below, study, study.single_source, "-", "share of x_t with one likely source")
    kl = study.kl.map(lambda values: values / math.log(study.num_data_points))
    _band(below, study, kl, "--", "KL from the prior / log N")
    _band(below, study, study.ess_share, ":", "effective sample size / N")
    below.set_ylim(0, 1.02)
    below.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)
    _mark_phases(study, above, below)
    save_figure(figure, path)


def plot_bias(path: Path, study: VarianceStudy, title: str) -> None:
    """Plot squared errors of targets with the source in the support and without, relative to the DSM target's.

    Args:
        path: the image file to write.
        study: the measured quantities.
        title: title of the plot.
    """
    figure, (axes,) = _panels(title, 1, 4.2)
    label(axes, NOISE_LEVEL, "mean squared error of the target\n(ratio to that of the DSM target)")
    dsm = study.dsm.by_bin
    known = dsm > 1e-9 * dsm.max()
    for style, (n, errors) in zip(cycle(("-", *STYLES)), study.stf.items(), strict=False):
        for quantity, color, name in ((errors.variance, "black", "with"), (errors.without_source, "0.6", "without")):
            share = (quantity.by_bin / dsm)[known]
            name = f"support of {n:,} {name} the source"
            axes.plot(study.noise_level[known], share, linestyle=style, color=color, linewidth=1.6, label=name)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_proposal(path: Path, study: VarianceStudy, proposal: NoiseProposal, title: str) -> None:
    """Plot the learnable share and the variance of targets by noise level, and the proposed training noise.

    Args:
        path: the image file to write.
        study: the measured quantities.
        proposal: the proposed noise.
        title: title of the plot.
    """
    figure, (above, below) = _panels(title, 2, 6.4)
    ends = math.log10(proposal.sigma_min), math.log10(2 * proposal.sigma_max)
    noise_level = torch.logspace(*ends, 300, dtype=torch.float64)
    label(above, "", "share of the loss of a network with output 0\n(no unit)")
    name = "learnable by a linear denoiser (lower bound)"
    above.plot(noise_level, study.linear.learnable_share(noise_level), color="black", linewidth=1.6, label=name)
    lines = {"variance of the DSM target": study.dsm}
    lines |= {f"variance with a support of {n:,}": errors.variance for n, errors in study.stf.items()}
    for style, (name, variance) in zip(STYLES, lines.items(), strict=False):
        share = study.linear.share_of_initial_loss(variance.by_bin, study.noise_level)
        above.plot(study.noise_level, share, color="black", linestyle=style, linewidth=1.6, label=name)
    above.set_ylim(0, 1.02)
    above.legend(frameon=False, loc="upper left")
    label(below, NOISE_LEVEL, "proposed training noise\n(density over log sigma)")
    density = torch.distributions.Normal(proposal.mean, proposal.std).log_prob(noise_level.log()).exp()
    below.fill_between(noise_level, density, color="0.8", linewidth=0)
    for place, name in ((proposal.sigma_min, "sigma_min"), (proposal.sigma_max, "sigma_max")):
        below.axvline(place, color="black", linewidth=0.8)
        _annotate(below, name, place, (3, -3), rotation=90)
    below.set_ylim(bottom=0)
    save_figure(figure, path)


def _panels(title: str, count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels with a common logarithmic axis of the noise level; the first has the title."""
    figure = Figure(figsize=(7, height), dpi=120, layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [3, 2][:count]})[:, 0]
    axes[0].set_title(title, loc="left", fontsize=11)
    axes[0].set_xscale("log")
    return figure, list(axes)


def _band(axes: Axes, study: VarianceStudy, quantity: ByNoise, style: Any, name: str) -> None:
    """A line with a band of two standard errors."""
    axes.plot(study.noise_level, quantity.by_bin, linestyle=style, color="black", linewidth=1.6, label=name)
    low, high = (quantity.by_bin + sign * 2 * quantity.errors_by_bin for sign in (-1, 1))
    axes.fill_between(study.noise_level, low, high, color="0.85", linewidth=0)


def _mark_phases(study: VarianceStudy, *panels: Axes) -> None:
    """Thin lines between the phases of the posterior, with their names on top."""
    one, prior = study.phases
    for axes in panels:
        for place in filter(None, (one, prior)):
            axes.axvline(place, color="0.6", linewidth=0.8)
    low, high = float(study.noise_level.min()), float(study.noise_level.max())
    ends = (low, one or low, prior or high, high)
    for name, left, right in zip(("one source", "several compete", "posterior = prior"), ends, ends[1:], strict=False):
        if right > left:
            _annotate(panels[0], name, math.sqrt(left * right), (0, -2), ha="center", color="0.35")


def _annotate(axes: Axes, text: str, place: float, offset: tuple[float, float], **options: Any) -> None:
    """Text at a noise level, below the upper edge of a panel."""
    at: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    axes.annotate(text, (place, 1.0), offset, fontsize=9, **at, **options)
