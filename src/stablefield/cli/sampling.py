"""The work of `stablefield sample`: opening a run to sample it, and messages of progress."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from stablefield.cli.progress import progress_bar
from stablefield.config import ConfigError, allowed_names
from stablefield.data import Progress, silent
from stablefield.distributed import Ranks
from stablefield.generate import SampleStore, SamplingPlan
from stablefield.run import open_run


def sample_progress(store: SampleStore, seeds: Sequence[int]) -> str:
    """Number of samples that exist, as text for the user.

    Args:
        store: the store.
        seeds: seeds of the samples that are wanted.
    """
    return f"{len(seeds) - len(store.missing(seeds)):,} of {len(seeds):,} samples are in {store.folder}"


def main_bar(title: str, ranks: Ranks) -> AbstractContextManager[Progress]:
    """A progress bar on the main rank, and none on the others.

    Args:
        title: text beside the bar.
        ranks: the ranks.
    """
    return progress_bar(title) if ranks.is_main else nullcontext(silent)


def open_plan(
    run: str | Path,
    *,
    weights: str | None = None,
    device: str,
    guide: Path | None,
    guidance: float | None,
    sampler: str | None,
    settings: Sequence[str],
    allow: Sequence[str] | None,
    **options: Any,
) -> SamplingPlan:
    """Open a run, and the weaker run to guide away from, and plan its samples.

    Args:
        run: the run's folder, or a checkpoint file.
        weights: name of the weights to use; None for the first average, or those of an export.
        device: device to load both runs on.
        guide: folder or checkpoint of the weaker run; None if there is none.
        guidance: guidance scale; None for no guidance.
        sampler: kind of the sampler; None for the run's own.
        settings: settings "SECTION.KEY=VALUE" of the sections sampler and grid.
        allow: classes outside this package that the runs may name; those of `sampler` and `settings` are allowed, too.
        **options: other arguments of `SamplingPlan.for_run`.

    Raises:
        ConfigError: a guide is given without a guidance scale, or a class is not allowed.
    """
    allowed = allowed_names([*settings, *([f"sampler.kind={sampler}"] if sampler else [])], allow)
    trained = open_run(run, weights=weights, device=device, allow=allowed)
    if guide and guidance is None:
        raise ConfigError("--guide requires --guidance, for example --guidance 1.5")
    weaker = open_run(guide, device=device, allow=allowed) if guide else None
    return SamplingPlan.for_run(trained, sampler=sampler, guidance=guidance, guide=weaker, settings=settings, **options)
