"""Frechet distance between two sets of features, each approximated by a Gaussian.

    d^2 = ||m1 - m2||^2 + Tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))

With Inception features this is FID (Heusel et al. 2017); with any other features it must not be called FID.
"""

import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.data.arrays import read_archive
from stablefield.files import atomic_path
from stablefield.kernel.accumulator import float64_device
from stablefield.kernel.matmul import has_little_float64

BLOCK = 2048  # features added to the running statistics at a time
_ROWS = 16384  # features that are multiplied at once
_PART = 256  # features that are centred at a time, so that they stay in the cache

# Tolerance for asymmetry and negative eigenvalues of a covariance, relative to its largest eigenvalue. Rounding in
# float64 leaves 1e-12 or less. Published files were also stored as float32 (6e-8 of each entry) or computed in float32
# from raw second moments (up to 3e-5 where the mean is as large as the standard deviation, as Inception's is).
_TOLERANCE = 1e-4
_PRECISION = 1e-8  # relative rounding of a distance beyond which it is computed from singular values


@dataclass(frozen=True, eq=False)
class StatisticsAccumulator:
    """Running statistics of features, in float64, which can be merged across batches and ranks in any order.

    The scatter matrix is relative to the mean, so that nothing cancels where the mean is much larger than the standard
    deviation, as it would in raw second moments (Chan, Golub & LeVeque 1983).

    Attributes:
        n: number of feature vectors.
        mean: their mean, (F,).
        scatter: sum of (f - mean)(f - mean)^T, (F, F).
    """

    n: int
    mean: Float[Tensor, "F"]
    scatter: Float[Tensor, "F F"]

    @classmethod
    def from_features(cls, features: Float[Tensor, "n F"]) -> "StatisticsAccumulator":
        """Running statistics of some features.

        The memory beyond the features is a float64 copy of at most 16,384 of them, and two F x F matrices.

        Args:
            features: at least one feature vector, (n, F).
        """
        device = float64_device(features.device)
        x = features.to("cpu" if has_little_float64(device) else device)
        centre = x.mean(0).double()
        total, size = torch.zeros_like(centre), len(centre)
        memory, product, scatter = (_empty(rows, size, x.device) for rows in (min(_ROWS, len(x)), size, size))
        scatter.zero_()
        for block in x.split(_ROWS):
            centred = memory[: len(block)]
            for part, values in zip(block.split(_PART), centred.split(_PART), strict=True):
                values.copy_(part).sub_(centre)
            total += centred.sum(0)
            if x.is_cpu:  # numpy computes half of the product of a matrix with its own transpose, and mirrors it
                np.matmul(centred.T.numpy(), centred.numpy(), out=product.numpy())
            else:
                torch.mm(centred.T, centred, out=product)
            scatter += product
        shift = total / len(x) ** 0.5
        scatter.addr_(shift, shift, alpha=-1)
        mean = centre + total / len(x)
        return cls(len(x), mean.to(device), scatter.to(device))

    def to(self, device: torch.device) -> "StatisticsAccumulator":
        """The same statistics on another device.

        Args:
            device: where they go.
        """
        return StatisticsAccumulator(self.n, self.mean.to(device), self.scatter.to(device))

    def merge(self, other: "StatisticsAccumulator") -> "StatisticsAccumulator":
        """Running statistics of the union.

        Args:
            other: running statistics of other features.
        """
        n = self.n + other.n
        difference = other.mean - self.mean
        between = torch.outer(difference, difference) * (self.n * other.n / n)
        return StatisticsAccumulator(n, self.mean + difference * (other.n / n), self.scatter + other.scatter + between)

    def statistics(self) -> "Statistics":
        """Mean and covariance, on the CPU.

        Raises:
            ValueError: there are fewer than two feature vectors.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 features, not {self.n}")
        return Statistics(self.mean.cpu(), (self.scatter / (self.n - 1)).cpu(), self.n)


def _empty(rows: int, columns: int, device: torch.device) -> Float[Tensor, "rows columns"]:
    """A float64 matrix to be filled. On a CPU numpy allocates it, in large pages, which are much faster to fill."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty((rows, columns)))
    return torch.empty(rows, columns, dtype=torch.float64, device=device)


def merge_all(parts: Iterable[StatisticsAccumulator]) -> StatisticsAccumulator:
    """Running statistics of the union of all parts.

    Args:
        parts: at least one accumulator.
    """
    return reduce(StatisticsAccumulator.merge, parts)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of features, in float64; stored in files as `mu` and `sigma`, as is usual for FID.

    Attributes:
        mean: mean of the features, (F,).
        covariance: their covariance with denominator n - 1, (F, F).
        n: number of feature vectors; None if unknown.
        features: identity of the features (`Features.identity`); "" if unknown.
        data: hash of the data (`content_hash`); "" if unknown.

    Raises:
        ValueError: the shapes do not match; values are not real or not finite; the covariance is not symmetric or not
            positive semi-definite (up to rounding); or n is below 2.
    """

    mean: Float[Tensor, "F"]
    covariance: Float[Tensor, "F F"]
    n: int | None = None
    features: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        _check_shapes(self.mean, self.covariance)
        _check_values(self.mean, self.covariance)
        if self.n is not None and self.n < 2:
            raise ValueError(f"n: a covariance needs at least 2 features, not {self.n}")

    @cached_property
    def root(self) -> Float[Tensor, "F r"]:
        """R with R R^T = covariance, without the directions in which the covariance is zero up to rounding."""
        values, vectors = torch.linalg.eigh((self.covariance + self.covariance.T) / 2)
        nonzero = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, nonzero] * values[nonzero].sqrt()

    @classmethod
    def from_features(cls, features: Float[Tensor, "n F"]) -> "Statistics":
        """Mean and covariance of some features.

        Args:
            features: at least two feature vectors, (n, F).

        Raises:
            ValueError: there are fewer than two, or some are not finite.
        """
        return StatisticsAccumulator.from_features(features).statistics()

    def save(self, path: Path) -> None:
        """Write the statistics to an `.npz` file.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be written, for example because the disk is full.
        """
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        arrays |= {"n": -1 if self.n is None else self.n, "features": self.features, "data": self.data}
        with atomic_path(path) as beside, beside.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Statistics from an `.npz` file.

        Args:
            path: the file. It must hold `mu` and `sigma`; `n`, `features` and `data` are optional.

        Raises:
            ValueError: there is no such file, or it does not hold a mean and a covariance.
        """
        try:
            arrays = _arrays(path)
            n = _count(arrays.get("n", np.array(-1)))
            mean, covariance = (_real(name, arrays[name]) for name in ("mu", "sigma"))
            _check_shapes(mean, covariance)
            features, data = (str(arrays.get(name, "")) for name in ("features", "data"))
            return cls(mean, covariance, n, features, data)
        except ValueError as error:
            raise ValueError(f"{path} holds no usable statistics: {error}") from None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a file of statistics, by name."""
    if not path.is_file():
        raise ValueError("there is no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not an .npz archive, or was cut short")
    names = ("mu", "sigma", "n", "features", "data")
    found = read_archive(path, names)
    if missing := {"mu", "sigma"} - found.keys():
        raise ValueError(f"{', '.join(sorted(missing))} is missing")
    return {name: found[name] for name in names if name in found}


def _real(name: str, array: np.ndarray) -> Tensor:
    """An array of real numbers as float64."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold real numbers, not {array.dtype}")
    with warnings.catch_warnings(action="ignore"):  # an overflow is reported later, as not finite
        return torch.from_numpy(array.astype(np.float64))


def _count(n: np.ndarray) -> int | None:
    """Number of feature vectors as stored in a file, where -1 means unknown."""
    if n.size != 1 or n.dtype.kind not in "fiu" or not np.isfinite(n).all() or n.item() != int(n.item()):
        raise ValueError(f"n must be a whole number, not {n}")
    count = int(n.item())
    if count < 2 and count != -1:
        raise ValueError(f"n must be at least 2 (or -1 if it is unknown), not {count}")
    return None if count == -1 else count


def _check_shapes(mean: Tensor, covariance: Tensor) -> None:
    """Refuse shapes that a mean and a covariance cannot have."""
    if mean.ndim != 1 or len(mean) == 0 or covariance.shape != 2 * mean.shape:
        shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
        raise ValueError(f"{shapes} are not a mean and a covariance, whose shapes are (F,) and (F, F)")


def _check_values(mean: Float[Tensor, "F"], covariance: Float[Tensor, "F F"]) -> None:
    """Refuse values that are not finite or not real, and matrices that are not a covariance up to rounding."""
    for name, value in (("mu", mean), ("sigma", covariance)):
        if not value.is_floating_point():
            raise ValueError(f"{name} must hold real floating numbers, not {value.dtype}")
        if bad := int((~value.isfinite()).sum()):
            raise ValueError(f"{name} holds {bad:,} numbers that are not finite")
    peak = float(covariance.abs().max())
    if peak == 0:
        return
    scaled = covariance.double() / peak
    limit = _TOLERANCE * _largest_eigenvalue(scaled)
    if (asymmetry := float((scaled - scaled.T).abs_().max())) > limit:
        raise ValueError(
            f"sigma is not symmetric: entries differ from those across the diagonal by up to {asymmetry * peak:.3g}"
        )
    # a Cholesky decomposition exists if no eigenvalue is below -limit, and costs far less than the eigenvalues
    scaled = (scaled + scaled.T).div_(2)
    scaled.diagonal().add_(limit)
    if int(torch.linalg.cholesky_ex(scaled).info):
        raise ValueError(f"sigma is not positive semi-definite: an eigenvalue is below -{limit * peak:.3g}")


def _largest_eigenvalue(matrix: Float[Tensor, "F F"], steps: int = 10) -> float:
    """Lower bound of the largest absolute eigenvalue of a symmetric matrix, by power iteration."""
    largest, vector = 0.0, matrix[:, int(matrix.abs().argmax()) % len(matrix)]
    for _ in range(steps):
        vector = matrix @ (vector / vector.norm())
        largest = max(largest, float(vector.norm()))
    return largest


def _trace_of_root(first: Statistics, second: Statistics) -> tuple[float, float]:
    """Trace of the square root by a Cholesky factor, Tr (L^T C2 L)^(1/2) with C1 = L L^T, and a bound of its rounding.

    This takes a fraction of the time of singular values, and loses precision where eigenvalues are nearly zero.
    """
    if any(each.n is not None and each.n <= len(each.mean) for each in (first, second)):
        return nan, inf
    one, two = ((each.covariance + each.covariance.T) / 2 for each in (first, second))
    factor, info = torch.linalg.cholesky_ex(one)
    if int(info):
        return nan, inf
    values = torch.linalg.eigvalsh(factor.T @ two @ factor)
    rounding = 32 * torch.finfo(values.dtype).eps * float(values[-1])
    roots = values.clamp(min=0).sqrt()
    errors = torch.minimum(rounding / roots, torch.full_like(roots, max(rounding, 0.0) ** 0.5))
    return float(roots.sum()), float(errors.sum())


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Frechet distance d^2, in squared units of the features (FID is this square).

    With C = R R^T, the trace of the square root is the sum of the singular values of R1^T R2. This avoids square roots
    of eigenvalues that are zero up to rounding, which make the usual formula inaccurate where covariances are singular,
    as with fewer samples than features. Where all eigenvalues are large enough, a Cholesky factor gives the same.

    Args:
        first: statistics of one set of features.
        second: statistics of the other.

    Raises:
        ValueError: the numbers of features differ, or the distance is too large for float64.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"statistics of {len(first.mean)} and of {len(second.mean)} features cannot be compared")
    traces = first.covariance.trace() + second.covariance.trace()
    without_root = float((first.mean - second.mean).square().sum() + traces)
    trace_of_root, error = _trace_of_root(first, second)
    if not 2 * error <= _PRECISION * (without_root - 2 * trace_of_root):
        trace_of_root = float(torch.linalg.svdvals(first.root.T @ second.root).sum())
    distance = without_root - 2 * trace_of_root
    if not isfinite(distance):
        raise ValueError(f"the Frechet distance of these statistics is not finite, but {distance}")
    return max(0.0, distance)  # equal statistics may give a negative number by rounding
