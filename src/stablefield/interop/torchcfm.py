"""torchcfm: stable targets for the paths of its flow matchers, in which t = 1 is data.

    x_t = a x_1 + b x_0 + s e        a, b functions of t; noise x_0 and e from N(0, I)
    u_t = a' x_1 + b' x_0

Given x_1, x_t is Gaussian with mean a x_1 and variance S^2 = b^2 + s^2: that is alpha and sigma. Where s = 0, u_t is a
function of x_t and x_1, and `StableTarget` applies as it is. Where s > 0 the noise e of the path hides x_0, and

    E[u_t | x_t, x_1] = a' x_1 + b' (b / S^2) (x_t - a x_1)

has the slope a' - a b b' / S^2 in x_1. The stable target adds this slope times (E[x_1 | x_t] - x_1) to u_t. It is
unbiased. What u_t carries of e stays in it, or is averaged too: then the target is E[u_t | x_t, x_1] at that mean.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.process import per_example
from stablefield.stable import StableTarget


class StableFlow:
    """Stable targets for a flow matcher of torchcfm: call it with what its sampling returned.

    Args:
        matcher: a `ConditionalFlowMatcher`, `TargetConditionalFlowMatcher` or
            `VariancePreservingConditionalFlowMatcher`. Those that couple noise and data (OT-CFM, Schrodinger bridges)
            are refused, because given x_1 their noise is not N(0, I).
        references: as in `StableTarget`; x_1 are the data.
        average_noise: average what u_t carries of the noise e, too. Then a single candidate does not return the bits of
            the loop, but a target of less variance.
        options: passed on to `StableTarget`.

    Attributes:
        stable: the stable target of x_1; holds the effective sample sizes (`stable.ess`) and the state of the draws.

    Raises:
        ValueError: another matcher.
    """

    def __init__(self, matcher: Any, references: Any = None, *, average_noise: bool = False, **options: Any) -> None:
        self.path = _path_of(matcher)
        self.noise = 0.0 if self.path is _target_path else float(matcher.sigma)
        self.least = float(matcher.sigma)
        self.average_noise = average_noise
        self.stable = StableTarget(references, "x0" if self.noise else "velocity", **options)

    def __call__(
        self,
        u_t: Float[Tensor, "B *D"],
        x_t: Float[Tensor, "B *D"],
        x_1: Float[Tensor, "B *D"],
        t: Float[Tensor, "B"],
        *,
        index: Int[Tensor, "B"] | None = None,
        label: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B *D"]:
        """The stable target that replaces u_t.

        Args:
            u_t: the loop's own target, as `sample_location_and_conditional_flow` returns it.
            x_t: the location that it returns.
            x_1: the data that it was given.
            t: the times that it returns.
            index: which data point each example is, as in `StableTarget`.
            label: class of each example, as in `StableTarget`.

        Returns:
            The stable target, of the type of u_t.

        Raises:
            ValueError: as in `StableTarget`; or u_t is not the velocity of the matcher's path.
        """
        a, b, d_a, d_b = self.path(t.detach().double(), self.least)
        if not self.noise:
            rates = {"d_alpha": d_a, "d_sigma": d_b}
            return self.stable(u_t, x_t, x_1, alpha=a, sigma=b, index=index, label=label, **rates)
        variance = b.square() + self.noise**2
        checked = self.stable.calls < self.stable.checks
        # the mean of x_1 in float64, as a target of that type
        x, y = x_1.detach().double(), u_t.detach().double()
        mean = self.stable(x, x_t, x_1, alpha=a, sigma=variance.sqrt(), index=index, label=label)
        slope, gain = (per_example(value, x) for value in (d_a - a * b * d_b / variance, b * d_b / variance))
        expected = per_example(d_a, x) * x + gain * (x_t.detach().double() - per_example(a, x) * x)
        if checked:
            spread = self.noise * d_b.abs() / variance.sqrt()
            rounding = 100 * max(torch.finfo(value.dtype).eps for value in (u_t, x_t))
            self._check(((y - expected) / per_example(spread, x))[spread > rounding])
        if self.average_noise:
            return (expected + slope * (mean - x)).to(u_t.dtype)
        return torch.where(mean == x, u_t.detach(), (y + slope * (mean - x)).to(u_t.dtype))

    def _check(self, residual: Float[Tensor, "B *D"]) -> None:
        """Refuse a u_t whose part that x_t and x_1 do not determine is not N(0, I) in its units."""
        if residual.numel() == 0:
            return
        found, chance = float(residual.square().mean()), (2 / residual.numel()) ** 0.5
        if not abs(found - 1) <= 8 * chance + 0.05:
            raise ValueError(
                f"u_t is not the velocity of this path: its part that x_t and x_1 leave open has {found:.3g} times the "
                "variance that it should have; pass t, x_t and u_t as the matcher returned them, and the same x_1"
            )


def _straight_path(t: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one = torch.ones_like(t)
    return t, 1 - t, one, -one


def _target_path(t: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lipman et al. 2023: noise falls from 1 to the matcher's sigma."""
    one = torch.ones_like(t)
    return t, 1 - (1 - least) * t, one, (least - 1) * one


def _preserving_path(t: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quarter = torch.pi / 2
    sine, cosine = torch.sin(quarter * t), torch.cos(quarter * t)
    return sine, cosine, quarter * cosine, -quarter * sine


_PATHS = {
    "ConditionalFlowMatcher": _straight_path,
    "TargetConditionalFlowMatcher": _target_path,
    "VariancePreservingConditionalFlowMatcher": _preserving_path,
}


def _path_of(matcher: Any) -> Any:
    """(a, b, a', b') of a matcher as a function of t."""
    # a subclass may change the path or couple noise and data: only the classes themselves are known
    name = type(matcher).__name__
    if name in _PATHS:
        return _PATHS[name]
    if "OptimalTransport" in name or "Schrodinger" in name:
        raise ValueError(
            f"{name} couples noise and data in each minibatch: given x_1 the noise is not N(0, I), and a stable target "
            "would be biased; use ConditionalFlowMatcher"
        )
    raise ValueError(f"the path of {name} is not known here: choose one of {', '.join(_PATHS)}")
