"""Wrappers that a run puts around exact targets: several steps at once, and data sharded over several ranks.

A target depends on no weight of the network, so it can be computed before its step. For an estimator that streams the
data and draws nothing, one pass serves the examples of several steps as well as those of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import Posterior
from stablefield.process import NoisyBatch
from stablefield.targets.base import TargetEstimator
from stablefield.targets.exact import ExactTarget
from stablefield.targets.shard import Shard


@dataclass(frozen=True)
class Prefetched(TargetEstimator):
    """Computes the targets of several steps in one call of an estimator.

    Equal to step by step up to rounding, if a target depends neither on the generator nor on the other examples.

    Attributes:
        target: the estimator, such as `ExactTarget` or `Sharded`.
        examples: number of examples of a rank whose targets are computed together.

    Raises:
        ValueError: fewer than one example.
    """

    target: TargetEstimator
    examples: int

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ValueError(f"examples must be at least 1, not {self.examples}")

    @override
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        return self.target(noisy, generator=generator)

    @override
    def check(self, noisy: NoisyBatch) -> None:
        self.target.check(noisy)

    @override
    def keeps_source(self, noisy: NoisyBatch) -> Bool[Tensor, "B"]:
        return self.target.keeps_source(noisy)

    def steps(self, batch_size: int) -> int:
        """Number of training steps whose targets should be computed in one call.

        Args:
            batch_size: number of examples of a rank in each step.
        """
        return max(1, self.examples // batch_size)

    def several(self, batches: Sequence[NoisyBatch], generator: torch.Generator | None = None) -> Sequence[Posterior]:
        """Targets of the batches of several steps.

        Args:
            batches: one for each step; the same fields must be set in all of them.
            generator: as for a call; the targets do not depend on it.
        """
        found = self(NoisyBatch.concatenate(batches), generator=generator)
        ends = accumulate(map(len, batches))
        return [found.select(slice(end - len(noisy), end)) for noisy, end in zip(batches, ends, strict=True)]


@dataclass(frozen=True)
class Sharded(TargetEstimator):
    """Computes exact targets on several ranks, each of which holds a part of the data.

    Each rank computes sums over its own data points for the examples of all ranks, and the sums are merged: equal to
    the estimator of one process up to rounding. All ranks must call together, with equally many examples each.

    Attributes:
        target: the estimator of one process with all data.
        shard: this rank's part of the data, and how tensors of the ranks are gathered.
    """

    target: ExactTarget
    shard: Shard = field(repr=False)

    @override
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        everyone = self._gather(noisy)
        each = len(everyone) // self.shard.total
        own = slice(each * self.shard.rank, each * (self.shard.rank + 1))
        return self._own_part(everyone, generator=generator).select(own)

    @override
    def check(self, noisy: NoisyBatch) -> None:
        self.target.check(noisy)

    @override
    def keeps_source(self, noisy: NoisyBatch) -> Bool[Tensor, "B"]:
        return self.target.keeps_source(noisy)

    @cached_property
    def _own_part(self) -> ExactTarget:
        return self.target.over(self.shard)

    def _gather(self, noisy: NoisyBatch) -> NoisyBatch:
        """The examples of all ranks.

        Raises:
            ValueError: ranks with different numbers of examples, on all ranks.
        """
        counts = self.shard.gather(torch.tensor([len(noisy)], device=noisy.x_t.device)).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"ranks that share sharded data need equally many examples each, not {counts}")
        # back to the device of the input: `index` is used on the CPU
        return noisy.map(lambda values: self.shard.gather(values).to(values.device))
