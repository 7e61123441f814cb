"""What a network may predict, and how each answer turns into another.

Every head is linear in x_t and the posterior mean x0, so one line each says all there is to know:

    a head = b x_t + c x0

|            |                                  | a       | b        | c                              |
|------------|----------------------------------|---------|----------|--------------------------------|
| `x0`       | E[x given x_t]                   | 1       | 0        | 1                              |
| `noise`    | (x_t - alpha x0) / sigma         | sigma   | 1        | -alpha                         |
| `score`    | -noise / sigma                   | sigma^2 | -1       | alpha                          |
| `velocity` | alpha' x0 + sigma' noise         | sigma   | sigma'   | sigma alpha' - alpha sigma'    |
| `v`        | alpha noise - sigma x0           | sigma   | alpha    | -(alpha^2 + sigma^2)           |

Conversions go through x0. They are exact where a and c are not zero, and refused where they are: noise says nothing
of x0 once alpha = 0, and x0 nothing of the noise once sigma = 0.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.process import Perturbed, Process, per_row

Coefficients = tuple[Tensor, Tensor, Tensor]


def _x0(process: Process, t: Tensor) -> Coefficients:
    return torch.ones_like(t), torch.zeros_like(t), torch.ones_like(t)


def _noise(process: Process, t: Tensor) -> Coefficients:
    alpha, sigma = process.scales(t)
    return sigma, torch.ones_like(t), -alpha


def _score(process: Process, t: Tensor) -> Coefficients:
    alpha, sigma = process.scales(t)
    return sigma**2, -torch.ones_like(t), alpha


def _velocity(process: Process, t: Tensor) -> Coefficients:
    (alpha, sigma), (d_alpha, d_sigma) = process.scales(t), process.rates(t)
    return sigma, d_sigma, sigma * d_alpha - alpha * d_sigma


def _v(process: Process, t: Tensor) -> Coefficients:
    alpha, sigma = process.scales(t)
    return sigma, alpha, -(alpha**2 + sigma**2)


HEADS: dict[str, Callable[[Process, Tensor], Coefficients]] = {
    "x0": _x0,
    "noise": _noise,
    "score": _score,
    "velocity": _velocity,
    "v": _v,
}


def coefficients(head: str, process: Process, t: Float[Tensor, "*S"]) -> Coefficients:
    """(a, b, c) of the table above, shaped like t.

    Raises:
        ValueError: `head` is none of the five.
    """
    if head not in HEADS:
        raise ValueError(f"no head is called {head!r}; there are {', '.join(HEADS)}")
    return HEADS[head](process, t)


def convert(
    value: Float[Tensor, "B *D"],
    x_t: Float[Tensor, "B *D"],
    t: Float[Tensor, "B"],
    process: Process,
    *,
    source: str,
    to: str,
) -> Float[Tensor, "B *D"]:
    """The answer of head `source` as head `to` would give it.

    Raises:
        ValueError: the conversion does not exist at one of the times (alpha = 0 or sigma = 0).
    """
    if source == to:
        return value
    a, b, c = (per_row(k, x_t) for k in _where_defined(source, process, t, "x0 cannot be had from", 2))
    x0 = (a * value - b * x_t) / c
    a, b, c = (per_row(k, x_t) for k in _where_defined(to, process, t, "x0 does not give", 0))
    return (b * x_t + c * x0) / a


def _where_defined(head: str, process: Process, t: Tensor, complaint: str, divisor: int) -> Coefficients:
    found = coefficients(head, process, t)
    if (undefined := (found[divisor] == 0) | ~torch.isfinite(found[divisor])).any():
        raise ValueError(f"{complaint} {head!r} at t = {t[undefined][0].item():g} of {process}")
    return found


@torch.no_grad()
def stable_target(
    noisy: Perturbed, mean: Float[Tensor, "B *D"], process: Process, *, head: str
) -> Float[Tensor, "B *D"]:
    """The training target of a head: what it would say if x0 were the posterior mean.

    Written as the single-sample target plus c/a (mean - x), never as a quotient of nearly equal numbers: with
    mean = x it is the single-sample target bit for bit, and at small sigma it loses nothing. No gradient flows into it.

    Raises:
        ValueError: the head has no target at one of the times (the score where sigma = 0, say).
    """
    a, _, c = (per_row(k, noisy.x) for k in coefficients(head, process, noisy.t))
    # where nothing changed nothing is added, whatever c/a is (it is infinite at sigma = 0)
    change = torch.where(mean == noisy.x, 0.0, c / a * (mean - noisy.x))
    target = _single_sample(noisy, process, head) + change
    if (undefined := ~torch.isfinite(target.flatten(1)).all(1)).any():
        raise ValueError(f"{head!r} has no target at t = {noisy.t[undefined][0].item():g} of {process}")
    return target


def _single_sample(noisy: Perturbed, process: Process, head: str) -> Tensor:
    alpha, sigma = per_row(noisy.alpha, noisy.x), per_row(noisy.sigma, noisy.x)
    match head:
        case "x0":
            return noisy.x
        case "noise":
            return noisy.noise
        case "score":
            return -noisy.noise / sigma
        case "v":
            return alpha * noisy.noise - sigma * noisy.x
        case _:
            d_alpha, d_sigma = (per_row(rate, noisy.x) for rate in process.rates(noisy.t))
            return d_alpha * noisy.x + d_sigma * noisy.noise
