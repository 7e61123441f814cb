"""A data set as references: a tensor, a mapped file or a `Pool`, of which some are drawn for each call."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from stablefield.kernel.accumulator import Posterior, chunk_size
from stablefield.kernel.gaussian import Block
from stablefield.pool import NULL_LABEL, Pool, first_of
from stablefield.process import NoisyBatch, move
from stablefield.stable.references import References, hash_of, identity, mean_over, shared_blocks

GROUP = 4  # labels with at least this many examples each, on average, are averaged one after the other


@dataclass(frozen=True, eq=False)
class Drawn(References):
    """Random draws from a data set, one per call and label, or all data.

    A draw r_1 .. r_n serves all examples: r_2 .. r_n, and r_1 for the examples whose source is among those (as in
    `STFTarget`). So every support holds n data points including the source; n = 1 is DSM, n = N the exact target.

    Attributes:
        pool: the data set, which `index` counts.
        size: number of candidates including the source; None for all data, or all of a class.
        transform: applied to the references drawn, (n, *D), such as the augmentation of the loop.
        by_value: True where the examples' index is a hash of their values.
    """

    pool: Pool
    size: int | None
    transform: Callable[[Tensor], Tensor] | None = None
    by_value: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1 (the source alone), not {self.size}")

    @override
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        if noisy.label is None:
            return self._mean(noisy, self._draw(generator))
        label, groups = noisy.label.cpu(), []
        if (is_null := label == NULL_LABEL).any():
            groups.append((is_null.nonzero().flatten(), self._draw(generator)))
        if len(labelled := (~is_null).nonzero().flatten()):
            classes, row = label[labelled].unique(return_inverse=True)
            draws = self._draw_by_class(classes, generator)
            if len(classes) > 1 and len(classes) * GROUP > len(labelled) and not self.by_value:
                groups.append((labelled, draws[row]))
            else:
                groups += [(labelled[row == k], draw[draw >= 0]) for k, draw in enumerate(draws)]
        if len(groups) == 1:
            return self._mean(noisy, groups[0][1])
        found = [self._mean(noisy.select(move(group, noisy.x.device)), draw) for group, draw in groups]
        order = torch.cat([group for group, _ in groups]).argsort()
        return Posterior.concatenate(found).select(move(order, noisy.x.device))

    @override
    def others(self, noisy: NoisyBatch, label: int) -> Float[Tensor, "n *D"] | None:
        return self.take(self.pool.draw(1024, label, torch.Generator().manual_seed(0)), noisy.x.device)

    def take(self, index: Int[Tensor, "n"], device: torch.device) -> Float[Tensor, "n *D"]:
        """Data points as they enter a support.

        Args:
            index: which ones.
            device: where they go.

        Raises:
            ValueError: `transform` returned another number of them.
        """
        rows = self.pool.take(index, device)
        if self.transform is None:
            return rows
        changed = self.transform(rows)
        if not isinstance(changed, Tensor) or len(changed) != len(rows):
            found = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(f"transform must return {len(rows)} references for {len(rows)}, not {found}")
        return changed

    def _draw(self, generator: torch.Generator | None) -> Int[Tensor, "n"]:
        """One draw of data points, on the CPU."""
        return self.pool.indices(NULL_LABEL) if self.size is None else self.pool.draw(self.size, NULL_LABEL, generator)

    def _draw_by_class(self, classes: Int[Tensor, "G"], generator: torch.Generator | None) -> Int[Tensor, "G n"]:
        """One draw of data points for each class, filled up with -1, on the CPU."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return self.pool.draw_by_class(self.size or len(self.pool), classes, seed)

    def _mean(self, noisy: NoisyBatch, drawn: Int[Tensor, "n"] | Int[Tensor, "B n"]) -> Posterior:
        """Posterior over one draw for all examples, or over a draw for each, filled up with -1."""
        own, device = drawn.ndim == 2, noisy.x.device
        index, _ = identity(noisy)
        if self.by_value:
            rows = self.take(drawn, device)
            names = hash_of(rows.to(noisy.x.dtype))
            return mean_over(noisy, shared_blocks(noisy, rows, (index[:, None] != names) & first_of(names)))
        names = move(drawn, device)
        mask = (index[:, None] != names) & (names >= 0)
        spare = ~(index[:, None] != names[..., 1:]).all(1)
        mask[:, 0] &= spare

        def blocks(step: int) -> Iterator[Block]:
            for start in range(0, drawn.shape[-1], step):
                part = drawn[..., start : start + step]
                rows = self.take(part.flatten().clamp(min=0), device)
                yield rows.unflatten(0, part.shape), mask[:, start : start + step]

        return mean_over(noisy, blocks(chunk_size(noisy.x_t, len(noisy) if own else 1)))


@dataclass(frozen=True, eq=False, repr=False)
class TensorPool(Pool):
    """Pool of a floating tensor or a mapped file, whose values are not read before they are drawn."""

    @override
    def __post_init__(self) -> None:
        if self.data.ndim < 2 or len(self.data) == 0:
            raise ValueError(f"references must be (N, *D) with N and D at least 1, not {tuple(self.data.shape)}")
        if self.labels is not None and self.labels.shape != (len(self.data),):
            raise ValueError(
                f"labels must have the shape {(len(self.data),)}, one per reference, not {tuple(self.labels.shape)}"
            )
        if self.labels is not None and int(self.labels.min()) < 0:
            raise ValueError(f"labels of references must count from 0; the smallest is {int(self.labels.min())}")

    @override
    def take(self, index: Int[Tensor, "n"], device: torch.device | None = None) -> Tensor:
        return move(self.data.index_select(0, move(index, self.data.device)), device or self.data.device)


class WithIndex(Dataset[Any]):
    """A data set whose items bring their index: (item, index), or a dict with one more entry.

    >>> dataset = WithIndex([(0.5, "cat"), (0.7, "dog")])
    >>> dataset[1]
    ((0.7, 'dog'), 1)

    Args:
        dataset: any data set with a length; the references must be in its order.
        key: entry for the index where items are dicts.
    """

    def __init__(self, dataset: Any, key: str = "index") -> None:
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self._with(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Several items at once, as a `DataLoader` asks for them.

        Args:
            indices: which ones.
        """
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        return [self._with(item, index) for item, index in zip(items, indices, strict=True)]

    def _with(self, item: Any, index: int) -> Any:
        return {**item, self.key: index} if isinstance(item, dict) else (item, index)


def as_tensor(array: Any) -> Tensor:
    """An array in memory or mapped from a file as a tensor on the same memory.

    Args:
        array: of any type that numpy can see.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")
        return torch.from_numpy(array)
