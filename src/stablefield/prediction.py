"""Prediction types: what a network may predict, and how one prediction converts to another.

Every prediction y is linear in x_t and the posterior mean x0 = E[x | x_t]:

    a y = b x_t + c x0

|            | prediction y                     | a       | b        | c                              |
|------------|----------------------------------|---------|----------|--------------------------------|
| `x0`       | E[x given x_t]                   | 1       | 0        | 1                              |
| `epsilon`  | (x_t - alpha x0) / sigma         | sigma   | 1        | -alpha                         |
| `score`    | -epsilon / sigma                 | sigma^2 | -1       | alpha                          |
| `velocity` | alpha' x0 + sigma' epsilon       | sigma   | sigma'   | sigma alpha' - alpha sigma'    |
| `v`        | alpha epsilon - sigma x0         | sigma   | alpha    | -(alpha^2 + sigma^2)           |

Conversions go through x0. They are exact where a and c are not zero, and refused where one of them is: epsilon does
not determine x0 where alpha = 0, and x0 does not determine epsilon where sigma = 0.

The names that diffusers uses are accepted too: `sample` is x0, `v_prediction` is v and `flow_prediction` is velocity.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.process import NoisyBatch, Process, per_example

Coefficients = tuple[Tensor, Tensor, Tensor]  # (a, b, c) of a y = b x_t + c x0
Rates = tuple[Tensor, Tensor]  # (d alpha / dt, d sigma / dt)


PREDICTION_TYPES = ("x0", "epsilon", "score", "velocity", "v")
DIFFUSERS_PREDICTION_TYPES = {"sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}


def canonical_prediction_type(name: str) -> str:
    """The name in `PREDICTION_TYPES` of a prediction type that may be given by its name in diffusers.

    >>> canonical_prediction_type("v_prediction"), canonical_prediction_type("epsilon")
    ('v', 'epsilon')

    Args:
        name: one of `PREDICTION_TYPES`, or `sample`, `v_prediction` or `flow_prediction`.

    Raises:
        ValueError: the name is none of these.
    """
    canonical = DIFFUSERS_PREDICTION_TYPES.get(name, name)
    if canonical not in PREDICTION_TYPES:
        known = ", ".join([*PREDICTION_TYPES, *DIFFUSERS_PREDICTION_TYPES])
        raise ValueError(f"unknown prediction type {name!r}: choose one of {known}")
    return canonical


def coefficients(prediction_type: str, process: Process, t: Float[Tensor, "*S"]) -> Coefficients:
    """The coefficients (a, b, c) of a y = b x_t + c x0, shaped like t.

    Args:
        prediction_type: the quantity y, one of `PREDICTION_TYPES`.
        process: the process that made x_t.
        t: times, of any shape.

    Raises:
        ValueError: the prediction type is unknown.
    """
    prediction_type = canonical_prediction_type(prediction_type)
    rates = process.rates(t) if prediction_type == "velocity" else None
    return coefficients_of(prediction_type, *process.scales(t), rates)


def coefficients_of(
    prediction_type: str, alpha: Float[Tensor, "*S"], sigma: Float[Tensor, "*S"], rates: Rates | None = None
) -> Coefficients:
    """The coefficients (a, b, c) of a y = b x_t + c x0, from alpha and sigma.

    Args:
        prediction_type: the quantity y, one of `PREDICTION_TYPES`.
        alpha: scale of the data in x_t.
        sigma: noise level.
        rates: derivatives of alpha and sigma with respect to t; only a velocity needs them.
    """
    p, q, r = mixture(prediction_type, alpha, sigma, rates)
    if prediction_type == "x0":  # also where sigma = 0
        return r, q, p
    return sigma * r, q, sigma * p - alpha * q


def mixture(
    prediction_type: str, alpha: Float[Tensor, "*S"], sigma: Float[Tensor, "*S"], rates: Rates | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients (p, q, r) of r y = p x0 + q noise.

    Args:
        prediction_type: the quantity y, one of `PREDICTION_TYPES`.
        alpha: scale of the data in x_t.
        sigma: noise level.
        rates: derivatives of alpha and sigma with respect to t; only a velocity needs them.
    """
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    match prediction_type:
        case "x0":
            return one, zero, one
        case "epsilon":
            return zero, one, one
        case "score":
            return zero, -one, sigma
        case "v":
            return -sigma, alpha, one
        case _:
            assert rates is not None
            return *rates, one


def convert(
    value: Float[Tensor, "B *D"],
    x_t: Float[Tensor, "B *D"],
    t: Float[Tensor, "B"],
    process: Process,
    *,
    source: str,
    to: str,
) -> Float[Tensor, "B *D"]:
    """Convert a prediction from one type to another.

    Args:
        value: the prediction.
        x_t: the noisy data that it was made from.
        t: time of each example.
        process: the process that made x_t.
        source: prediction type of `value`.
        to: prediction type to return.

    Raises:
        ValueError: a prediction type is unknown, or the conversion does not exist at one of the times (alpha = 0 or
            sigma = 0).
    """
    source, to = canonical_prediction_type(source), canonical_prediction_type(to)
    if source == to:
        return value
    of_source, of_result = coefficients(source, process, t), coefficients(to, process, t)
    _check_divisor(of_source[2], f"x0 cannot be computed from {source!r}", process, t)
    _check_divisor(of_result[0], f"{to!r} cannot be computed from x0", process, t)
    a, b, c = (per_example(k, x_t) for k in of_source)
    x0 = (a * value - b * x_t) / c
    a, b, c = (per_example(k, x_t) for k in of_result)
    return (b * x_t + c * x0) / a


def _check_divisor(divisor: Float[Tensor, "B"], complaint: str, process: Process, t: Float[Tensor, "B"]) -> None:
    """Refuse times at which a conversion would divide by zero."""
    if (undefined := (divisor == 0) | ~torch.isfinite(divisor)).any():
        raise ValueError(f"{complaint} at t = {t[undefined][0].item():g} of {process}")


@torch.no_grad()
def stable_target(
    noisy: NoisyBatch, mean: Float[Tensor, "B *D"], process: Process, *, prediction_type: str
) -> Float[Tensor, "B *D"]:
    """The stable target of a network that predicts another quantity than x0.

    It is the DSM target plus c/a (mean - x), never a quotient of nearly equal numbers: with mean = x it equals the DSM
    target bit for bit, and at small sigma no digits are lost. No gradient flows into it.

    Args:
        noisy: the batch.
        mean: posterior mean of each example, as a target estimator returns it.
        process: the process that made the batch.
        prediction_type: what the network predicts.

    Returns:
        The prediction of a network whose x0 is `mean`, of the given type.

    Raises:
        ValueError: the prediction type is unknown, or has no target at one of the times (the score where sigma = 0).
    """
    prediction_type = canonical_prediction_type(prediction_type)
    a, _, c = (per_example(k, noisy.x) for k in coefficients(prediction_type, process, noisy.t))
    # where mean = x nothing is added, whatever c/a is: it is infinite at sigma = 0
    change = torch.where(mean == noisy.x, 0.0, c / a * (mean - noisy.x))
    target = _dsm_target(noisy, process, prediction_type) + change
    if (undefined := ~torch.isfinite(target.flatten(1)).all(1)).any():
        raise ValueError(f"{prediction_type!r} has no target at t = {noisy.t[undefined][0].item():g} of {process}")
    return target


def _dsm_target(noisy: NoisyBatch, process: Process, prediction_type: str) -> Tensor:
    """The prediction whose x0 is the source."""
    if prediction_type == "x0":
        return noisy.x
    if prediction_type == "epsilon":
        return noisy.noise
    rates = process.rates(noisy.t) if prediction_type == "velocity" else None
    p, q, r = (per_example(k, noisy.x) for k in mixture(prediction_type, noisy.alpha, noisy.sigma, rates))
    return (p * noisy.x + q * noisy.noise) / r
