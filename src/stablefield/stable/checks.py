"""Checks of the first calls: do target, x_t, x, alpha and sigma belong together, and are the references like x?

Each has a limit that a right call does not reach: rounding is bounded from the types, chance by 1e-9 per call.

1. The target is p x + q noise, with noise = (x_t - alpha x) / sigma and (p, q) fixed by the prediction type.
2. The mean square of that noise is 1: chi-square with B D degrees of freedom (Wilson & Hilferty 1931).
3. No statistic separates the examples from the references: if all are draws of one distribution, all B examples lie
   above or all below n references with probability 2 B! n! / (B + n)!, an exact permutation test. Within classes these
   probabilities multiply, so that a few examples of several classes suffice.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stablefield.pool import NULL_LABEL
from stablefield.prediction import PREDICTION_TYPES, coefficients_of, mixture
from stablefield.process import NoisyBatch, per_example
from stablefield.stable.drawn import Drawn
from stablefield.stable.references import References, hash_of
from stablefield.targets.base import TargetEstimator

ROUNDINGS = 8  # in x_t and in a target: of alpha, sigma, both products, their sum, and the noise itself
SLACK = 1e-3  # relative: alpha and sigma may have been computed in two ways
CHANCE = 1e-9
CLASSES = 8  # whose references are compared; more would only take time
Z = 6.0  # standard deviations: 1e-9 on either side


@dataclass(frozen=True, eq=False)
class Loop:
    """Arguments of a call in float64, with what follows from the process.

    Attributes:
        prediction_type: what the target is supposed to be.
        target: the loop's target, (B, *D).
        x_t: noisy data, (B, *D).
        x: clean data, (B, *D).
        alpha, sigma: scale of the data in x_t and noise level, (B,).
        d_alpha, d_sigma: their derivatives with respect to t, (B,).
        unit, tiny: unit roundoff and smallest number of the types of x_t and target.
    """

    prediction_type: str
    target: Float[Tensor, "B *D"]
    x_t: Float[Tensor, "B *D"]
    x: Float[Tensor, "B *D"]
    alpha: Float[Tensor, "B"]
    sigma: Float[Tensor, "B"]
    d_alpha: Float[Tensor, "B"]
    d_sigma: Float[Tensor, "B"]
    unit: float = 0.0
    tiny: float = 0.0

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """(p, q) of the prediction type: a target is p x + q noise."""
        p, q, r = mixture(self.prediction_type, self.alpha, self.sigma, (self.d_alpha, self.d_sigma))
        return p / r, q / r

    @property
    def slope(self) -> Float[Tensor, "B"]:
        """Change of the target with x at fixed x_t."""
        rates = self.d_alpha, self.d_sigma
        a, _, c = coefficients_of(self.prediction_type, self.alpha, self.sigma, rates)
        return c / a

    @property
    def noise(self) -> Float[Tensor, "B *D"]:
        """The noise in x_t."""
        return (self.x_t - self.per(self.alpha) * self.x) / self.per(self.sigma)

    @property
    def noise_error(self) -> Float[Tensor, "B *D"]:
        """Bound on the rounding of the noise."""
        size = self.x_t.abs() + (self.per(self.alpha) * self.x).abs()
        return ROUNDINGS * (self.unit * size + self.tiny) / self.per(self.sigma)

    def per(self, value: Shaped[Tensor, "B"]) -> Tensor:
        """One value per example, to broadcast.

        Args:
            value: the values.
        """
        return per_example(value, self.x)

    def excess(self, slack: float = SLACK) -> Float[Tensor, "B *D"]:
        """The distance between the target and what it should be, beyond rounding; NaN where sigma is 0.

        Args:
            slack: relative difference that is allowed besides.
        """
        p, q = map(self.per, self.parts)
        if self.prediction_type == "x0":
            wanted, error, size = self.x, torch.zeros_like(self.x), self.x.abs()
        else:
            noise = self.noise
            wanted, error = p * self.x + q * noise, q.abs() * self.noise_error
            size = (p * self.x).abs() + (q * noise).abs()
        tolerance = error + (ROUNDINGS * self.unit + slack) * size + ROUNDINGS * self.tiny * (1 + q.abs())
        return (self.target - wanted).abs() - tolerance

    def fits(self, slack: float = SLACK, share: float = 1.0) -> bool:
        """True if the target is what it should be, to rounding, wherever sigma is not 0.

        Args:
            slack: relative difference that is allowed besides.
            share: of the numbers for which this must hold.
        """
        # written so that NaN and infinity of a wrong hypothesis do not fit
        good = (self.excess(slack) <= 0) | self.per(self.sigma == 0)
        return float(good.double().mean()) >= share and bool((self.sigma != 0).any())


def rounding(computed: Iterable[Tensor], given: Iterable[Tensor | float]) -> tuple[float, float]:
    """Unit roundoff and smallest number of the coarsest type that took part.

    Args:
        computed: x_t and target. Values that fit a coarser type than their own were rounded to that.
        given: alpha and sigma.
    """
    types = [value.dtype for value in given if isinstance(value, Tensor)]
    for value in computed:
        narrower = (
            t for t in (torch.bfloat16, torch.float16, torch.float32) if torch.equal(value.to(t).to(value), value)
        )
        types.append(next(narrower, value.dtype))
    limits = [torch.finfo(dtype) for dtype in types]
    return max(limit.eps for limit in limits) / 2, max(limit.smallest_normal * limit.eps for limit in limits)


def check_call(loop: Loop, noisy: NoisyBatch, references: TargetEstimator, default_rates: bool) -> None:
    """Refuse arguments of a call that contradict one another.

    Args:
        loop: what was handed in.
        noisy: the same as a batch.
        references: what it is to be averaged over.
        default_rates: True if the derivatives of alpha and sigma are -1 and 1 by default.

    Raises:
        ValueError: the prediction type is a velocity, alpha + sigma is not 1, and the derivatives are missing; sigma is
            0 for every example; the target is not of the prediction type; the mean square of (x_t - alpha x) / sigma is
            not 1; an index is out of range, or does not count the references; or a statistic of every reference is
            above, or below, that of every example, such as [0, 1] beside [-1, 1].
    """
    off = float((loop.alpha + loop.sigma - 1).abs().max())
    if loop.prediction_type == "velocity" and default_rates and off > 1e-5 + 16 * loop.unit:
        raise ValueError(
            "a velocity needs d_alpha= and d_sigma=, the derivatives of alpha and sigma with respect to t, because "
            f"alpha + sigma is not 1 (off by {off:.3g})"
        )
    if not bool((loop.sigma > 0).any()):
        raise ValueError("sigma is 0 for every example: x_t holds no noise")
    _check_target(loop)
    _check_noise(loop)
    if isinstance(references, Drawn):
        _check_order(noisy, references)
    if isinstance(references, References):
        _check_references(noisy, references)


def _check_target(loop: Loop) -> None:
    """Refuse a target that is not of the prediction type, and name the type, sign or process that fits."""
    if loop.fits():
        return
    excess = torch.where(loop.per(loop.sigma == 0), 0.0, loop.excess()).flatten(1).amax(1)
    example = int(excess.argmax())
    raise ValueError(
        f"the target is not what prediction_type={loop.prediction_type!r} means for this x, x_t, alpha and sigma: "
        f"example {example} is off by {float(excess[example]):.3g} beyond rounding. {_what_fits(loop)}"
    )


def _check_noise(loop: Loop) -> None:
    """Refuse an x_t whose noise has another level than sigma."""
    found = _mean_square(loop)
    if found is None or found[1] <= found[0] <= found[2]:
        return
    others = [name for name, other in _variants(loop) if _is_one(other)]
    way = f"It is 1 with {' or '.join(others)}." if others else "Check that x, x_t, alpha and sigma are of one step."
    raise ValueError(
        f"the mean square of (x_t - alpha x) / sigma is {found[0]:.4g}, and for x_t = alpha x + sigma noise it is "
        f"between {found[1]:.4g} and {found[2]:.4g}: alpha, sigma or x is another than that of x_t. {way}"
    )


def _check_references(noisy: NoisyBatch, references: References) -> None:
    """Refuse references that are not draws of the distribution of x."""
    label = torch.full_like(noisy.sigma, NULL_LABEL).long() if noisy.label is None else noisy.label
    values, counts = label.unique(return_counts=True)
    ours, theirs, log_chance = [], [], 0.0
    for value in values[counts.argsort(descending=True, stable=True)[:CLASSES]].tolist():
        chosen = label == value
        x, others = noisy.x[chosen], references.others(noisy, value)
        if others is None:
            continue
        if others.shape[1:] != x.shape[1:]:
            raise ValueError(f"references have shape {tuple(others.shape[1:])}, but examples {tuple(x.shape[1:])}")
        distinct = len(x) if noisy.index is None else len(noisy.index[chosen].unique())
        log_chance += _log_chance(distinct, len(others))
        ours.append(_statistics(x))
        theirs.append(_statistics(others))
    if log_chance > math.log(CHANCE):
        return
    for k, name in enumerate(("mean", "minimum", "maximum", "mean square")):
        pairs = [(mine[k], other[k]) for mine, other in zip(ours, theirs, strict=True)]
        below, above = ([m.max() < o.min() for m, o in pairs], [m.min() > o.max() for m, o in pairs])
        if all(below) or all(above):
            mine, other = (torch.cat(each) for each in zip(*pairs, strict=True))
            raise ValueError(
                f"the references are not scaled as x: their {name} is between {float(other.min()):.4g} and "
                f"{float(other.max()):.4g} each, that of the examples between {float(mine.min()):.4g} and "
                f"{float(mine.max()):.4g}. Give both the same preprocessing, for example with transform="
            )


def _check_order(noisy: NoisyBatch, references: Drawn) -> None:
    """Refuse an index that does not count the references: by labels, and by examples equal to references."""
    if noisy.index is None or references.by_value:
        return
    index, total = noisy.index.cpu(), len(references.pool)
    if ((index < 0) | (index >= total)).any():
        beyond = int(index[(index < 0) | (index >= total)][0])
        raise ValueError(f"index {beyond} is out of range: there are {total} references, one per data point")
    theirs = references.pool.label(index)
    if noisy.label is not None and theirs is not None:
        label = noisy.label.cpu()
        if (wrong := (label != theirs.cpu()) & (label != NULL_LABEL)).any():
            b = int(wrong.nonzero()[0])
            raise ValueError(
                f"example {b} has label {int(label[b])}, but the reference of its index {int(index[b])} has label "
                f"{int(theirs[b])}: index must count the data set in the order of the references"
            )
    draw = references.pool.draw(1024, NULL_LABEL, torch.Generator().manual_seed(0))
    own, other = (references.take(part, noisy.x.device).to(noisy.x.dtype) for part in (index, draw))
    if own.shape != noisy.x.shape:
        raise ValueError(f"references have shape {tuple(own.shape[1:])}, but examples {tuple(noisy.x.shape[1:])}")
    if (own == noisy.x).flatten(1).all(1).any():
        return
    equal = hash_of(noisy.x)[:, None] == hash_of(other)
    if equal.any():
        b, k = equal.nonzero()[0].tolist()
        raise ValueError(
            f"example {b} with index {int(index[b])} is equal to reference {int(draw[k])}, and no example to the "
            "reference of its own index: index must count the data set in the order of the references"
        )


def _what_fits(loop: Loop) -> str:
    """The change of a call with which its target fits."""
    for slack, share in ((SLACK, 1.0), (0.05, 0.95)):  # sqrt(1 - alpha^2) loses digits where alpha is nearly 1
        for name, other in _hypotheses(loop):
            if other.fits(slack, share):
                return f"It fits {name}."
    return "No other prediction type fits either: check that x, x_t, alpha, sigma and target are of one step."


def _hypotheses(loop: Loop) -> Iterator[tuple[str, Loop]]:
    """Likely mistakes, the likeliest first."""
    for name, same in (("", loop), *((f" with {name}", other) for name, other in _variants(loop))):
        for kind in (loop.prediction_type, *(k for k in PREDICTION_TYPES if k != loop.prediction_type)):
            typed = replace(same, prediction_type=kind)
            yield f"prediction_type={kind!r}{name}", typed
            opposite = "d_alpha=1, d_sigma=-1 (t = 1 is data)" if kind == "velocity" else "the opposite sign"
            if kind == "velocity" and not bool((loop.d_alpha == -1).all()):
                opposite = "d_alpha and d_sigma of opposite sign"
            yield f"prediction_type={kind!r}{name} and {opposite}", replace(typed, target=-loop.target)


def _variants(loop: Loop) -> Iterator[tuple[str, Loop]]:
    """Likely mistakes in alpha and sigma."""
    a, s, one = loop.alpha, loop.sigma, torch.ones_like(loop.alpha)
    scale = (1 + s.square()).rsqrt()
    for name, alpha, sigma in (
        ("alpha and sigma exchanged (or time reversed)", s, a),
        ("the square root of alpha and sigma (what was passed are squares)", a.sqrt(), s.sqrt()),
        ("the square root of alpha (what was passed is its square)", a.sqrt(), s),
        ("the square root of sigma (what was passed is the variance)", a, s.sqrt()),
        ("alpha = 1", one, s),
        ("alpha = sqrt(1 - sigma^2)", (1 - s.square()).sqrt(), s),
        ("alpha = 1 - sigma", 1 - s, s),
        ("sigma = sqrt(1 - alpha^2)", a, (1 - a.square()).sqrt()),
        ("sigma = 1 - alpha", a, 1 - a),
        ("alpha and sigma divided by sqrt(1 + sigma^2) (pass x_t as it is before scale_model_input)", scale, s * scale),
    ):
        if not (torch.equal(alpha, a) and torch.equal(sigma, s)):
            yield name, replace(loop, alpha=alpha, sigma=sigma)


def _mean_square(loop: Loop) -> tuple[float, float, float] | None:
    """Mean square of the noise and its limits, over examples whose rounding leaves something to see."""
    error = ROUNDINGS * (loop.unit * (loop.per(loop.alpha) * loop.x).abs() + loop.tiny) / loop.per(loop.sigma)
    # chosen without looking at the noise
    clear = (loop.sigma > 0) & (error.flatten(1).square().mean(1).sqrt() < 0.25)
    if not clear.any():
        return None
    noise = loop.noise[clear]
    rounding = float(loop.noise_error[clear].square().mean().sqrt())
    spread = 2 / (9 * noise.numel())
    low, high = (max(0.0, 1 - spread + z * math.sqrt(spread)) ** 1.5 for z in (-Z, Z))  # of the root mean square
    low, high = max(0.0, low * (1 - SLACK) - rounding), high * (1 + SLACK) + rounding
    return float(noise.square().mean()), low**2, high**2


def _is_one(loop: Loop) -> bool:
    found = _mean_square(loop)
    return found is not None and found[1] <= found[0] <= found[2]


def _log_chance(examples: int, references: int) -> float:
    """Logarithm of B! n! / (B + n)!."""
    return math.lgamma(examples + 1) + math.lgamma(references + 1) - math.lgamma(examples + references + 1)


def _statistics(x: Float[Tensor, "n *D"]) -> Float[Tensor, "4 n"]:
    """Mean, minimum, maximum and mean square of each example."""
    rows = x.detach().double().flatten(1)
    return torch.stack([rows.mean(1), rows.amin(1), rows.amax(1), rows.square().mean(1)])
