"""Means over examples and draws, with standard errors, in float64.

The target of example b with the references of draw r has the error vector e_br = T_br - E[x | x_t]. Everything needed
is in the inner products

    G_b[r, r'] = <e_br, e_br'>

The diagonal averages to the mean squared error. Off the diagonal the two draws are independent, so that it averages to
||E[T | x_t] - E[x | x_t]||^2, the squared bias, without the Monte-Carlo variance that the square of a mean would add.
This estimate may be negative, by about its standard error.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["Estimate", "squared_bias", "squared_error"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """Estimate of a quantity at each noise level, with its standard error.

    Attributes:
        value: the estimate, (L,).
        error: its standard error, (L,), in the same unit.
    """

    value: Float[Tensor, "L"]
    error: Float[Tensor, "L"]

    @classmethod
    def over_examples(cls, values: Float[Tensor, "L B"]) -> "Estimate":
        """Mean over independent examples.

        Args:
            values: the quantity for every noise level and example, (L, B).
        """
        return cls(values.mean(1), _error_of_mean(values))

    def scaled(self, factor: float | Float[Tensor, "L"]) -> "Estimate":
        """The estimate multiplied by a factor, for example to change its unit.

        Args:
            factor: a number, or one for each noise level, (L,).
        """
        return Estimate(self.value * factor, self.error * factor)


def squared_error(squares: Float[Tensor, "L B R"]) -> Estimate:
    """Mean squared error over examples and draws.

    The examples share the draws, so both contribute to the standard error: it is the root of the sum of the two squared
    standard errors.

    Args:
        squares: squared errors ||e_br||^2 for every noise level, example and draw, (L, B, R).
    """
    examples, draws = _error_of_mean(squares.mean(2)), _error_of_mean(squares.mean(1))
    return Estimate(squares.mean((1, 2)), (examples.square() + draws.square()).sqrt())


def squared_bias(gram: Float[Tensor, "L B R R"]) -> Estimate:
    """Squared bias: the mean of G off its diagonal.

    The standard error combines the spread over examples with a jackknife over draws.

    Args:
        gram: inner products G of the errors of all pairs of draws, for every noise level and example, (L, B, R, R).
    """
    draws = gram.shape[3]
    examples = _error_of_mean(_off_diagonal(gram))
    shared = gram.mean(1)
    # sum off the diagonal without draw r
    without = (shared.sum((1, 2)) - _trace(shared))[:, None] - 2 * (shared.sum(2) - shared.diagonal(dim1=1, dim2=2))
    without = without / ((draws - 1) * (draws - 2))
    jackknife = (draws - 1) ** 2 / draws * without.var(1)
    return Estimate(_off_diagonal(shared), (examples.square() + jackknife).sqrt())


def _off_diagonal(gram: Float[Tensor, "*L R R"]) -> Float[Tensor, "*L"]:
    """Mean of the entries off the diagonal."""
    draws = gram.shape[-1]
    return (gram.sum((-2, -1)) - _trace(gram)) / (draws * (draws - 1))


def _trace(gram: Float[Tensor, "*L R R"]) -> Float[Tensor, "*L"]:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _error_of_mean(values: Float[Tensor, "L n"]) -> Float[Tensor, "L"]:
    """Standard error of the mean over the second dimension."""
    return values.std(1) / values.shape[1] ** 0.5
