"""The Frechet distance between two clouds of features, taken as Gaussians.

    d^2 = ||m1 - m2||^2 + Tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))

With Inception features this is FID (Heusel et al. 2017); with any others it is not, and must not be called so.
"""

import warnings
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.checkpoint import replacing

BLOCK = 2048

# How far a covariance may be from symmetric and positive semi-definite, relative to its largest eigenvalue. In float64
# rounding leaves 1e-12 or less. Published files were also stored as float32 (6e-8 of each entry) or computed in it
# from raw second moments (up to 3e-5 where the mean is as large as the spread, as Inception's is).
ROUNDING = 1e-4


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

    Raises:
        ValueError: shapes that do not fit, numbers that are not real or not finite, a covariance that is not symmetric
            or not positive semi-definite (to rounding), or one of fewer than two features.
    """

    mean: Float[Tensor, "F"]
    covariance: Float[Tensor, "F F"]
    n: int | None = None
    features: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        _fitting(self.mean, self.covariance)
        _valid(self.mean, self.covariance)
        if self.n is not None and self.n < 2:
            raise ValueError(f"n: a covariance needs at least 2 features, not {self.n}")

    @cached_property
    def root(self) -> Float[Tensor, "F r"]:
        """R with R R^T = covariance, without the directions in which it is zero to rounding."""
        values, vectors = torch.linalg.eigh((self.covariance + self.covariance.T) / 2)
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
            ValueError: there are none, or they are not a mean and a covariance; it names the file.
        """
        try:
            arrays = _arrays(path)
            n = _count(arrays.get("n", np.array(-1)))
            mean, covariance = (_real(name, arrays[name]) for name in ("mu", "sigma"))
            _fitting(mean, covariance)
            features, data = (str(arrays.get(name, "")) for name in ("features", "data"))
            return cls(mean, covariance, n, features, data)
        except ValueError as error:
            raise ValueError(f"{path} holds no usable statistics: {error}") from None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """What a file of statistics holds, by name."""
    if not path.is_file():
        raise ValueError("there is no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not an .npz archive, or was cut short")
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := {"mu", "sigma"} - set(file):
                raise ValueError(f"{', '.join(sorted(missing))} is missing")
            return {name: file[name] for name in ("mu", "sigma", "n", "features", "data") if name in file}
    except (OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"it cannot be read ({error})") from None


def _real(name: str, array: np.ndarray) -> Tensor:
    """An array as float64, without losing anything of it."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold real numbers, not {array.dtype}")
    with warnings.catch_warnings(action="ignore"):  # an overflow is refused as not finite
        return torch.from_numpy(array.astype(np.float64))


def _count(n: np.ndarray) -> int | None:
    """How many features a file says its statistics are of; -1 stands for an unknown number."""
    if n.size != 1 or n.dtype.kind not in "fiu" or not np.isfinite(n).all() or n.item() != int(n.item()):
        raise ValueError(f"n must be a whole number, not {n}")
    count = int(n.item())
    if count < 2 and count != -1:
        raise ValueError(f"n must be at least 2 (or -1 if it is not known), not {count}")
    return None if count == -1 else count


def _fitting(mean: Tensor, covariance: Tensor) -> None:
    """Raises:
    ValueError: these are not the shapes of a mean and a covariance.
    """
    if mean.ndim != 1 or len(mean) == 0 or covariance.shape != 2 * mean.shape:
        shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
        raise ValueError(f"{shapes} are no mean and covariance of features; they must be (F,) and (F, F)")


def _valid(mean: Float[Tensor, "F"], covariance: Float[Tensor, "F F"]) -> None:
    """Raises:
    ValueError: they are not finite and real, or the covariance not symmetric and positive semi-definite, to rounding.
    """
    for name, value in (("mu", mean), ("sigma", covariance)):
        if not value.is_floating_point():
            raise ValueError(f"{name} must hold real floating numbers, not {value.dtype}")
        if bad := int((~value.isfinite()).sum()):
            raise ValueError(f"{name} holds {bad:,} numbers that are not finite")
    peak = float(covariance.abs().max())
    if peak == 0:
        return
    unit = covariance.double() / peak
    limit = ROUNDING * _largest(unit)
    if (apart := float((unit - unit.T).abs_().max())) > limit:
        raise ValueError(
            f"sigma is not symmetric: entries differ from those across the diagonal by up to {apart * peak:.3g}"
        )
    # Cholesky's factors exist if no eigenvalue is below the limit, and cost far less than the eigenvalues
    unit = (unit + unit.T).div_(2)
    unit.diagonal().add_(limit)
    if int(torch.linalg.cholesky_ex(unit).info):
        raise ValueError(f"sigma is not positive semi-definite: an eigenvalue is below -{limit * peak:.3g}")


def _largest(matrix: Float[Tensor, "F F"], steps: int = 10) -> float:
    """The largest absolute eigenvalue of a symmetric matrix, from below, by power iteration."""
    found, vector = 0.0, matrix[:, int(matrix.abs().argmax()) % len(matrix)]
    for _ in range(steps):
        vector = matrix @ (vector / vector.norm())
        found = max(found, float(vector.norm()))
    return found


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """d^2 between two clouds, in units of the features squared (what is reported as FID is this square).

    With C = R R^T, the trace of the square root is the sum of the singular values of R1^T R2: no square root is taken
    of a number that is zero but for rounding, which is what spoils it where covariances are singular, as they are
    with fewer samples than features.

    Raises:
        ValueError: the clouds differ in their number of features, or lie too far apart for float64.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"clouds of {len(first.mean)} and of {len(second.mean)} features cannot be compared")
    mixed = torch.linalg.svdvals(first.root.T @ second.root).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = float((first.mean - second.mean).square().sum() + traces - 2 * mixed)
    if not isfinite(distance):
        raise ValueError(f"the Frechet distance of these statistics is not finite, but {distance}")
    return max(0.0, distance)  # of equal clouds it is zero to rounding, on either side
