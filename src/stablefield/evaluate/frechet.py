"""The Frechet distance between two clouds of features, taken as Gaussians.

    d^2 = ||m1 - m2||^2 + Tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))

With Inception features this is FID (Heusel et al. 2017); with any others it is not, and must not be called so.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance (n - 1) of n features, float64."""

    mean: Float[Tensor, "F"]
    covariance: Float[Tensor, "F F"]
    n: int

    @classmethod
    def of(cls, features: Float[Tensor, "n F"]) -> "Statistics":
        """Of at least two features.

        Raises:
            ValueError: fewer than two.
        """
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 features, not {len(features)}")
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T).reshape(2 * features.shape[1:]), len(features))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """d^2 between two clouds, in units of the features squared (what is reported as FID is this square).

    The trace of the square root is the sum of the square roots of the eigenvalues of a symmetric matrix, which stays
    exact where the covariances are singular, as they are with fewer samples than features.
    """
    root = _square_root(first.covariance)
    mixed = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return float((first.mean - second.mean).square().sum() + traces - 2 * mixed)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
