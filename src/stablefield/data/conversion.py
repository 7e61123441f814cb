"""Conversion and inspection of data sets, as `stablefield data convert` and `stablefield data inspect` do them."""

from dataclasses import dataclass
from pathlib import Path

from stablefield.data.contents import DataSummary, Progress, content_hash, range_question, silent
from stablefield.data.decode import SUFFIXES
from stablefield.data.export import write_npz, write_zip
from stablefield.data.notices import say
from stablefield.data.sources import Source
from stablefield.data.store import Store, refuse_existing, write_store
from stablefield.pool import Pool

_OTHER_FORMATS = {".npy", ".h5", ".hdf5", ".tar", ".gz", ".tgz", ".pt", ".pth", ".pkl", ".parquet", ".safetensors"}
_OTHER_FORMATS |= set(SUFFIXES)


@dataclass(frozen=True)
class Converted:
    """A data set that was written in another format.

    Attributes:
        path: the store, ZIP file or archive.
        count: number of data points.
        num_classes: number of classes; 0 for data without labels.
        notes: lines that say what was changed or passed over; they are logged too.
    """

    path: Path
    count: int
    num_classes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Inspection:
    """A data set, and what is known about it.

    Attributes:
        pool: the data.
        summary: their mean, spread and range, and the number of data points of each class.
        classes: names of the classes, as far as they are known.
        hash: hash of the data and labels (see `content_hash`).
        verified: True for a store, whose data and labels were read and compared with its hash.
        question: a line about values that may be on another scale than intended; None if there is nothing to ask.
    """

    pool: Pool
    summary: DataSummary
    classes: tuple[str, ...]
    hash: str
    verified: bool
    question: str | None


def convert(source: Source, dest: Path, *, progress: Progress = silent) -> Converted:
    """Write a data set as a store, a ZIP file or an array archive. Notes about the data are logged.

    Args:
        source: the data.
        dest: a `.zip` file in EDM's layout, an `.npz` file, or the folder of a store.
        progress: called with (data points written, total).

    Raises:
        ValueError: the destination exists or has the suffix of another format, the data are damaged, or they do not
            fit the format.
        OSError: the destination cannot be written; nothing is left behind.
    """
    refuse_existing(dest)
    suffix = dest.suffix.lower()
    if suffix in _OTHER_FORMATS:
        raise ValueError(f"{dest}: data are written to a .zip file, an .npz file or a folder, not to {suffix}")
    contents = source.contents()
    if suffix == ".zip":
        write_zip(dest, contents, progress=progress)
    elif suffix == ".npz":
        write_npz(dest, contents, progress=progress)
    else:
        write_store(dest, contents, source=repr(source), progress=progress)
    for note in contents.notes:
        say(note)
    num_classes = 0 if contents.labels is None else int(contents.labels.max()) + 1
    return Converted(dest, contents.count, num_classes, tuple(contents.notes))


def inspect(source: Source, *, progress: Progress = silent) -> Inspection:
    """Load a data set, read all of it, and summarize it. Nothing is written but the cache of decoded images.

    Args:
        source: the data.
        progress: called with (images decoded, total) while images are decoded.

    Raises:
        ValueError: the data are missing or damaged.
    """
    pool, verified = source.load(progress), isinstance(source, Store)
    summary = DataSummary.from_pool(pool)
    found = source.verify() if isinstance(source, Store) else content_hash(pool)
    return Inspection(pool, summary, source.contents().classes, found, verified, range_question(pool))
