"""How much the gradient of one step varies, at fixed weights, and how much of that is the target's doing.

For a batch of x_t, let g(T) be the gradient of the loss with targets T. It is linear in T, and every target of ours is
unbiased given x_t, so with E = E[x | x_t]

    Tr Cov[g(T)] = Tr Cov[g(E)] + E ||g(T) - g(E)||^2

The first part is due to which x_t a batch happens to hold, and no target can lower it; the second is the target's, and
is nil for the exact one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.objective import Objective
from stablefield.process import Perturbed, per_row
from stablefield.seeding import generator


@dataclass(frozen=True)
class GradientVariance:
    """Squares of the gradient, summed over all weights.

    Attributes:
        total: Tr Cov of one batch's gradient.
        target: the part that is due to the target.
        squared_mean: ||E g||^2, estimated without bias; it may come out below 0 where the noise is large.
    """

    total: float
    target: float
    squared_mean: float


def gradient_variance(
    denoiser: Denoiser, objective: Objective, batches: Sequence[tuple[Perturbed, Tensor]], seed: int = 0
) -> GradientVariance:
    """Over some batches, each with its exact means.

    Args:
        denoiser: its weights stay as they are; without dropout.
        objective: its target is drawn anew for each batch.
        batches: at least two.
        seed: decides the references.
    """
    weights: list[Tensor] = [p for p in denoiser.parameters() if p.requires_grad]
    mean = [torch.zeros_like(p, dtype=torch.float64) for p in weights]
    square = target = 0.0
    was_training = denoiser.training
    denoiser.eval()
    for number, (noisy, exact) in enumerate(batches):
        answer = denoiser(noisy.x_t, noisy.t, noisy.label, noisy.augmentation)
        taught = objective.target(noisy, generator=generator(seed, "gradient", number)).mean
        factor = per_row(objective.weight(denoiser.process, noisy.t), answer) * 2 / answer.numel()
        pull = _gradients(answer, weights)
        for total, g in zip(mean, whole := pull(factor * (answer.detach() - taught)), strict=True):
            total += g.double() / len(batches)
        square += _square(whole) / len(batches)
        target += _square(pull(factor * (exact - taught))) / len(batches)
    denoiser.train(was_training)
    spread = (square - _square(mean)) * len(batches) / (len(batches) - 1)
    return GradientVariance(spread, target, square - spread)


def _gradients(answer: Tensor, weights: list[Tensor]) -> Callable[[Tensor], list[Tensor]]:
    """What becomes of the gradient with respect to the answers: that with respect to the weights."""

    def pull(cotangent: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(answer, weights, cotangent.to(answer), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)]

    return pull


def _square(tensors: list[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors))
