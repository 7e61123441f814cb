"""How likely data are under a denoiser: its probability-flow ODE, run from the data to the noise.

    log p(x) = log N(z; 0, sigma^2) + integral of div v dt,      dx/dt = v(x, t) from x up to z

(Song et al. 2021, section 4.3 and appendix D.2). The divergence of v = alpha' D + sigma' (x - alpha D) / sigma is that
of the denoiser D, but for factors: it is had exactly from as many vector-Jacobian products as there are dimensions,
or without bias from a few with random signs (Hutchinson 1990; Grathwohl et al. 2019).

Data are integers u in 0 .. levels - 1, scaled to x = 2 u / (levels - 1) - 1: each stands for a bin of width
2 / (levels - 1) around it. The density is asked at a uniform point of the bin, so that

    bits per dimension = -log2 p(x + bin (U - 1/2)) / dim - log2 bin

is, on average, an upper bound of what it takes to store u (Theis et al. 2016, section 3.1).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.sample.adaptive import integrate
from stablefield.sample.base import Question


@torch.no_grad()
def bits_per_dim(
    denoiser: Denoiser,
    x: Tensor,
    *,
    levels: int | None = 256,
    label: Int[Tensor, "B"] | None = None,
    seeds: Sequence[int] | None = None,
    probes: int | None = 1,
    tolerance: float = 1e-5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Float[Tensor, "B"]:
    """Negative log-likelihood of each datum, in bits per dimension of the discrete data.

    Args:
        denoiser: whose model it is; it must be differentiable in x_t.
        x: data (B, *D), either integers 0 .. levels - 1, or those scaled to [-1, 1].
        levels: how many values a number can take: 256 in photographs, 17 in scikit-learn's digits. None for data that
            are continuous: then the bits of their density.
        label: the class of each, for denoisers that know classes.
        seeds: one for each datum, of its place within the bin and its probes; by default 0, 1, ...
        probes: random directions for the divergence; None makes it exact, by one a dimension.
        tolerance: relative and absolute error allowed in a step of the solver.
        sigma_min: noise level sigma / alpha that stands for no noise.
        sigma_max: noise level at which nothing but noise is left.

    Raises:
        ValueError: data that do not lie on the levels, a wrong number of seeds, or a denoiser without gradients.
    """
    seeds = range(len(x)) if seeds is None else seeds
    if len(seeds) != len(x):
        raise ValueError(f"{len(x)} data need as many seeds, not {len(seeds)}")
    generators = [torch.Generator(x.device).manual_seed(seed % 2**32) for seed in seeds]
    width = 1.0 if levels is None else 2 / (levels - 1)
    data = x.double() if levels is None else _dequantised(x, levels, generators)
    flow = _Flow(Question(denoiser, label), data.shape, _probes(data, probes, generators))

    known = max(sigma_min, denoiser.levels[0]), min(sigma_max, denoiser.levels[1])
    start, end = denoiser.process.time(torch.tensor(known, dtype=torch.float64))
    alpha, sigma = denoiser.process.scales(torch.stack([start, end]))
    # the model of x is that of alpha x at the first noise level; the last column gathers the divergence
    begin = torch.nn.functional.pad(alpha[0] * data.flatten(1), (0, 1))
    latent = integrate(flow, begin, start, end, tolerance)

    normal = -0.5 * (latent[:, :-1] / sigma[1]).square().mean(1) - sigma[1].log() - 0.5 * math.log(2 * math.pi)
    log_density = normal + latent[:, -1] + alpha[0].log()
    return -log_density / math.log(2) - math.log2(width)


class _Flow:
    """d(x, l)/dt along the probability-flow ODE, l gathering its divergence per dimension. Rows are flat."""

    def __init__(self, ask: Question, shape: torch.Size, probes: Float[Tensor, "P B *D"]) -> None:
        self.ask, self.shape, self.probes = ask, shape, probes

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        (alpha, sigma), (d_alpha, d_sigma) = self.ask.process.scales(t), self.ask.process.rates(t)
        x = state[:, :-1].reshape(self.shape)
        x0, trace = self._denoised(x, t)
        drift = d_alpha * x0 + d_sigma * (x - alpha * x0) / sigma
        divergence = d_sigma / sigma + (d_alpha - d_sigma * alpha / sigma) * trace / x[0].numel()
        return torch.cat([drift.flatten(1), divergence[:, None]], 1)

    @torch.enable_grad()
    def _denoised(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x | x_t] and the trace of its Jacobian."""
        x = x.detach().requires_grad_()
        x0 = self.ask(x, t)
        if not x0.requires_grad:
            raise ValueError(f"{type(self.ask.denoiser).__name__} gives no gradients, so its flow has no divergence")
        trace = x.new_zeros(len(x))
        for probe in self.probes:
            (row,) = torch.autograd.grad(x0, x, probe, retain_graph=True)
            trace = trace + (row * probe).flatten(1).sum(1)
        return x0.detach(), trace.detach()


def _probes(x: Tensor, number: int | None, generators: list[torch.Generator]) -> Float[Tensor, "P B *D"]:
    """Directions whose squared components sum to the trace: random signs, or the axes."""
    if number is None:
        axes = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        return axes.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    if number < 1:
        raise ValueError(f"the divergence needs at least 1 probe, not {number}; None makes it exact")
    size = (number, *x.shape[1:])
    drawn = [torch.randint(2, size, generator=g, device=x.device) for g in generators]
    return (2 * torch.stack(drawn, 1) - 1).to(x.dtype) / number**0.5


def _dequantised(x: Tensor, levels: int, generators: list[torch.Generator]) -> Tensor:
    """A uniform point of the bin around each number, in [-1, 1] plus half a bin."""
    scaled = x.double()
    integers = (scaled + 1) * (levels - 1) / 2 if x.is_floating_point() else scaled
    if ((integers - integers.round()).abs() > 1e-2).any() or integers.min() < -0.5 or integers.max() > levels - 0.5:
        raise ValueError(
            f"data do not lie on {levels} levels from -1 to 1: say how many values they take, or None if continuous"
        )
    shape = x.shape[1:]
    places = [torch.rand(shape, generator=g, dtype=scaled.dtype, device=x.device) for g in generators]
    return 2 * (integers.round() + torch.stack(places) - 0.5) / (levels - 1) - 1
