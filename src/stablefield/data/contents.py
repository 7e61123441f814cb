"""What a data set holds, before it is anywhere: how many, which labels, and the data block by block when asked.

Everything that writes data (a store, a zip, an archive) eats these blocks, so nothing needs all of them in memory.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64, Shaped

from stablefield.reference import ALL, Pool, Values

if TYPE_CHECKING:
    from hashlib import _Hash

Blocks = Callable[[], Iterator[Shaped[np.ndarray, "n *D"]]]
Progress = Callable[[int, int], None]  # (done, of how many)


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, eq=False)
class Contents:
    """Data that are yet to be read.

    Attributes:
        count: how many members there are, N.
        blocks: yields them in order, as uint8 or float32 of shape (n, *D); may be called again.
        labels: the class of each, (N,), or None.
        classes: names of the classes, in order, as far as they are known.
        levels: how many values a byte takes.
        values: what the data are, as of `Pool`; None: what suits their type.
    """

    count: int
    blocks: Blocks
    labels: Int64[np.ndarray, "N"] | None = None
    classes: tuple[str, ...] = field(default=())
    levels: int = 256
    values: Values | None = None

    @classmethod
    def of(cls, pool: Pool, classes: tuple[str, ...] = ()) -> "Contents":
        """What a pool holds."""
        labels = None if pool.labels is None else pool.labels.cpu().numpy()

        def blocks() -> Iterator[Shaped[np.ndarray, "n *D"]]:
            return (block.cpu().numpy() for block in pool.stored_blocks(ALL, 256))

        return cls(len(pool), blocks, labels, classes, pool.levels, pool.values)


def slices(array: Shaped[np.ndarray, "N *D"], size: int = 256) -> Iterator[Shaped[np.ndarray, "n *D"]]:
    """An array, a block after the other."""
    return (array[start : start + size] for start in range(0, len(array), size))


def content_hash(pool: Pool) -> str:
    """SHA-256 over type, shape, levels, every value and every label: equal for equal data, wherever they came from."""
    contents = Contents.of(pool)
    dtype = np.dtype(str(pool.data.dtype).removeprefix("torch."))
    digest = begin_hash(dtype, (len(pool), *pool.shape), pool.levels)
    for block in contents.blocks():
        digest.update(np.ascontiguousarray(block).data)
    return end_hash(digest, contents.labels)


def begin_hash(dtype: np.dtype, shape: tuple[int, ...], levels: int) -> "_Hash":
    """A hash that knows what the bytes mean, and waits for them in order."""
    return hashlib.sha256(f"{dtype.name} {tuple(shape)} {levels}".encode())


def end_hash(digest: "_Hash", labels: Int64[np.ndarray, "N"] | None) -> str:
    """The hash, once the labels are in it too."""
    digest.update(b"no labels" if labels is None else b"labels" + labels.astype("<i8").tobytes())
    return digest.hexdigest()
