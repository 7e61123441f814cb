"""The Frechet distance between two clouds of features, taken as Gaussians.

    d^2 = ||m1 - m2||^2 + Tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))

With Inception features this is FID (Heusel et al. 2017); with any others it is not, and must not be called so.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.checkpoint import replacing

BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Sums:
    """How many features there were, their mean, and their scatter sum (f - mean)(f - mean)^T, in float64.

    Both are kept around the mean and never as raw second moments, so that nothing cancels where the mean is large
    against the spread (Chan, Golub & LeVeque 1983). Parts merge in any order: batches of one machine, or ranks.
    """

    n: int
    mean: Float[Tensor, "F"]
    scatter: Float[Tensor, "F F"]

    @classmethod
    def of(cls, features: Float[Tensor, "n F"]) -> "Sums":
        """Of at least one feature."""
        return merged(map(cls._of_block, features.split(BLOCK)))

    @classmethod
    def _of_block(cls, features: Float[Tensor, "n F"]) -> "Sums":
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: "Sums") -> "Sums":
        """Of all that were in either."""
        n = self.n + other.n
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * (self.n * other.n / n)
        return Sums(n, self.mean + apart * (other.n / n), self.scatter + other.scatter + between)

    def statistics(self) -> "Statistics":
        """Mean and covariance.

        Raises:
            ValueError: fewer than two features.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 features, not {self.n}")
        return Statistics(self.mean, self.scatter / (self.n - 1), self.n)


def merged(parts: Iterable[Sums]) -> Sums:
    """Of all that were in any."""
    return reduce(Sums.merge, parts)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance (n - 1) of n features, float64; on the disk as `mu` and `sigma`, as is the field's custom.

    Attributes:
        mean: of the features.
        covariance: of the features.
        n: how many there were; None if a file does not say.
        features: the identity of the features; "" if a file does not say.
        data: the hash of the data; "" if a file does not say.
    """

    mean: Float[Tensor, "F"]
    covariance: Float[Tensor, "F F"]
    n: int | None = None
    features: str = ""
    data: str = ""

    @cached_property
    def root(self) -> Float[Tensor, "F r"]:
        """R with R R^T = covariance, without the directions in which it is zero to rounding."""
        values, vectors = torch.linalg.eigh(self.covariance)
        there = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, there] * values[there].sqrt()

    @classmethod
    def of(cls, features: Float[Tensor, "n F"]) -> "Statistics":
        """Of at least two features.

        Raises:
            ValueError: fewer than two.
        """
        return Sums.of(features).statistics()

    def save(self, path: Path, *, features: str, data: str) -> None:
        """Write them as `.npz`, with what they are of.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        arrays |= {"n": -1 if self.n is None else self.n, "features": features, "data": data}
        with replacing(path) as beside, beside.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Those in a file: `mu` and `sigma` are enough.

        Raises:
            ValueError: there are none, or they are no mean and covariance.
        """
        with np.load(path, allow_pickle=False) as file:
            if missing := {"mu", "sigma"} - set(file):
                raise ValueError(f"{path} holds no statistics: {', '.join(sorted(missing))} is missing")
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
            features, data = (str(file[name]) if name in file else "" for name in ("features", "data"))
            n = int(file["n"]) if "n" in file else -1
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not covariance.isfinite().all():
            raise ValueError(f"{path}: mu {tuple(mean.shape)}, sigma {tuple(covariance.shape)} are no mean, covariance")
        return cls(mean, covariance, None if n < 0 else n, features, data)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """d^2 between two clouds, in units of the features squared (what is reported as FID is this square).

    With C = R R^T, the trace of the square root is the sum of the singular values of R1^T R2: no square root is taken
    of a number that is zero but for rounding, which is what spoils it where covariances are singular, as they are
    with fewer samples than features.

    Raises:
        ValueError: the clouds differ in their number of features.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"clouds of {len(first.mean)} and of {len(second.mean)} features cannot be compared")
    mixed = torch.linalg.svdvals(first.root.T @ second.root).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * mixed
    return max(0.0, float(distance))  # of equal clouds it is zero to rounding, on either side
