"""Pictures of a field: what varies where, the three phases of the posterior, and estimates beside closed forms."""

import math
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from stablefield.evaluate.field.advice import phases_of
from stablefield.evaluate.field.estimate import Estimate
from stablefield.evaluate.field.gaussians import Study
from stablefield.evaluate.field.linear import Linear
from stablefield.evaluate.field.proposal import Proposal
from stablefield.evaluate.field.record import Field
from stablefield.evaluate.plots import label

STYLES = ("--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (6, 3)))
LEVEL = "noise level sigma / alpha (units of the data)"


def plot_field(path: Path, field: Field, title: str) -> None:
    """The variance of targets in noise units, and what becomes of the posterior, in the paper's three phases."""
    figure, (above, below) = _panels(2, (7, 6.4), [3, 2])
    above.set_title(title, loc="left", fontsize=11)
    label(above, "", "variance of the target per dimension\n(noise units: x² alpha² / sigma²)")
    _line(above, field.level, field.in_noise(field.dsm), "-", "single sample (DSM)")
    for style, (n, stable) in zip(cycle(STYLES), field.stable.items(), strict=False):
        _line(above, field.level, field.in_noise(stable.variance), style, f"{n:,} references (STF)")
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    label(below, LEVEL, "the posterior")
    _line(below, field.level, field.one_point, "-", "rows with one likely member")
    _line(below, field.level, field.kl.times(1 / math.log(field.members)), "--", "KL from the prior / log N")
    _line(below, field.level, field.ess_share, ":", "effective members / N")
    below.set_ylim(0, 1.02)
    below.legend(frameon=False, fontsize=8)
    _mark_phases(field, above, below)
    figure.savefig(path)


def plot_bias(path: Path, field: Field, title: str) -> None:
    """Squared error of targets with their source in the support and without, as shares of a single sample's."""
    figure, (axes,) = _panels(1, (7, 4.2), [1])
    axes.set_title(title, loc="left", fontsize=11)
    label(axes, LEVEL, "mean squared error / that of a single sample")
    known = field.dsm.value > 1e-9 * field.dsm.value.max()
    for style, (n, stable) in zip(cycle(("-", *STYLES)), field.stable.items(), strict=False):
        for found, shade, name in ((stable.variance, "black", "with"), (stable.without, "0.6", "without")):
            share = (found.value / field.dsm.value)[known]
            axes.plot(
                field.level[known], share, linestyle=style, color=shade, linewidth=1.5, label=f"{n:,} {name} the source"
            )
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def plot_proposal(path: Path, field: Field, linear: Linear, proposal: Proposal, title: str) -> None:
    """What is learnable at which noise, what varies in a target there, and where training noise is proposed."""
    figure, (above, below) = _panels(2, (7, 6.4), [3, 2])
    above.set_title(title, loc="left", fontsize=11)
    ends = math.log10(proposal.sigma_min), math.log10(2 * proposal.sigma_max)
    level = torch.logspace(*ends, 300, dtype=torch.float64)
    label(above, "", "share of the loss of an untrained network")
    above.plot(
        level, linear.learnable(level), color="black", linewidth=1.6, label="learnable by a linear denoiser (at least)"
    )
    lines = [("varies in a target from a single sample", field.dsm)]
    lines += [(f"varies with {n:,} references", stable.variance) for n, stable in field.stable.items()]
    for style, (name, found) in zip(STYLES, lines, strict=False):
        share = linear.share_of_loss(found.value, field.level)
        above.plot(field.level, share, color="black", linestyle=style, linewidth=1.6, label=name)
    above.set_ylim(0, 1.02)
    above.legend(frameon=False, fontsize=8, loc="upper left")
    label(below, LEVEL, "training noise proposed\n(density over log sigma)")
    density = torch.exp(-0.5 * ((level.log() - proposal.mean) / proposal.std) ** 2) / (
        proposal.std * math.sqrt(2 * math.pi)
    )
    below.fill_between(level, density, color="0.8", linewidth=0)
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
    figure.savefig(path)


def plot_study(path: Path, study: Study, errors: Iterable[tuple[int, Float[Tensor, "r"]]], title: str) -> None:
    """Closed forms beside estimates: V_DSM and V_STF, the law 1 / (n - 1), and how normal the errors are."""
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    variance, law, normal = figure.subplots(1, 3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    label(variance, "noise level sigma", "V / sigma² (noise units, summed)")
    scale = 1 / study.sigma.square()
    variance.plot(study.sigma, study.dsm_closed * scale, color="0.6", linewidth=3, label="DSM, closed form")
    bars = {"yerr": 2 * study.dsm.error * scale, "fmt": "o", "ms": 4, "color": "black", "label": "DSM, estimated"}
    variance.errorbar(study.sigma, study.dsm.value * scale, **bars)
    for style, (n, found) in zip(cycle(STYLES), study.stable.items(), strict=False):
        _line(variance, study.sigma, found.times(scale), style, f"STF, n = {n:,}")
    variance.set_yscale("log")
    variance.set_ylim(bottom=float(min((found.value * scale).min() for found in study.stable.values())) / 200)
    variance.legend(frameon=False, fontsize=8, loc="lower left")
    label(law, "members of the support n", "(n − 1) V_STF / its limit")
    sizes = [n for n in study.stable if n > 1]
    for line, at in zip(("-", *STYLES), _few(study.sigma), strict=False):
        ratio = [(n - 1) * float(study.stable[n].value[at] / study.limit.value[at]) for n in sizes]
        name = f"sigma = {float(study.sigma[at]):.2g}"
        law.plot(sizes, ratio, linestyle=line, marker="o", ms=3, color="black", linewidth=1.2, label=name)
    law.axhline(1, color="0.7", linewidth=0.8)
    law.set_xscale("log")
    law.set_ylim(0, 1.4)
    law.legend(frameon=False, fontsize=8)
    label(normal, "quantile of N(0, 1)", "quantile of the error / its asymptotic deviation")
    for drawn, (n, each) in zip(("-", *STYLES), errors, strict=False):
        u = (torch.arange(len(each), dtype=torch.float64) + 0.5) / len(each)
        normal.plot(
            torch.special.ndtri(u),
            each.sort().values,
            linestyle=drawn,
            color="black",
            linewidth=1.2,
            label=f"n = {n:,}",
        )
    normal.plot([-3, 3], [-3, 3], color="0.7", linewidth=0.8)
    normal.set_xlim(-3.2, 3.2)
    normal.set_ylim(-4, 4)
    normal.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _panels(count: int, size: tuple[float, float], heights: list[float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    return figure, list(axes[:, 0])


def _line(axes: Axes, level: Float[Tensor, "L"], found: Estimate, style: object, name: str) -> None:
    """A line with a band of two standard errors."""
    axes.plot(level, found.value, linestyle=style, color="black", linewidth=1.6, label=name)
    axes.fill_between(level, found.value - 2 * found.error, found.value + 2 * found.error, color="0.85", linewidth=0)
    axes.set_xscale("log")


def _mark_phases(field: Field, *panels: Axes) -> None:
    """Thin lines between the phases, and their names on top."""
    one, prior = phases_of(field)
    for axes in panels:
        for place in (one, prior):
            if place is not None:
                axes.axvline(place, color="0.6", linewidth=0.8)
    low, high = float(field.level.min()), float(field.level.max())
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
    """Levels spread over all of them but the ends."""
    return torch.linspace(1, len(sigma) - 2, count).long().unique().tolist() if len(sigma) > 2 else [0]
