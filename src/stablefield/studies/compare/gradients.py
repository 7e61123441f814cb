"""Variance of the gradient of one step at fixed weights, and the part of it that is due to the target.

For a batch of x_t, let g(T) be the gradient of the loss with targets T. It is linear in T, and every target of this
package is unbiased given x_t. With E = E[x | x_t], therefore

    Tr Cov[g(T)] = Tr Cov[g(E)] + E ||g(T) - g(E)||^2

The first part comes from the choice of the x_t in a batch, and no target can lower it. The second part comes from the
target, and is zero for the exact one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.objective import Objective
from stablefield.process import NoisyBatch, per_example
from stablefield.seeding import generator


@dataclass(frozen=True)
class GradientVariance:
    """Second moments of the gradient of a batch, summed over all weights.

    Attributes:
        total: Tr Cov of the gradient.
        target: the part of it that is due to the target, E ||g(T) - g(E)||^2.
        squared_mean: ||E g||^2, estimated without bias; it may be negative where the noise is large.
    """

    total: float
    target: float
    squared_mean: float


def gradient_variance(
    denoiser: Denoiser, objective: Objective, batches: Sequence[tuple[NoisyBatch, Tensor]]
) -> GradientVariance:
    """Estimate the variance of the gradient over several batches.

    Args:
        denoiser: the denoiser, evaluated without dropout; its weights do not change.
        objective: loss weight and target; the target is drawn anew for each batch.
        batches: at least two batches, each with its exact posterior means (B, *D).
    """
    weights: list[Tensor] = [p for p in denoiser.parameters() if p.requires_grad]
    mean = [torch.zeros_like(p, dtype=torch.float64) for p in weights]
    square = target = 0.0
    was_training = denoiser.training
    denoiser.eval()
    for number, (noisy, exact) in enumerate(batches):
        x0 = denoiser(noisy.x_t, noisy.t, noisy.label, noisy.augment_label)
        drawn = objective.target(noisy, generator=generator(0, "gradient", number)).mean
        factor = per_example(objective.weight(denoiser.process, noisy.t), x0) * 2 / x0.numel()
        pullback = _pullback(x0, weights)
        for total, g in zip(mean, gradient := pullback(factor * (x0.detach() - drawn)), strict=True):
            total += g.double() / len(batches)
        square += _square(gradient) / len(batches)
        target += _square(pullback(factor * (exact - drawn))) / len(batches)
    denoiser.train(was_training)
    variance = (square - _square(mean)) * len(batches) / (len(batches) - 1)
    return GradientVariance(variance, target, square - variance)


def _pullback(x0: Tensor, weights: list[Tensor]) -> Callable[[Tensor], list[Tensor]]:
    """Map from the gradient with respect to the denoiser's output to that with respect to its weights."""

    def pullback(cotangent: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(x0, weights, cotangent.to(x0), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(weights, gradients, strict=True)]

    return pullback


def _square(tensors: list[Tensor]) -> float:
    """Sum of the squares of all elements."""
    return float(sum(t.double().square().sum() for t in tensors))
