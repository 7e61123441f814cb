"""The work of `stablefield sample`: messages of progress."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from stablefield.cli.progress import progress_bar
from stablefield.data import Progress, silent
from stablefield.distributed import Ranks
from stablefield.generate import SampleStore


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
