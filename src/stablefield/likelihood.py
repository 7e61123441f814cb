"""Likelihood of data under a denoiser, by the instantaneous change of variables along the probability-flow ODE.

    log p(x) = log N(z; 0, sigma^2) + integral of div v dt,      dx/dt = v(x, t) from x up to z

(Song et al. 2021, section 4.3 and appendix D.2). The divergence of v = alpha' D + sigma' (x - alpha D) / sigma follows
from that of the denoiser D, which is computed exactly by one vector-Jacobian product per dimension, or estimated
without bias by a few with random signs (Hutchinson 1990; Grathwohl et al. 2019).

Quantized data are integers u in 0 .. num_levels - 1, scaled to x = 2 u / (num_levels - 1) - 1: each stands for a bin
of width 2 / (num_levels - 1) around it. The density is evaluated at a uniform point of the bin (dequantization), so
that

    bits per dimension = -log2 p(x + bin (U - 1/2)) / dim - log2 bin

is, on average, an upper bound on the bits needed to store u (Theis et al. 2016, section 3.1).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.precision import arithmetic, autocast
from stablefield.sample.adaptive import integrate
from stablefield.sample.base import BoundDenoiser


@torch.no_grad()
def bits_per_dim(
    denoiser: Denoiser,
    x: Tensor,
    *,
    num_levels: int | None = 256,
    label: Int[Tensor, "B"] | None = None,
    seeds: Sequence[int] | None = None,
    probes: int | None = 1,
    tolerance: float = 1e-5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    precision: str = "float32",
) -> Float[Tensor, "B"]:
    """Negative log-likelihood of each example, in bits per dimension.

    Args:
        denoiser: the model; it must be differentiable in x_t.
        x: data (B, *D), either integers 0 .. num_levels - 1 or their values scaled to [-1, 1].
        num_levels: number of values of quantized data: 256 for 8-bit images, 17 for scikit-learn's digits. None for
            continuous data, whose density is returned.
        label: class of each example, for denoisers with classes.
        seeds: seed of each example's dequantization and probes; by default 0, 1, ...
        probes: number of random directions that estimate the divergence; None computes it exactly.
        tolerance: relative and absolute error allowed in a step of the solver.
        sigma_min: noise level sigma / alpha at which the integration starts, instead of 0.
        sigma_max: noise level sigma / alpha at which the distribution is taken to be Gaussian.
        precision: arithmetic of the network (see `stablefield.precision`); the ODE is solved in float64. The solver
            takes smaller steps to follow rounding, so that half precision may need a larger tolerance.

    Raises:
        ValueError: the precision is unknown, the data are not on the given levels, the number of seeds is not that of
            the data, or the denoiser is not differentiable.
    """
    seeds = range(len(x)) if seeds is None else seeds
    if len(seeds) != len(x):
        raise ValueError(f"need one seed per example: {len(x)}, not {len(seeds)}")
    generators = [torch.Generator(x.device).manual_seed(seed % 2**32) for seed in seeds]
    bin_width = 1.0 if num_levels is None else 2 / (num_levels - 1)
    data = x.double() if num_levels is None else _dequantized(x, num_levels, generators)
    flow = _Flow(BoundDenoiser(denoiser, label), data.shape, _probes(data, probes, generators))

    ends = max(sigma_min, denoiser.noise_range[0]), min(sigma_max, denoiser.noise_range[1])
    start, end = denoiser.process.time(torch.tensor(ends, dtype=torch.float64))
    alpha, sigma = denoiser.process.scales(torch.stack([start, end]))
    # the model of x is that of alpha x at the first noise level; the last column integrates the divergence
    begin = torch.nn.functional.pad(alpha[0] * data.flatten(1), (0, 1))
    with arithmetic(precision), autocast(precision, x.device):
        latent = integrate(flow, begin, start, end, tolerance)

    normal = -0.5 * (latent[:, :-1] / sigma[1]).square().mean(1) - sigma[1].log() - 0.5 * math.log(2 * math.pi)
    log_density = normal + latent[:, -1] + alpha[0].log()
    return -log_density / math.log(2) - math.log2(bin_width)


class _Flow:
    """The velocity d(x, l)/dt of the probability-flow ODE, where l integrates its divergence per dimension.

    The state has one flat row per example: the entries of x, then l.
    """

    def __init__(self, denoiser: BoundDenoiser, shape: torch.Size, probes: Float[Tensor, "P B *D"]) -> None:
        self.denoiser, self.shape, self.probes = denoiser, shape, probes

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        process = self.denoiser.process
        (alpha, sigma), (d_alpha, d_sigma) = process.scales(t), process.rates(t)
        x = state[:, :-1].reshape(self.shape)
        x0, trace = self._x0_and_trace(x, t)
        velocity = d_alpha * x0 + d_sigma * (x - alpha * x0) / sigma
        divergence = d_sigma / sigma + (d_alpha - d_sigma * alpha / sigma) * trace / x[0].numel()
        return torch.cat([velocity.flatten(1), divergence[:, None]], 1)

    @torch.enable_grad()
    def _x0_and_trace(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x | x_t] and the trace of its Jacobian."""
        x = x.detach().requires_grad_()
        x0 = self.denoiser(x, t)
        if not x0.requires_grad:
            raise ValueError(
                f"{type(self.denoiser.denoiser).__name__} is not differentiable in x_t, as likelihoods require"
            )
        trace = x.new_zeros(len(x))
        for probe in self.probes:
            (product,) = torch.autograd.grad(x0, x, probe, retain_graph=True)
            trace = trace + (product * probe).flatten(1).sum(1)
        return x0.detach(), trace.detach()


def _probes(x: Tensor, number: int | None, generators: list[torch.Generator]) -> Float[Tensor, "P B *D"]:
    """Directions p for which the sum of p^T J p is the trace of J (or has it as mean): the axes, or random signs."""
    if number is None:
        axes = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        return axes.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    if number < 1:
        raise ValueError(f"the divergence needs at least 1 probe, not {number}; None computes it exactly")
    size = (number, *x.shape[1:])
    bits = [torch.randint(2, size, generator=g, device=x.device) for g in generators]
    return (2 * torch.stack(bits, 1) - 1).to(x.dtype) / number**0.5


def _dequantized(x: Tensor, num_levels: int, generators: list[torch.Generator]) -> Tensor:
    """A uniform point of the bin around each value, in [-1, 1] plus half a bin."""
    scaled = x.double()
    integers = (scaled + 1) * (num_levels - 1) / 2 if x.is_floating_point() else scaled
    off_grid = ((integers - integers.round()).abs() > 1e-2).any()
    if off_grid or integers.min() < -0.5 or integers.max() > num_levels - 0.5:
        raise ValueError(
            f"data do not lie on {num_levels} levels from -1 to 1: set num_levels (None for continuous data)"
        )
    shape = x.shape[1:]
    offsets = [torch.rand(shape, generator=g, dtype=scaled.dtype, device=x.device) for g in generators]
    return 2 * (integers.round() + torch.stack(offsets) - 0.5) / (num_levels - 1) - 1
