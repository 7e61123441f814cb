"""Plots of a variance study: target variance by noise level, phases of the posterior, estimates and closed forms."""

import math
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from stablefield.evaluate.plots import label, save_figure
from stablefield.studies.field.estimate import Estimate
from stablefield.studies.field.gaussian_study import GaussianStudy
from stablefield.studies.field.linear import LinearDenoiser
from stablefield.studies.field.proposal import NoiseProposal
from stablefield.studies.field.record import Field
from stablefield.studies.field.report import phases_of

__all__ = ["plot_bias", "plot_field", "plot_proposal", "plot_study"]

STYLES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "--",
    "-.",
    ":",
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
    (0, (6, 3)),
)
NOISE_LEVEL = "noise level sigma / alpha (units of the data)"


def plot_field(path: Path, field: Field, title: str) -> None:
    """Plot the variance of targets in noise units and the statistics of the posterior, with the paper's three phases.

    Args:
        path: the image file to write.
        field: the measured field.
        title: title of the plot.
    """
    figure, (above, below) = _panels(2, (7, 6.4), [3, 2])
    above.set_title(title, loc="left", fontsize=11)
    label(above, "", "variance of the target per dimension\n(noise units: x² alpha² / sigma²)")
    _line(above, field.noise_level, field.in_noise_units(field.dsm), "-", "DSM")
    for style, (n, errors) in zip(cycle(STYLES), field.stf.items(), strict=False):
        _line(above, field.noise_level, field.in_noise_units(errors.variance), style, f"STF, {n:,} references")
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    label(below, NOISE_LEVEL, "statistics of the posterior")
    _line(below, field.noise_level, field.single_source, "-", "share of x_t with one likely source")
    _line(
        below,
        field.noise_level,
        field.kl.scaled(1 / math.log(field.num_data_points)),
        "--",
        "KL from the prior / log N",
    )
    _line(below, field.noise_level, field.ess_share, ":", "effective sample size / N")
    below.set_ylim(0, 1.02)
    below.legend(frameon=False, fontsize=8)
    _mark_phases(field, above, below)
    save_figure(figure, path)


def plot_bias(path: Path, field: Field, title: str) -> None:
    """Plot squared errors of targets with the source in the support and without, relative to the DSM target's.

    Args:
        path: the image file to write.
        field: the measured field.
        title: title of the plot.
    """
    figure, (axes,) = _panels(1, (7, 4.2), [1])
    axes.set_title(title, loc="left", fontsize=11)
    label(axes, NOISE_LEVEL, "mean squared error / V_DSM")
    known = field.dsm.value > 1e-9 * field.dsm.value.max()
    for style, (n, errors) in zip(cycle(("-", *STYLES)), field.stf.items(), strict=False):
        for estimate, shade, name in (
            (errors.variance, "black", "with"),
            (errors.error_without_source, "0.6", "without"),
        ):
            share = (estimate.value / field.dsm.value)[known]
            axes.plot(
                field.noise_level[known],
                share,
                linestyle=style,
                color=shade,
                linewidth=1.5,
                label=f"n = {n:,} {name} the source",
            )
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_proposal(path: Path, field: Field, linear: LinearDenoiser, proposal: NoiseProposal, title: str) -> None:
    """Plot the learnable share and the variance of targets by noise level, and the proposed training noise.

    Args:
        path: the image file to write.
        field: the measured field.
        linear: the linear denoiser of the data.
        proposal: the proposed noise.
        title: title of the plot.
    """
    figure, (above, below) = _panels(2, (7, 6.4), [3, 2])
    above.set_title(title, loc="left", fontsize=11)
    ends = math.log10(proposal.sigma_min), math.log10(2 * proposal.sigma_max)
    noise_level = torch.logspace(*ends, 300, dtype=torch.float64)
    label(above, "", "share of the loss of a network with output 0")
    learnable = "learnable by a linear denoiser (lower bound)"
    above.plot(noise_level, linear.learnable_share(noise_level), color="black", linewidth=1.6, label=learnable)
    lines = [("variance of the DSM target", field.dsm)]
    lines += [(f"variance with {n:,} references", errors.variance) for n, errors in field.stf.items()]
    for style, (name, estimate) in zip(STYLES, lines, strict=False):
        share = linear.share_of_initial_loss(estimate.value, field.noise_level)
        above.plot(field.noise_level, share, color="black", linestyle=style, linewidth=1.6, label=name)
    above.set_ylim(0, 1.02)
    above.legend(frameon=False, fontsize=8, loc="upper left")
    label(below, NOISE_LEVEL, "proposed training noise\n(density over log sigma)")
    density = torch.exp(-0.5 * ((noise_level.log() - proposal.mean) / proposal.std) ** 2) / (
        proposal.std * math.sqrt(2 * math.pi)
    )
    below.fill_between(noise_level, density, color="0.8", linewidth=0)
    for place, name in ((proposal.sigma_min, "sigma_min"), (proposal.sigma_max, "sigma_max")):
        below.axvline(place, color="black", linewidth=0.8)
        below.annotate(
            name,
            (place, 1),
            (3, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8,
            rotation=90,
        )
    below.set_ylim(bottom=0)
    above.set_xscale("log")
    save_figure(figure, path)


def plot_study(path: Path, study: GaussianStudy, errors: Iterable[tuple[int, Float[Tensor, "r"]]], title: str) -> None:
    """Plot estimates and closed forms for two Gaussians: V_DSM and V_STF, the law 1 / (n - 1), and normal errors.

    Args:
        path: the image file to write.
        study: the study of two Gaussians.
        errors: size of the support and standardized errors, as from `normal_errors`, for each quantile plot.
        title: title of the plot.
    """
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    variance, law, normal = figure.subplots(1, 3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    label(variance, "noise level sigma", "V / sigma² (noise units, summed)")
    scale = 1 / study.sigma.square()
    variance.plot(study.sigma, study.dsm_closed * scale, color="0.6", linewidth=3, label="DSM, closed form")
    bars = {"yerr": 2 * study.dsm.error * scale, "fmt": "o", "ms": 4, "color": "black", "label": "DSM, estimated"}
    variance.errorbar(study.sigma, study.dsm.value * scale, **bars)
    for style, (n, estimate) in zip(cycle(STYLES), study.stf.items(), strict=False):
        _line(variance, study.sigma, estimate.scaled(scale), style, f"STF, n = {n:,}")
    variance.set_yscale("log")
    variance.set_ylim(bottom=float(min((estimate.value * scale).min() for estimate in study.stf.values())) / 200)
    variance.legend(frameon=False, fontsize=8, loc="lower left")
    label(law, "size n of the support", "(n − 1) V_STF / its limit")
    sizes = [n for n in study.stf if n > 1]
    for line, at in zip(("-", *STYLES), _few(study.sigma), strict=False):
        ratio = [(n - 1) * float(study.stf[n].value[at] / study.limit.value[at]) for n in sizes]
        name = f"sigma = {float(study.sigma[at]):.2g}"
        law.plot(sizes, ratio, linestyle=line, marker="o", ms=3, color="black", linewidth=1.2, label=name)
    law.axhline(1, color="0.7", linewidth=0.8)
    law.set_xscale("log")
    law.set_ylim(0, 1.4)
    law.legend(frameon=False, fontsize=8)
    label(normal, "quantile of N(0, 1)", "quantile of the standardized error")
    for style, (n, values) in zip(("-", *STYLES), errors, strict=False):
        u = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
        normal.plot(
            torch.special.ndtri(u),
            values.sort().values,
            linestyle=style,
            color="black",
            linewidth=1.2,
            label=f"n = {n:,}",
        )
    normal.plot([-3, 3], [-3, 3], color="0.7", linewidth=0.8)
    normal.set_xlim(-3.2, 3.2)
    normal.set_ylim(-4, 4)
    normal.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _panels(count: int, size: tuple[float, float], heights: list[float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    return figure, list(axes[:, 0])


def _line(axes: Axes, noise_level: Float[Tensor, "L"], estimate: Estimate, style: object, name: str) -> None:
    """A line with a band of two standard errors."""
    axes.plot(noise_level, estimate.value, linestyle=style, color="black", linewidth=1.6, label=name)
    low, high = (estimate.value + sign * 2 * estimate.error for sign in (-1, 1))
    axes.fill_between(noise_level, low, high, color="0.85", linewidth=0)
    axes.set_xscale("log")


def _mark_phases(field: Field, *panels: Axes) -> None:
    """Thin lines between the phases of the posterior, with their names on top."""
    one, prior = phases_of(field)
    for axes in panels:
        for place in (one, prior):
            if place is not None:
                axes.axvline(place, color="0.6", linewidth=0.8)
    low, high = float(field.noise_level.min()), float(field.noise_level.max())
    ends = (low, one or low, prior or high, high)
    for name, left, right in zip(("one source", "several compete", "posterior = prior"), ends, ends[1:], strict=False):
        if right > left:
            panels[0].annotate(
                name,
                (math.sqrt(left * right), 1.0),
                (0, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
                color="0.35",
            )


def _few(sigma: Float[Tensor, "L"], count: int = 4) -> list[int]:
    """Indices of some noise levels, spread evenly without the ends."""
    return torch.linspace(1, len(sigma) - 2, count).long().unique().tolist() if len(sigma) > 2 else [0]
