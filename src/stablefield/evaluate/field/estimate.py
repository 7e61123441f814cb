"""Means over rows and draws, with standard errors, in float64.

A target errs at row b, with the references of draw r, by the vector e_br = T_br - E[x | x_t]. All there is to know lies
in the products

    G_b[r, r'] = <e_br, e_br'>

The diagonal averages to the mean squared error. Off the diagonal the two draws are independent, so that it averages to
||E[T | x_t] - E[x | x_t]||^2, the squared bias: without the Monte-Carlo variance that the square of a mean would add.
It may come out negative, by about its standard error.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A quantity at each noise level.

    Attributes:
        value: its estimate.
        error: the standard error of that.
    """

    value: Float[Tensor, "L"]
    error: Float[Tensor, "L"]

    @classmethod
    def over_rows(cls, each: Float[Tensor, "L B"]) -> "Estimate":
        """The mean over independent rows."""
        return cls(each.mean(1), _error_of_mean(each))

    def times(self, factor: float | Float[Tensor, "L"]) -> "Estimate":
        """The same in other units."""
        return Estimate(self.value * factor, self.error * factor)


def squared_error(each: Float[Tensor, "L B R"]) -> Estimate:
    """The mean over rows and draws. Rows share the draws, so both count: the error is that of either mean, added."""
    rows, draws = _error_of_mean(each.mean(2)), _error_of_mean(each.mean(1))
    return Estimate(each.mean((1, 2)), (rows.square() + draws.square()).sqrt())


def squared_bias(gram: Float[Tensor, "L B R R"]) -> Estimate:
    """The mean off the diagonal; its error from the spread over rows, and the jackknife over draws."""
    draws = gram.shape[3]
    rows = _error_of_mean(_off_diagonal(gram))
    shared = gram.mean(1)
    without = (shared.sum((1, 2)) - _trace(shared))[:, None] - 2 * (
        shared.sum(2) - shared.diagonal(dim1=1, dim2=2)
    )  # what is left off the diagonal when draw r is taken away
    without = without / ((draws - 1) * (draws - 2))
    jackknife = (draws - 1) ** 2 / draws * without.var(1)
    return Estimate(_off_diagonal(shared), (rows.square() + jackknife).sqrt())


def _off_diagonal(gram: Float[Tensor, "*L R R"]) -> Float[Tensor, "*L"]:
    draws = gram.shape[-1]
    return (gram.sum((-2, -1)) - _trace(gram)) / (draws * (draws - 1))


def _trace(gram: Float[Tensor, "*L R R"]) -> Float[Tensor, "*L"]:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _error_of_mean(each: Float[Tensor, "L n"]) -> Float[Tensor, "L"]:
    return each.std(1) / each.shape[1] ** 0.5
