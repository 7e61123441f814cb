"""The identity of a run's data: a hash, which is compared whenever they are loaded again."""

import torch

from stablefield.config import ConfigError
from stablefield.data import Progress, content_hash, silent
from stablefield.pool import Pool
from stablefield.run.trained import TrainedRun


def fingerprint(pool: Pool, max_bytes: int = 2**28) -> str:
    """Hash that identifies the data of a run; for large data, the hash of an evenly spaced part and the total number.

    Args:
        pool: all data of the source.
        max_bytes: size of the data beyond which only a part is hashed.
    """
    stride = -(-len(pool) * pool.data[0].nbytes // max_bytes)
    if stride <= 1:
        return content_hash(pool)
    return f"{content_hash(pool.subset(torch.arange(0, len(pool), stride)))} of {len(pool)}"


def refuse_other_data(data: Pool, found: str, known: str, way_out: str) -> None:
    """Refuse data that are not those a run was trained on.

    Args:
        data: the data that were loaded.
        found: their hash (see `fingerprint`).
        known: the hash in the run; "" if it has none.
        way_out: what the user can do, the end of the message.

    Raises:
        ConfigError: the hashes differ, or the run has none.
    """
    if not known:
        raise ConfigError(f"the checkpoint does not record which data the run was trained on; {way_out}")
    if found != known:
        raise ConfigError(
            f"these are not the data that the run was trained on: {data!r} has the hash {_shorten(found)}, and the "
            f"run's data {_shorten(known)}; {way_out}"
        )


def _shorten(found: str) -> str:
    """The first digits of a fingerprint."""
    digest, of, count = found.partition(" of ")
    return f"{digest[:16]}{of}{count}"


def training_data(trained: TrainedRun, progress: Progress = silent, *, way_out: str) -> Pool:
    """Load all data of a run again, those that were held out included.

    Args:
        trained: the run, as `open_run` returns it.
        progress: called with (done, total) while data are decoded.
        way_out: what the user can do if the data have changed, the end of the message.

    Raises:
        ConfigError: the data are no longer those of the run, or the run does not record which they were.
    """
    data: Pool = trained.config.make("data").load(progress)
    refuse_other_data(data, fingerprint(data), trained.data, way_out)
    return data
