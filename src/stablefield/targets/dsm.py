"""Denoising score matching: the target of an example is its own source."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import Posterior
from stablefield.process import NoisyBatch
from stablefield.targets.base import TargetEstimator, keep_source


@dataclass(frozen=True)
class DSMTarget(TargetEstimator):
    """Denoising score matching (Vincent 2011): the source alone is the support.

    Unbiased; its variance at x_t is Tr Cov[x | x_t], the largest of all estimators here.
    """

    @override
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        return keep_source(noisy)

    @override
    def keeps_source(self, noisy: NoisyBatch) -> Bool[Tensor, "B"]:
        return torch.ones(len(noisy), dtype=torch.bool)
