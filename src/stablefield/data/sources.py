"""Sources of data: descriptions of a data set that load into a `Pool`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from typing_extensions import override

from stablefield.data.contents import Contents, Progress, silent
from stablefield.files import printable
from stablefield.pool import Pool, Values
from stablefield.seeding import generator


@dataclass(frozen=True)
class Source(ABC):
    """Base class of data sets: where the data are, and how they become a pool.

    Attributes:
        holdout: number of data points that are held out from training (see `split`); `load` returns them too.
        values: "image" or "float", as in `Pool`; by default what the file declares, or else what suits the type.
    """

    # not part of the repr, which identifies the data
    holdout: int = field(default=0, kw_only=True, repr=False)
    values: Values | None = field(default=None, kw_only=True, repr=False)

    @property
    def where(self) -> str:
        """Where the data are, for notes and errors."""
        return printable(getattr(self, "path", type(self).__name__))

    @abstractmethod
    def load(self, progress: Progress = silent) -> Pool:
        """The data, in memory or mapped into it, with their labels.

        Args:
            progress: called with (done, total) while data are decoded.

        Raises:
            ValueError: the data are missing, damaged, or of a type or shape that is not supported.
        """

    def contents(self) -> Contents:
        """The same data in blocks, to be written elsewhere.

        Raises:
            ValueError: as for `load`.
        """
        return Contents.from_pool(self.load())


def split(pool: Pool, holdout: int) -> tuple[Pool, Pool | None]:
    """Training data and held-out data, as views of a pool.

    The random choice depends on nothing but the two numbers, and a larger held-out set contains every smaller one.

    Args:
        pool: all data.
        holdout: number of data points to hold out; 0 for none.

    Returns:
        Both views, each in the order of the pool; the second is None if nothing is held out.

    Raises:
        ValueError: holdout is negative, or no data would be left to train on.
    """
    if not 0 <= holdout < len(pool):
        raise ValueError(
            f"holdout must be at least 0 and less than the {len(pool)} data points there are, not {holdout}"
        )
    if holdout == 0:
        return pool, None
    held_out, trained = torch.randperm(len(pool), generator=generator(0, "holdout")).split(
        [holdout, len(pool) - holdout]
    )
    return pool.subset(trained.sort().values), pool.subset(held_out.sort().values)


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels with 17 grey levels, in ten classes."""

    @override
    def load(self, progress: Progress = silent) -> Pool:
        table = _digits_table()
        images = torch.from_numpy(table[:, :-1].astype(np.uint8)).reshape(-1, 1, 8, 8)
        return Pool(images, torch.from_numpy(table[:, -1].astype(np.int64)), num_levels=17, values=self.values)


def _digits_table() -> np.ndarray:
    """Pixels and class of each digit, read from scikit-learn's file: importing sklearn would take a second."""
    places = spec.submodule_search_locations if (spec := find_spec("sklearn")) else None
    file = Path(places[0], "datasets", "data", "digits.csv.gz") if places else None
    if file and file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


@dataclass(frozen=True)
class UnknownData(Source):
    """Unknown training data of a checkpoint of another project, which can be sampled from but not trained further."""

    @override
    def load(self, progress: Progress = silent) -> Pool:
        raise ValueError(
            "the checkpoint does not say which data it was trained on; set the data, for example "
            "--set data.kind=images --set data.path=PATH"
        )
