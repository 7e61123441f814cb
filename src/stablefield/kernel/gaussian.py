"""Posterior of clean data given noisy data, for Gaussian noise with identity covariance.

    log w_k = -||x_t - alpha x_k||^2 / (2 sigma^2),      mean = sum_k w_k x_k / sum_k w_k

over a *support* {x_k} of clean data. With the source alone, the mean is the target of denoising score matching; with
the source and a reference batch, that of the Stable Target Field (Xu, Tong & Jaakkola 2023, eq. 5); with the whole data
set, the exact E[x | x_t]. The support arrives in blocks and is summed by an online softmax in float64 (`accumulator`).
"""

from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stablefield.kernel.accumulator import Posterior, PosteriorAccumulator, chunk_size

Block = tuple[Tensor, Tensor | None]


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
    """Posterior mean of x given x_t = alpha x + sigma noise, with Gaussian noise N(0, I) and x from a support.

    Three lines in any training loop, to replace the clean batch as the denoiser's target:

    >>> import torch, stablefield
    >>> x, references, sigma = torch.randn(8, 3, 4, 4), torch.randn(100, 3, 4, 4), torch.rand(8) + 0.5
    >>> x_t = x + sigma[:, None, None, None] * torch.randn(8, 3, 4, 4)
    >>> target = stablefield.posterior(x_t, references, sigma=sigma, source=x).mean
    >>> target.shape
    torch.Size([8, 3, 4, 4])

    The references are other draws of the same data; the source joins by itself (if it were among the references too, it
    would count twice). Without the source in its own support the target is biased. Noise of another kind (offset
    noise, Student-t) needs another kernel.

    Args:
        x_t: noisy data, any floating type, any shape (B, *D).
        support: candidates shared by all examples, (n, *D), or each example's own, (B, n, *D). n may be 0 if there is a
            source.
        sigma: noise level, a number or (B,). At 0 the nearest candidate wins, and equally near ones share.
        alpha: scale of the data in x_t, a number or (B,).
        source: the x that each x_t was made from, (B, *D); joins its example's support, whatever `allowed` says.
        allowed: candidates that an example may use: a mask (B, n), or a pair (label of each example, label of each
            candidate) that is compared block by block.
        chunk: candidates per block. Changes nothing but speed and memory; by default a block takes about 6 MB (256 MB
            on a GPU).

    Returns:
        A `Posterior` whose mean has x_t's type (float32 at least). No gradient flows into it.

    Raises:
        ValueError: shapes, types or devices do not fit; the support is empty, or an example is allowed no candidate;
            sigma is negative; a value is not finite.
    """
    _check_types(x_t, support, sigma, alpha, source, allowed)
    _check(x_t, support, source, allowed)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 candidate per block, not {chunk}")
    own = support.ndim > x_t.ndim
    chunk = chunk or chunk_size(x_t, len(x_t) if own else 1)
    sums = sums_over(x_t, _blocks(support, allowed, chunk, own), sigma, alpha, source)
    _refuse_invalid(sums)
    return sums.finish()


@torch.no_grad()
def stream(
    x_t: Float[Tensor, "B *D"],
    blocks: Iterable[Block],
    *,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    source: Float[Tensor, "B *D"] | None = None,
    merge: Callable[[PosteriorAccumulator], PosteriorAccumulator] | None = None,
) -> Posterior:
    """`posterior` over a support that arrives in blocks.

    On a GPU nothing is checked, because the host would have to wait: values that are not finite, and examples without
    any candidate, give means that are not finite.

    Args:
        x_t: noisy data, (B, *D).
        blocks: pairs (candidates, mask): candidates (n, *D), or (G, n, *D) for G equally large groups of consecutive
            examples, of any floating type on any device; the mask, (B, n) or None, says which of them an example may
            use.
        sigma: noise level, a number or (B,).
        alpha: scale of the data in x_t, a number or (B,).
        source: the x that each x_t was made from; joins its example's support.
        merge: adds the sums of other processes over other candidates for the same examples (`Shard.merge`).

    Raises:
        ValueError: as for `posterior`, unless x_t is on a GPU.
    """
    sums = sums_over(x_t, blocks, sigma, alpha, source)
    if merge is not None:
        sums = merge(sums)
    if x_t.device.type != "cuda":
        _refuse_invalid(sums)
    return sums.finish()


@torch.no_grad()
def sums_over(
    x_t: Float[Tensor, "B *D"],
    blocks: Iterable[Block],
    sigma: float | Tensor,
    alpha: float | Tensor,
    source: Float[Tensor, "B *D"] | None,
) -> PosteriorAccumulator:
    """The sums of `stream`, without any check.

    Args:
        x_t: noisy data, (B, *D).
        blocks: candidates and masks, as for `stream`.
        sigma: noise level, a number or (B,).
        alpha: scale of the data in x_t, a number or (B,).
        source: the x that each x_t was made from; joins its example's support.
    """
    sums = PosteriorAccumulator(x_t, sigma, alpha, own=source)
    for candidates, mask in blocks:
        sums.add(candidates, mask)
    return sums


def check_tensor(name: str, value: Any) -> None:
    """Refuse what is not a dense tensor of real numbers.

    Args:
        name: the argument, for the error.
        value: its value.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Tensor):
        given = "None" if value is None else type(value).__name__
        way = "" if value is None else "; convert it with torch.as_tensor"
        raise ValueError(f"{name} must be a tensor, not {given}{way}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be dense, not {value.layout}; pass {name}.to_dense()")
    if value.is_complex():
        raise ValueError(f"{name} must be real, not {value.dtype}; pass its parts as torch.view_as_real gives them")


def _check_types(x_t: Any, support: Any, sigma: Any, alpha: Any, source: Any, allowed: Any) -> None:
    for name, value in (("x_t", x_t), ("support", support), *([] if source is None else [("source", source)])):
        check_tensor(name, value)
    for name, value in (("sigma", sigma), ("alpha", alpha)):
        if isinstance(value, Tensor):
            check_tensor(name, value)
        if isinstance(value, bool) or not isinstance(value, Real | Tensor):
            raise ValueError(f"{name} must be a number or a tensor, not {type(value).__name__}")
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            raise ValueError(f"{name} must hold numbers, not torch.bool")
    if isinstance(allowed, tuple):
        if len(allowed) != 2:
            raise ValueError(f"allowed must be a mask or two tensors of labels, not a tuple of {len(allowed)}")
        for name, value in zip(("allowed[0]", "allowed[1]"), allowed, strict=True):
            check_tensor(name, value)
    elif allowed is not None:
        check_tensor("allowed", allowed)


def _blocks(support: Tensor, allowed: Tensor | tuple[Tensor, Tensor] | None, chunk: int, own: bool) -> Iterator[Block]:
    axis = 1 if own else 0
    for start in range(0, support.shape[axis], chunk):
        part = slice(start, start + chunk)
        candidates = support[:, part] if own else support[part]
        if isinstance(allowed, tuple):
            of_examples, of_candidates = allowed
            yield candidates, of_examples[:, None] == of_candidates[part]
        else:
            yield candidates, None if allowed is None else allowed[:, part]


def _check(x_t: Tensor, support: Tensor, source: Tensor | None, allowed: Tensor | tuple[Tensor, Tensor] | None) -> None:
    if x_t.ndim < 2:
        raise ValueError(f"x_t must be (B, *D) with D at least one dimension, not {tuple(x_t.shape)}")
    shape, examples = tuple(x_t.shape[1:]), len(x_t)
    own = support.ndim > x_t.ndim
    wanted = (examples, support.shape[1], *shape) if own else (len(support), *shape)
    if tuple(support.shape) != wanted:
        dims = ", ".join(map(str, shape))
        raise ValueError(
            f"x_t is {tuple(x_t.shape)}, so the support must be (n, {dims}) or ({examples}, n, {dims}), "
            f"not {tuple(support.shape)}"
        )
    candidates = support.shape[1 if own else 0]
    if source is not None and source.shape != x_t.shape:
        raise ValueError(f"the source must have the shape of x_t, {tuple(x_t.shape)}, not {tuple(source.shape)}")
    if candidates == 0 and source is None:
        raise ValueError("the support is empty: pass at least one candidate, or the source")
    for name, tensor in (("x_t", x_t), ("support", support), ("source", source)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, but posterior needs floating-point data: decode it first")
        if tensor is not None and tensor.device != x_t.device:
            raise ValueError(f"{name} is on {tensor.device}, but x_t is on {x_t.device}: move one of them")
    if isinstance(allowed, tuple):
        if tuple(map(len, allowed)) != (examples, candidates):
            raise ValueError(
                f"allowed needs {examples} labels of examples and {candidates} of candidates, "
                f"not {tuple(map(len, allowed))}"
            )
    elif allowed is not None and (allowed.shape != (examples, candidates) or allowed.dtype != torch.bool):
        raise ValueError(
            f"allowed must be a bool mask {(examples, candidates)}, not {allowed.dtype} {tuple(allowed.shape)}"
        )


def _refuse_invalid(sums: PosteriorAccumulator) -> None:
    # whatever is not finite on the way in is not finite in the mean: one check (on a GPU: one wait) is enough
    finite = torch.isfinite(sums.weighted.sum(1) + sums.sigma + sums.alpha)
    if not (finite & (sums.total > 0) & (sums.sigma >= 0)).all():
        raise ValueError(_complaint(sums.like, sums))


def _complaint(x_t: Tensor, sums: PosteriorAccumulator) -> str:
    """Name the input that made the result impossible."""
    for name, value in (("sigma", sums.sigma), ("alpha", sums.alpha)):
        bad = ~torch.isfinite(value) if name == "alpha" else ~torch.isfinite(value) | (value < 0)
        if bad.any():
            example = int(bad.nonzero()[0])
            nonnegative = " and not negative" if name == "sigma" else ""
            return f"{name} must be finite{nonnegative}; example {example} has {value[example]}"
    if not torch.isfinite(x_t).all():
        return f"x_t is not finite in example {int((~torch.isfinite(x_t.flatten(1))).any(1).nonzero()[0])}"
    if (empty := sums.total == 0).any():
        return f"the support has no candidate that example {int(empty.nonzero()[0])} is allowed to use"
    return "the support or the source holds numbers that are not finite"
