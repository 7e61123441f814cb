"""The work of `stablefield data`: describing data and proposing noise levels."""

from pathlib import Path

from stablefield.cli.progress import progress_bar
from stablefield.data import Inspection, printable
from stablefield.objective import EDMWeight
from stablefield.pool import Pool
from stablefield.studies.field import VarianceReport, propose_noise
from stablefield.studies.field.plots import plot_proposal


def describe(found: Inspection) -> list[str]:
    """Lines of text with size, type, range, classes and hash of data.

    Args:
        found: the data.
    """
    pool, summary = found.pool, found.summary
    dtype = str(pool.data.dtype).removeprefix("torch.")
    levels = f", {pool.num_levels} levels" if pool.num_levels != 256 else ""
    moments = f"mean {summary.mean:.4f}, standard deviation {summary.std:.4f}"
    return [
        f"data      {len(pool):,} of shape {pool.shape}, {dtype}{levels}, values={pool.values}",
        f"range     {summary.minimum:.4g} to {summary.maximum:.4g}, {moments}",
        *([f"note      {found.question}"] if found.question else []),
        *_class_lines(summary.class_counts, found.classes),
        f"hash      {found.hash}{' (verified)' if found.verified else ''}",
    ]


def propose(pool: Pool, spread: float, plot: Path | None, examples: int = 16) -> list[str]:
    """Lines of text with proposed noise levels, as settings, and the reasons for them.

    Args:
        pool: the data.
        spread: their standard deviation.
        plot: image file for a plot; None for no plot.
        examples: noisy examples per noise level.
    """
    try:
        with progress_bar("measuring") as progress:
            proposal, study = propose_noise(pool, spread, examples=examples, progress=progress)
    except ValueError as error:
        return [f"noise     no proposal: {error}"]
    report = VarianceReport.from_study(study, proposal.times(), EDMWeight(proposal.sigma_data))
    if plot:
        title = "What a network can learn, and how much targets vary, at each noise level"
        plot_proposal(plot, study, proposal, title)
    settings, examined = proposal.settings(), study.num_data_points
    part = f"all {examined:,} data points"
    if examined < len(pool):
        part = f"{examined:,} evenly spaced data points of {len(pool):,}"
    pairs = zip(settings[::2], settings[1::2], strict=True)
    return [
        f"noise     for process.kind=ve (EDM); {examples} examples at each of {len(study.t)} levels; data: {part}",
        *(f"          --set {first} --set {second}" for first, second in pairs),
        *(f"          {line}" for line in (*proposal.reasons(), *report.summary())),
        *([f"plot      {printable(plot)}"] if plot else []),
    ]


def _class_lines(counts: tuple[int, ...], classes: tuple[str, ...], most: int = 20) -> list[str]:
    """Number of data points of each class, for the first classes."""
    if not counts:
        return ["classes   none"]
    names = [classes[label] if label < len(classes) else str(label) for label in range(len(counts))]
    lines = [f"          {count:>9,}  {name}" for name, count in zip(names[:most], counts[:most], strict=True)]
    more = [f"          and {len(counts) - most:,} more"] if len(counts) > most else []
    return [f"classes   {len(counts)}", *lines, *more]
