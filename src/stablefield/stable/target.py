"""`StableTarget`: the target of any training loop, averaged over references.

Whatever a network predicts is y = a x + b, with a and b fixed by x_t and t. So the stable target is the loop's own
target plus a slope times the difference that averaging makes:

    y + a (E[x | x_t] - x)

| prediction type | loop's target            | slope a                     |
|-----------------|--------------------------|-----------------------------|
| `x0`            | x                        | 1                           |
| `epsilon`       | noise                    | -alpha / sigma              |
| `score`         | -noise / sigma           | alpha / sigma^2             |
| `velocity`      | alpha' x + sigma' noise  | alpha' - sigma' alpha/sigma |
| `v`             | alpha noise - sigma x    | -(alpha^2 + sigma^2)/sigma  |

It is exactly the loop's target where the mean is x, and loses no digits at small sigma.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.kernel.accumulator import float64_device
from stablefield.kernel.gaussian import check_tensor
from stablefield.pool import Pool
from stablefield.prediction import canonical_prediction_type
from stablefield.process import NoisyBatch, move
from stablefield.stable.checks import Loop, check_call, rounding
from stablefield.stable.drawn import Drawn, TensorPool, as_tensor
from stablefield.stable.references import Bank, Gather, Minibatch, hash_of
from stablefield.targets.base import TargetEstimator
from stablefield.targets.dsm import DSMTarget
from stablefield.targets.exact import ExactTarget

RESOLUTION = 2.0**-22  # of ||x_t||: below it the kernel cannot tell noise levels apart


@contextmanager
def _cpu_by_default() -> Iterator[None]:
    """Context in which tensors are made on the CPU if no device is named, whatever `torch.set_default_device` says."""
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


class StableTarget:
    """Stable targets for a training loop: call it where the loop has its target.

    >>> import torch
    >>> from stablefield import StableTarget
    >>> stable = StableTarget()  # references: the minibatch itself
    >>> x, noise, sigma = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4), torch.rand(8, 1, 1, 1) + 0.5
    >>> target = stable(noise, x + sigma * noise, x, alpha=1.0, sigma=sigma)
    >>> target.shape, stable.ess.shape
    (torch.Size([8, 3, 4, 4]), torch.Size([8]))

    The noise must be N(0, I) times sigma: offset noise, perturbed inputs and Student-t noise have other posteriors.

    Args:
        references: None or "batch": the minibatch itself. A `Bank` of the last examples. The data set, as a floating
            tensor or memory map (N, *D) or as a `Pool`, in the order that `index` counts. Or any `TargetEstimator`.
        prediction_type: what the network predicts: x0, epsilon, score, velocity or v, or a name of diffusers.
        size: candidates drawn from a tensor or pool for each call and label, including the source; None for all of them
            (for a pool the exact target; data must then be those of the pool).
        labels: class of each reference, (N,), for a tensor; a pool has its own.
        transform: applied to the references drawn from a tensor or pool, (n, *D): the augmentation of the loop, or the
            draw of a latent.
        gather: concatenates a tensor of all ranks, such as `accelerator.gather`, for a minibatch or bank of all ranks.
        match: "index", or "values" to tell data points apart by their values, which is biased for augmented data and
            duplicates.
        seed: of the draws from a tensor or pool.
        checks: number of first calls that are checked for wrong arguments.

    Attributes:
        references: the estimator in use.
        prediction_type: one of `PREDICTION_TYPES`.
        ess: effective sample sizes of the last call, (B,), detached; None before the first.
        calls: number of calls so far.

    Raises:
        ValueError: an unknown prediction type or kind of references, or options that do not belong to it.
    """

    def __init__(
        self,
        references: Any = None,
        prediction_type: str = "epsilon",
        *,
        size: int | None = 1024,
        labels: Int[Tensor, "N"] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        gather: Gather | None = None,
        match: Literal["index", "values"] = "index",
        seed: int = 0,
        checks: int = 4,
    ) -> None:
        if match not in ("index", "values"):
            raise ValueError(f'match must be "index" or "values", not {match!r}')
        self.prediction_type = canonical_prediction_type(prediction_type)
        self.references = _estimator(references, size, labels, transform, gather, match == "values")
        self.by_value, self.checks, self.calls = match == "values", checks, 0
        self.ess: Tensor | None = None
        self.generator = torch.Generator().manual_seed(seed)

    def __repr__(self) -> str:
        return f"StableTarget({self.references!r}, {self.prediction_type!r})"

    @torch.compiler.disable  # a compiled step calls this as it is: compiling it would gain nothing
    @torch.no_grad()
    @_cpu_by_default()
    def __call__(
        self,
        target: Float[Tensor, "B *D"],
        x_t: Float[Tensor, "B *D"],
        x: Float[Tensor, "B *D"],
        *,
        alpha: float | Tensor,
        sigma: float | Tensor,
        index: Int[Tensor, "B"] | None = None,
        label: Int[Tensor, "B"] | None = None,
        d_alpha: float | Tensor | None = None,
        d_sigma: float | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B *D"]:
        """The stable target that replaces the loop's own.

        Args:
            target: the loop's own target, (B, *D).
            x_t: noisy data, alpha x + sigma noise, before any scaling of the network's input.
            x: clean data.
            alpha: scale of the data in x_t: a number, (B,) or (B, 1, ..., 1).
            sigma: noise level, likewise.
            index: which data point each example is, (B,); needed unless the references are the minibatch.
            label: class of each example, (B,), if the network is given it; -1 without. Confines the references.
            d_alpha: for velocities, the derivative of alpha with respect to t; by default -1, if alpha + sigma = 1.
            d_sigma: for velocities, the derivative of sigma; by default 1.
            generator: source of randomness of the draws, on the CPU; by default one made from `seed`.

        Returns:
            The stable target, of the type and on the device of `target`; equal to it bit for bit where the support is
            the source alone. No gradient flows into it.

        Raises:
            ValueError: an argument is of the wrong type, shape or device; a value is not finite; or, on the first
                calls, the arguments contradict one another.
        """
        _check_data(target, x_t, x)
        device = float64_device(x.device)
        if (d_alpha is None) != (d_sigma is None):
            raise ValueError("pass both d_alpha and d_sigma, the derivatives with respect to t, or neither")
        default_rates = d_alpha is None and d_sigma is None
        loop = Loop(
            self.prediction_type,
            target=target.detach().to(device, torch.float64),
            x_t=x_t.detach().to(device, torch.float64),
            x=x.detach().to(device, torch.float64),
            alpha=_scale("alpha", alpha, x, device),
            sigma=_scale("sigma", sigma, x, device),
            d_alpha=_scale("d_alpha", -1.0 if default_rates else d_alpha, x, device),
            d_sigma=_scale("d_sigma", 1.0 if default_rates else d_sigma, x, device),
        )
        noisy = self._noisy(loop, x.to(device), index, label)
        if self.calls < self.checks:
            if (complaint := _complaint(loop)) is not None:
                raise ValueError(complaint)
            unit, tiny = rounding((x_t, target), (alpha, sigma))
            check_call(replace(loop, unit=unit, tiny=tiny), noisy, self.references, default_rates)
        posterior = self.references(noisy, generator=generator or self.generator)
        result, valid = _combine(loop, posterior.mean.to(torch.float64))
        result = result.to(target.device, target.dtype)
        valid &= torch.isfinite(result).all() & self._in_range(noisy)
        if not bool(valid):  # on a GPU the one time that the host waits
            raise ValueError(_complaint(loop) or self._impossible(noisy, result))
        self.calls += 1
        self.ess = posterior.ess.to(x.device, torch.float32)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The state of the draws and the bank, for a checkpoint."""
        held = self.references.state_dict() if isinstance(self.references, Bank) else None
        return {"generator": self.generator.get_state(), "bank": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Args:
            state: as returned by `state_dict`.

        Raises:
            ValueError: the state has a bank and the references are none, or the other way round, or another size.
        """
        if isinstance(self.references, Bank) != (state["bank"] is not None):
            raise ValueError(f"the state is not that of a StableTarget with {self.references!r} as references")
        if isinstance(self.references, Bank):
            self.references.load_state_dict(state["bank"])
        self.generator.set_state(state["generator"].cpu())

    def _noisy(self, loop: Loop, x: Tensor, index: Tensor | None, label: Tensor | None) -> NoisyBatch:
        """The batch as target estimators take it."""
        index, label = (_integers(name, value, loop) for name, value in (("index", index), ("label", label)))
        if label is not None and isinstance(self.references, Drawn) and self.references.pool.labels is None:
            raise ValueError("label was given, but the references have no labels: pass labels= with the tensor")
        if self.by_value:
            if index is not None:
                raise ValueError('match="values" compares values: leave index out, or set match="index"')
            if self.calls == 0:
                warnings.warn(
                    "data points are identified by their values: targets are biased if the data hold duplicates or "
                    "are augmented at random; pass index= and leave match out if you can",
                    stacklevel=6,  # the line of the loop
                )
            index = hash_of(x)
        elif index is None and not isinstance(self.references, Minibatch | DSMTarget):
            raise ValueError(
                f"references {self.references!r} need index=, the data point of each example, so that none counts "
                "twice: a DataLoader of stablefield.stable.WithIndex(dataset) brings it"
            )
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        return NoisyBatch(x, loop.x_t, loop.sigma, loop.alpha, loop.sigma, loop.x_t, label, index)

    def _in_range(self, noisy: NoisyBatch) -> Tensor:
        """True if every index counts a reference."""
        if noisy.index is None or self.by_value or not isinstance(self.references, Drawn):
            return torch.ones((), dtype=torch.bool, device=noisy.x.device)
        return ((noisy.index >= 0) & (noisy.index < len(self.references.pool))).all()

    def _impossible(self, noisy: NoisyBatch, result: Tensor) -> str:
        """Name what made a result impossible that alpha, sigma, x, x_t and target did not."""
        if not bool(self._in_range(noisy)):
            assert noisy.index is not None
            return f"index {noisy.index.tolist()} is out of range for {self.references!r}"
        if torch.isinf(result).any():
            return f"the stable target is too large for {result.dtype}: pass the target in float32"
        return "the references hold values that are not finite"


def _combine(loop: Loop, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Target plus slope times the change, and whether alpha and sigma are valid."""
    # Where nothing is averaged nothing is added, whatever the slope (it is infinite at sigma = 0). Neither is it where
    # sigma is below what float32 data resolve: there x_t determines x, and the choice does not depend on the source.
    determined = loop.sigma <= RESOLUTION * loop.x_t.flatten(1).norm(dim=1)
    same = (mean == loop.x) | loop.per(determined)
    result = torch.where(same, loop.target, loop.target + loop.per(loop.slope) * (mean - loop.x))
    finite = torch.isfinite(loop.alpha + loop.sigma) & torch.isfinite(mean.flatten(1).sum(1))
    return result, (finite & (loop.sigma >= 0)).all()


def _estimator(
    references: Any,
    size: int | None,
    labels: Tensor | None,
    transform: Callable[[Tensor], Tensor] | None,
    gather: Gather | None,
    by_value: bool,
) -> TargetEstimator:
    """The estimator that stands for what was passed as references."""
    if hasattr(references, "__array_interface__"):
        references = as_tensor(references)
    is_data = isinstance(references, Tensor | Pool)
    if not is_data and (labels is not None or transform is not None):
        raise ValueError("labels and transform belong to references drawn from a tensor, memory map or Pool")
    if gather is not None and references is not None and not isinstance(references, str | Bank):
        raise ValueError("gather belongs to a minibatch or Bank: every rank draws its own references from a data set")
    if references is None or (isinstance(references, str) and references == "batch"):
        return Minibatch(gather)
    if isinstance(references, Bank):
        references.gather = gather or references.gather
        return references
    if isinstance(references, Tensor):
        check_tensor("references", references)
        if not references.is_floating_point() and transform is None:
            raise ValueError(
                f"references are {references.dtype}, not floating: pass Pool(references) for bytes that stand for "
                "[-1, 1], or a transform that decodes them"
            )
        return Drawn(TensorPool(references.detach(), labels), size, transform, by_value)
    if isinstance(references, Pool):
        if labels is not None:
            raise ValueError("labels belong to a tensor: a Pool has its own")
        exact = size is None and transform is None and not by_value
        return ExactTarget(references) if exact else Drawn(references, size, transform, by_value)
    if not isinstance(references, TargetEstimator):
        raise ValueError(
            "references must be None (the minibatch), a Bank, a floating tensor or memory map, a Pool or a "
            f"TargetEstimator, not {references!r}"
        )
    if by_value:
        raise ValueError(f'match="values" does not work with {type(references).__name__}: pass index=')
    return references


def _check_data(target: Any, x_t: Any, x: Any) -> None:
    """Refuse data that are not floating tensors of one shape on one device; nothing here waits for a GPU."""
    for name, value in (("target", target), ("x_t", x_t), ("x", x)):
        check_tensor(name, value)
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating, not {value.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must be (B, *D) with D at least one dimension, not {tuple(x.shape)}")
    for name, value in (("target", target), ("x_t", x_t)):
        if value.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, not {tuple(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}: move one of them")


def _scale(name: str, value: Any, x: Tensor, device: torch.device) -> Float[Tensor, "B"]:
    """One of alpha, sigma and their derivatives as one float64 value per example."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number or a tensor, not {type(value).__name__}")
        return torch.full((len(x),), float(value), dtype=torch.float64, device=device)
    check_tensor(name, value)
    if not value.is_floating_point():
        raise ValueError(
            f"{name} is {value.dtype}, but must be floating; if these are timesteps, look up {name} in the scheduler"
        )
    if value.numel() != 1 and (value.ndim == 0 or len(value) != len(x) or value.numel() != len(x)):
        raise ValueError(
            f"{name} must be a number, ({len(x)},) or ({len(x)}, 1, ..., 1), one value per example, not "
            f"{tuple(value.shape)}"
        )
    return move(value.detach(), device).to(torch.float64).flatten().expand(len(x))


def _integers(name: str, value: Any, loop: Loop) -> Tensor | None:
    """Index or label of each example."""
    if value is None:
        return None
    check_tensor(name, value)
    if value.is_floating_point() or value.dtype == torch.bool or value.shape != (len(loop.x),):
        one_hot = "; for one-hot labels pass label.argmax(1)" if name == "label" else ""
        raise ValueError(
            f"{name} must be integers of shape ({len(loop.x)},), not {value.dtype} {tuple(value.shape)}{one_hot}"
        )
    return move(value.detach(), loop.x.device).long()


def _complaint(loop: Loop) -> str | None:
    """Name what is not finite or negative among the numbers handed in; None if all is well."""
    for name in ("alpha", "sigma", "d_alpha", "d_sigma", "target", "x_t", "x"):
        value = getattr(loop, name).flatten()
        bad = ~torch.isfinite(value) | ((value < 0) & (name == "sigma"))
        if bad.any():
            where = int(bad.nonzero()[0]) // (math.prod(getattr(loop, name).shape[1:]) or 1)
            nonnegative = " and not negative" if name == "sigma" else ""
            return f"{name} must be finite{nonnegative}; example {where} has {float(value[bad][0]):g}"
    return None
