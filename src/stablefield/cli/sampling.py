"""The work of `stablefield sample`: the guide, and messages of progress."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from stablefield.cli.progress import progress_bar
from stablefield.config import Allowed, ConfigError
from stablefield.data import Progress, silent
from stablefield.distributed import Ranks
from stablefield.generate import SampleStore
from stablefield.run import TrainedRun, open_run

__all__ = ["main_bar", "open_guide", "sample_progress"]


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


def open_guide(
    guide: Path | None, guidance: float | None, device: str, allow: Iterable[Allowed] = ()
) -> TrainedRun | None:
    """The weaker run to guide away from, or None if none is given.

    Args:
        guide: its folder or checkpoint.
        guidance: guidance scale.
        device: device to load it on.
        allow: classes outside this package that its network may be.

    Raises:
        ConfigError: a run is given without a guidance scale.
    """
    if guide is None:
        return None
    if guidance is None:
        raise ConfigError("--guide requires --guidance, for example --guidance 1.5")
    return open_run(guide, device=device, allow=allow)
