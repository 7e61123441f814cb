"""References of a foreign training loop: the minibatch, the examples seen last, or draws from a data set.

Every kind is a target estimator over a support that holds the source once:

    support of an example = (references without its data point) and its own x

So an older version of the same data point (another flip, crop or draw of a latent) is replaced by the current one, and
nothing counts twice. Data points are identified by their index in the data set. The support is then a set that does not
reveal which of its candidates is the source, and its weighted mean is unbiased (Rao-Blackwell; docs/targets.md).

Masks instead of selections keep all shapes independent of the data, so that a GPU is never waited for.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from typing_extensions import override

from stablefield.kernel.accumulator import Posterior, chunk_size
from stablefield.kernel.gaussian import Block, sums_over
from stablefield.pool import NULL_LABEL, first_of
from stablefield.process import NoisyBatch
from stablefield.targets.base import TargetEstimator

EMPTY = -(2**63)  # index of a place in a bank that holds no example yet
Gather = Callable[[Tensor], Tensor]


class References(TargetEstimator):
    """Base class of references that are compared with the examples by index, or by a hash of their values."""

    def others(self, noisy: NoisyBatch, label: int) -> Float[Tensor, "n *D"] | None:
        """Some references with a label from outside the batch, for a comparison with its examples.

        Args:
            noisy: the batch.
            label: a class, or `NULL_LABEL` for all.

        Returns:
            References as they enter a support, or None if there are none.
        """
        return None


class Minibatch(References):
    """The minibatch itself, on request of all ranks, as the references of each of its examples.

    Without an index every example counts as a data point of its own. That is unbiased too, even if a data point occurs
    twice, because the examples of a batch are exchangeable.

    Args:
        gather: concatenates a tensor of all ranks, such as `accelerator.gather`; None keeps to this rank.
    """

    def __init__(self, gather: Gather | None = None) -> None:
        self.gather = gather

    def __repr__(self) -> str:
        return "Minibatch()" if self.gather is None else f"Minibatch({self.gather})"

    @override
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        index, label = identity(noisy)
        x, everyone, labels = _gathered(noisy.x, index, label, self.gather)
        mask = (index[:, None] != everyone) & first_of(everyone) & _same_label(label, labels)
        return mean_over(noisy, shared_blocks(noisy, x, mask))


class Bank(References):
    """The last `size` distinct examples, those of the current batch included.

    The current version of a data point replaces an older one. Unbiased where every epoch is in random order.

    Args:
        size: number of examples held, at least the size of a batch (over all ranks, if they are gathered).
        gather: concatenates a tensor of all ranks, such as `accelerator.gather`; every rank then holds the examples of
            all. None keeps to this rank.

    Attributes:
        data: the examples, (size, *D); None before the first call.
        index: data point of each, (size,).
        label: class of each, (size,); -1 without label.
        age: number of the batch in which each was seen last, (size,).
        step: number of batches so far.

    Raises:
        ValueError: a size below 1, or below that of a batch.
    """

    def __init__(self, size: int, gather: Gather | None = None) -> None:
        if size < 1:
            raise ValueError(f"a bank must hold at least 1 example, not {size}")
        self.size, self.gather, self.step = size, gather, 0
        self.data: Tensor | None = None
        self.index = self.label = self.age = torch.empty(0, dtype=torch.int64)

    def __repr__(self) -> str:
        return f"Bank({self.size})"

    @override
    def __call__(self, noisy: NoisyBatch, *, generator: torch.Generator | None = None) -> Posterior:
        index, label = identity(noisy)
        held = self._push(*_gathered(noisy.x, index, label, self.gather))
        mask = (index[:, None] != self.index) & (self.index != EMPTY) & _same_label(label, self.label)
        return mean_over(noisy, shared_blocks(noisy, held, mask))

    @override
    def others(self, noisy: NoisyBatch, label: int) -> Float[Tensor, "n *D"] | None:
        if self.data is None:
            return None
        self._move_to(noisy.x.device)
        index, _ = identity(noisy)
        wanted = (self.index != EMPTY) & ~torch.isin(self.index, index)
        if label != NULL_LABEL:
            wanted &= self.label == label
        return self.data[wanted] if wanted.any() else None

    def state_dict(self) -> dict[str, Any]:
        """The examples held, for a checkpoint."""
        return {name: getattr(self, name) for name in ("size", "step", "data", "index", "label", "age")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold the examples of a checkpoint again.

        Args:
            state: as returned by `state_dict`.

        Raises:
            ValueError: it is the state of a bank of another size.
        """
        if state["size"] != self.size:
            raise ValueError(f"the state is that of Bank({state['size']}), not of Bank({self.size})")
        for name in ("step", "data", "index", "label", "age"):
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)

    def _push(self, x: Tensor, index: Tensor, label: Tensor) -> Tensor:
        """Put a batch in the place of older versions, and else of the examples that were not seen for longest."""
        if len(x) > self.size:
            raise ValueError(
                f"a bank of {self.size} examples cannot hold a batch of {len(x)}: make it larger, or use the minibatch "
                "as references (references=None)"
            )
        if self.data is None:
            self.data = x.new_zeros(self.size, *x.shape[1:])
            self.index, self.label, self.age = index.new_full((3, self.size), EMPTY).unbind(0)
        data = self._move_to(x.device)
        first = (index[:, None] == index).int().argmax(1)  # of several versions in one batch the first is kept
        match = index[:, None] == self.index
        is_held, is_taken = match.any(1), match.any(0)
        free = torch.where(is_taken, 2**63 - 1, self.age).argsort(stable=True)
        is_new = (first == torch.arange(len(x), device=x.device)) & ~is_held
        place = torch.where(is_held, match.int().argmax(1), free[(is_new.cumsum(0) - 1).clamp(min=0)])[first]
        self.step += 1
        data.index_copy_(0, place, x[first].to(data.dtype))
        self.index.index_copy_(0, place, index[first])
        self.label.index_copy_(0, place, label[first])
        self.age.index_fill_(0, place, self.step)
        return data

    def _move_to(self, device: torch.device) -> Tensor:
        """The examples held, on the device of the batch; a checkpoint may bring them on another."""
        assert self.data is not None
        if self.data.device != device:
            self.data, self.index = self.data.to(device), self.index.to(device)
            self.label, self.age = self.label.to(device), self.age.to(device)
        return self.data


def _gathered(x: Tensor, index: Tensor, label: Tensor, gather: Gather | None) -> tuple[Tensor, Tensor, Tensor]:
    """Examples, indices and labels of all ranks, or of this one."""
    return (x, index, label) if gather is None else (gather(x), gather(index), gather(label))


def mean_over(noisy: NoisyBatch, blocks: Iterable[Block]) -> Posterior:
    """Posterior over references in blocks and the source; NaN where an input is not finite.

    Args:
        noisy: the batch.
        blocks: pairs (candidates, mask); the masks leave out the source's data point.
    """
    return sums_over(noisy.x_t, blocks, noisy.sigma, noisy.alpha, noisy.x).finish()


def hash_of(x: Float[Tensor, "n *D"]) -> Int[Tensor, "n"]:
    """A 64-bit hash of the values of each example: different values share one with a chance of 2^-64.

    Args:
        x: floating data.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = (x.detach() + 0.0).flatten(1).contiguous().view(integers).to(torch.int64)  # + 0.0: -0 equals 0
    place = torch.arange(1, bits.shape[1] + 1, device=x.device) * (0x9E3779B97F4A7C15 - 2**64)
    return _mix(bits.add_(_mix(place))).sum(1)


def _mix(bits: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """The finalizer of splitmix64, on signed numbers (Steele, Lea & Flood 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        high = (bits >> shift) & (2 ** (64 - shift) - 1)
        bits = (bits ^ high) * factor
    return bits ^ ((bits >> 31) & (2**33 - 1))


def identity(noisy: NoisyBatch) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
    """Index and label of each example; without an index, numbers that no other rank has.

    Args:
        noisy: the batch.
    """
    position = torch.arange(len(noisy), device=noisy.x.device)
    index = position + secrets.randbelow(2**62) if noisy.index is None else noisy.index
    return index, torch.full_like(position, NULL_LABEL) if noisy.label is None else noisy.label


def _same_label(label: Int[Tensor, "B"], labels: Int[Tensor, "n"]) -> Bool[Tensor, "B n"]:
    """Candidates whose label is that of the example; all for an example with the null label."""
    return (label[:, None] == labels) | (label[:, None] == NULL_LABEL)


def shared_blocks(noisy: NoisyBatch, x: Shaped[Tensor, "n *D"], mask: Bool[Tensor, "B n"]) -> Iterator[Block]:
    """Candidates that are in memory already, in parts.

    Args:
        noisy: the batch.
        x: the candidates.
        mask: which ones each example may use.
    """
    step = chunk_size(noisy.x_t)
    return ((x[start : start + step], mask[:, start : start + step]) for start in range(0, len(x), step))
