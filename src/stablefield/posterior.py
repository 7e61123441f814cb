"""Which clean x could x_t have been? The one kernel everything stands on.

    log w_k = -||x_t - alpha x_k||^2 / (2 sigma^2),      mean = sum_k w_k x_k / sum_k w_k

over a *support* {x_k}. The source alone makes it denoising score matching; the source and a reference batch make it
the Stable Target Field (Xu, Tong & Jaakkola 2023, eq. 5); the whole data set makes it the exact E[x | x_t].

How it is computed. The support streams by in blocks. Only differences between the members of a row matter, so the
energy alpha^2 ||x_k||^2 - 2 alpha <x_t, x_k> stands in for the distance, and is a matrix product. What has passed is
kept as sums relative to the lowest energy so far (an online softmax); sums of parts merge, so blocks, the source that
joins a shared batch, and shards of a data set are one operation.

Precision. Products and sums are float64. Near-duplicates at small sigma are why: at sigma = 0.002 and D = 3072 one
float32 rounding of ||x||^2 is worth 40 nats. Float64 products have no reduced mode, so neither TF32 nor autocast can
reach the weights, and on a CPU with its memory reused they cost about twice the float32 ones. A caller who knows that
other products suffice (`products`: float32 where sigma is large, integers for bytes) may ask for those; the sums stay
float64.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.process import Rows
from stablefield.products import FloatProducts, Products

Block = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Posterior(Rows):
    """The posterior over a support, a row each.

    Attributes:
        mean: E[x | x_t], the stable target.
        ess: effective number of members, 1 / sum w^2: between 1 and the size of the support.
        variance: trace of Cov[x | x_t], the variance of a single-sample target at this x_t (units of x, squared,
            summed over the dimensions).
    """

    mean: Float[Tensor, "B *D"]
    ess: Float[Tensor, "B"]
    variance: Float[Tensor, "B"]


def posterior(
    x_t: Float[Tensor, "B *D"],
    support: Float[Tensor, "n *D"] | Float[Tensor, "B n *D"],
    *,
    sigma: float | Float[Tensor, ""] | Float[Tensor, "B"],
    alpha: float | Float[Tensor, ""] | Float[Tensor, "B"] = 1.0,
    source: Float[Tensor, "B *D"] | None = None,
    allowed: Bool[Tensor, "B n"] | tuple[Int[Tensor, "B"], Int[Tensor, "n"]] | None = None,
    chunk: int | None = None,
) -> Posterior:
    """Posterior mean of x given x_t = alpha x + sigma noise, when x is a member of a support.

    Three lines in any training loop, to replace the clean batch as the denoiser's target:

    >>> import torch, stablefield
    >>> x, references, sigma = torch.randn(8, 3, 4, 4), torch.randn(100, 3, 4, 4), torch.rand(8) + 0.5
    >>> x_t = x + sigma[:, None, None, None] * torch.randn(8, 3, 4, 4)
    >>> target = stablefield.posterior(x_t, references, sigma=sigma, source=x).mean
    >>> target.shape
    torch.Size([8, 3, 4, 4])

    The references are other draws of the same data; the source joins by itself (were it among the references too, it
    would count twice). Without the source in its own support the target is biased.

    Args:
        x_t: noisy data, any floating type, any shape (B, *D).
        support: members shared by all rows, (n, *D), or each row's own, (B, n, *D). n may be 0 if there is a source.
        sigma: noise level, a number or one a row. At 0 the nearest member wins, and equally near ones share.
        alpha: scale of the data in x_t, a number or one a row.
        source: the x that each x_t was made from; joins its row's support, whatever `allowed` says.
        allowed: which members a row may use: a mask (B, n), or a pair (label of each row, label of each member) that
            is compared block by block.
        chunk: members a block. It changes nothing but speed and memory; by default a block takes about 6 MB (256 MB
            on a GPU).

    Returns:
        A `Posterior` whose mean has x_t's type (float32 at least). No gradient flows into it.

    Raises:
        ValueError: shapes, types or devices do not fit; the support is empty, or allows a row nothing; sigma is
            negative; something is not finite.
    """
    for name, value in (("x_t", x_t), ("support", support), ("source", source)):
        if not isinstance(value, Tensor | None):
            raise ValueError(f"{name} must be a tensor, not {type(value).__name__}: torch.as_tensor makes it one")
    _check(x_t, support, source, allowed)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 member a block, not {chunk}")
    own = support.ndim > x_t.ndim
    chunk = chunk or chunk_size(x_t, members_of=len(x_t) if own else 1)
    return stream(x_t, _blocks(support, allowed, chunk, own), sigma=sigma, alpha=alpha, source=source)


@torch.no_grad()
def stream(
    x_t: Float[Tensor, "B *D"],
    blocks: Iterable[Block],
    *,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    source: Float[Tensor, "B *D"] | None = None,
    merge: Callable[["Sums"], "Sums"] | None = None,
) -> Posterior:
    """`posterior` over a support that arrives in blocks, from anywhere.

    Args:
        blocks: pairs (members, mask): members (n, *D) or (B, n, *D) of any floating type on any device; the mask,
            (B, n) or None, says which of them a row may use.
        merge: joins what was summed elsewhere, over other members for the same rows (`Shards.merge`).
    """
    sums = Sums(x_t, sigma, alpha)
    for members, mask in blocks:
        sums.add(members, mask)
    if source is not None:
        sums.add(source.unsqueeze(1))
    if merge is not None:
        sums = merge(sums)
    found = sums.finish()
    if not _valid(sums):
        raise ValueError(_complaint(x_t, sums))
    return found


class Sums:
    """What has passed of a support: normaliser, weighted sum and moments, relative to the lowest energy so far.

    Weights are exp(-(energy - lowest) / (2 sigma^2)), so the lowest always has weight 1 and nothing overflows.

    Energies carry the rounding of ||x_t||^2: what differs by less is equal. So a sigma below 2^-22 ||x_t||, zero too,
    counts as that much, or the order of a sum would choose between two copies of one image.

    Args:
        products: how members are multiplied: in float64, if not said.
    """

    def __init__(
        self,
        x_t: Float[Tensor, "B *D"],
        sigma: float | Tensor,
        alpha: float | Tensor = 1.0,
        products: Callable[[Float[Tensor, "B D"]], Products] = FloatProducts,
    ) -> None:
        self.like = x_t
        self.query = x_t.detach().to(exact(x_t.device), torch.float64).flatten(1)
        self.products = products(self.query)
        self.sigma = _one_a_row("sigma", sigma, self.query)
        self.alpha = _one_a_row("alpha", alpha, self.query)
        rounding = 2.0**-44 * self.query.square().sum(1)
        self.sharpness = (0.5 / torch.maximum(self.sigma.square(), rounding)).clamp(1e-300, 1e300)
        self.lowest = torch.full_like(self.sigma, torch.inf)
        self.total, self.squares, self.moment = self.query.new_zeros(3, len(x_t))
        self.weighted = torch.zeros_like(self.query)

    def add(self, members: Tensor, mask: Tensor | None = None, square: Float[Tensor, "n"] | None = None) -> None:
        """Let a block pass: members (n, *D) or (B, n, *D), with a mask (B, n) or None.

        Who knows the members' squared norms already may say them.
        """
        if 0 in members.shape:
            return
        y, norm, energy = self.compare(members, square)
        if mask is not None:
            # zero or infinity, in float32: to fill what is masked would take many times as long
            energy.add_(mask.to(energy.device, torch.float32).reciprocal_().sub_(1))
        kept = self._lower(torch.minimum(self.lowest, energy.amin(1)))
        weight = torch.exp_(energy.sub_(_finite(self.lowest)[:, None]).mul_(-self.sharpness[:, None]))
        self.total = self.total * kept + weight.sum(1)
        self.squares = self.squares * kept**2 + torch.linalg.vector_norm(weight, dim=1).square()
        self.moment = self.moment * kept + (weight @ norm if norm.ndim == 1 else (weight * norm).sum(1))
        self.weighted.mul_(kept[:, None])
        self.products.add_sums(self.weighted, weight, y)

    def compare(self, members: Tensor, square: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The members, flattened, their squared norms, and each row's energies, (B, n)."""
        if members.shape[members.ndim - self.like.ndim + 1 :] != self.like.shape[1:]:
            raise ValueError(f"x_t is {tuple(self.like.shape)}, which members {tuple(members.shape)} do not fit")
        y = members.flatten(members.ndim - self.like.ndim + 1)
        norm = self.products.squares(y) if square is None else square
        energy = self.products.inner(y).double().mul_(-2 * self.alpha[:, None])
        return y, norm, energy.add_(self.alpha.square()[:, None] * norm)

    def merge(self, other: "Sums") -> "Sums":
        """Join the sums of another part of the support, for the same x_t, alpha and sigma."""
        kept = self._lower(torch.minimum(self.lowest, other.lowest))
        theirs = self._weight_of(other.lowest)
        self.total = self.total * kept + other.total * theirs
        self.squares = self.squares * kept**2 + other.squares * theirs**2
        self.moment = self.moment * kept + other.moment * theirs
        self.weighted.mul_(kept[:, None]).add_(other.weighted * theirs[:, None])
        return self

    def put(self, rows: Int[Tensor, "b"], other: "Sums") -> None:
        """Take for some rows what has passed for them elsewhere."""
        for name in ("lowest", "total", "squares", "moment", "weighted"):
            getattr(self, name)[rows] = getattr(other, name)

    def state(self) -> Float[Tensor, "B S"]:
        """All that has passed, a row each: what another process needs to know of it."""
        return torch.cat([torch.stack([self.lowest, self.total, self.squares, self.moment], 1), self.weighted], 1)

    def at(self, state: Float[Tensor, "B S"]) -> "Sums":
        """Sums for the same rows, over what a state says has passed."""
        found = copy(self)
        found.lowest, found.total, found.squares, found.moment = state[:, :4].unbind(1)
        found.weighted = state[:, 4:].clone()
        return found

    def finish(self) -> Posterior:
        """The posterior over everything that has passed (not a number in rows where nothing has)."""
        mean = self.weighted / self.total[:, None]
        variance = (self.moment / self.total - mean.square().sum(1)).clamp(min=0)
        ess = self.total.square() / self.squares
        home, dtype = self.like.device, torch.promote_types(self.like.dtype, torch.float32)
        return Posterior(mean.reshape(self.like.shape).to(home, dtype), ess.to(home, dtype), variance.to(home, dtype))

    def _lower(self, lowest: Tensor) -> Tensor:
        """Move the reference energy; returns the factor that the sums so far shrink by."""
        before, self.lowest = self.lowest, lowest
        return self._weight_of(before)

    def _weight_of(self, energy: Tensor) -> Tensor:
        return torch.exp((_finite(self.lowest) - energy) * self.sharpness)


def exact(device: torch.device) -> torch.device:
    """That device, if it knows float64; else (MPS) the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def chunk_size(x_t: Tensor, members_of: int = 1, width: int = 8) -> int:
    """Members a block, such that a block and its weights take about 6 MB each (256 MB on a GPU).

    Args:
        members_of: rows that a block has members for.
        width: bytes of a number as it is multiplied.
    """
    memory = 2**28 if x_t.device.type == "cuda" else 3 * 2**21
    return max(1, memory // max(math.prod(x_t.shape[1:]) * members_of * width, len(x_t) * 8, 1))


def _one_a_row(name: str, value: float | Tensor, query: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
    value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if value.shape not in ((), (len(query),)):
        raise ValueError(f"{name} must be a number or ({len(query)},), one a row, not {tuple(value.shape)}")
    return value.detach().to(query).expand(len(query))


def _finite(energy: Tensor) -> Tensor:
    # a row that no member has reached yet: infinity minus infinity must not be asked
    return torch.where(energy == torch.inf, 0.0, energy)


def _blocks(support: Tensor, allowed: Tensor | tuple[Tensor, Tensor] | None, chunk: int, own: bool) -> Iterator[Block]:
    axis = 1 if own else 0
    for start in range(0, support.shape[axis], chunk):
        part = slice(start, start + chunk)
        members = support[:, part] if own else support[part]
        if isinstance(allowed, tuple):
            rows, labels = allowed
            yield members, rows[:, None] == labels[part]
        else:
            yield members, None if allowed is None else allowed[:, part]


def _check(x_t: Tensor, support: Tensor, source: Tensor | None, allowed: Tensor | tuple[Tensor, Tensor] | None) -> None:
    if x_t.ndim < 2:
        raise ValueError(f"x_t must be (B, *D) with D at least one dimension, not {tuple(x_t.shape)}")
    shape, rows = tuple(x_t.shape[1:]), len(x_t)
    own = support.ndim > x_t.ndim
    wanted = (rows, support.shape[1], *shape) if own else (len(support), *shape)
    if tuple(support.shape) != wanted:
        raise ValueError(
            f"x_t is {tuple(x_t.shape)}, so the support must be (n, {_comma(shape)}) or ({rows}, n, {_comma(shape)}), "
            f"not {tuple(support.shape)}"
        )
    members = support.shape[1 if own else 0]
    if source is not None and source.shape != x_t.shape:
        raise ValueError(f"the source must be shaped like x_t, {tuple(x_t.shape)}, not {tuple(source.shape)}")
    if members == 0 and source is None:
        raise ValueError("the support is empty: give at least one member, or the source")
    for name, tensor in (("x_t", x_t), ("support", support), ("source", source)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; posterior needs floating-point data: decode it first")
        if tensor is not None and tensor.device != x_t.device:
            raise ValueError(f"{name} is on {tensor.device}, but x_t on {x_t.device}: move one of them")
    if isinstance(allowed, tuple):
        if tuple(map(len, allowed)) != (rows, members):
            raise ValueError(f"allowed needs {rows} row and {members} member labels, not {tuple(map(len, allowed))}")
    elif allowed is not None and (allowed.shape != (rows, members) or allowed.dtype != torch.bool):
        raise ValueError(
            f"allowed must be a bool mask {(rows, members)}, not {allowed.dtype} of {tuple(allowed.shape)}"
        )


def _comma(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _valid(sums: Sums) -> bool:
    # whatever is not finite on the way in is not finite in the mean, so that one look (on a GPU: one wait) is enough
    numbers = torch.isfinite(sums.weighted).all() & (sums.total > 0).all()
    return bool(numbers & ((sums.sigma >= 0) & torch.isfinite(sums.sigma + sums.alpha)).all())


def _complaint(x_t: Tensor, sums: Sums) -> str:
    """Which of the inputs made a result impossible."""
    for name, value in (("sigma", sums.sigma), ("alpha", sums.alpha)):
        bad = ~torch.isfinite(value) if name == "alpha" else ~torch.isfinite(value) | (value < 0)
        if bad.any():
            row = int(bad.nonzero()[0])
            return f"{name} must be finite{' and not negative' if name == 'sigma' else ''}; row {row} has {value[row]}"
    if not torch.isfinite(x_t).all():
        return f"x_t is not finite in row {int((~torch.isfinite(x_t.flatten(1))).any(1).nonzero()[0])}"
    if (empty := sums.total == 0).any():
        return f"the support has no member that row {int(empty.nonzero()[0])} is allowed to use"
    return "the support or the source holds numbers that are not finite"
