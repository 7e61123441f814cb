"""Closed-form denoisers of Gaussian data and of a mixture of Gaussians, the references for samplers and likelihoods."""

import torch
from torch import Tensor

from stablefield import VE, VP, Cosine, Denoiser, Flow, SubVP
from stablefield.process import Process, per_example

PROCESSES: list[Process] = [VE(), VP(), SubVP(), Cosine(), Flow()]
MEAN = torch.tensor([0.4, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.25, 0.1], [0.1, 0.09]], dtype=torch.float64)


class Gaussian(Denoiser):
    """E[x | x_t] of x ~ N(mean, covariance): mean + alpha C (alpha^2 C + sigma^2)^-1 (x_t - alpha mean)."""

    def __init__(self, process: Process, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> None:
        super().__init__()
        self.process, self.mean, self.covariance = process, mean, covariance
        self.variances, self.axes = torch.linalg.eigh(covariance)

    def forward(self, x_t, t, label=None, augment_label=None):
        alpha, sigma = (per_example(scale, x_t) for scale in self.process.scales(t))
        shrink = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        return self.mean + shrink * ((x_t - alpha * self.mean) @ self.axes) @ self.axes.T

    def flow(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Solution of the probability-flow ODE from x at time t to time s: along each axis at constant quantile."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.process.scales(t), self.process.scales(s)
        variance_ratio = (alpha_s**2 * self.variances + sigma_s**2) / (alpha_t**2 * self.variances + sigma_t**2)
        return alpha_s * self.mean + variance_ratio.sqrt() * ((x - alpha_t * self.mean) @ self.axes) @ self.axes.T

    def log_density(self, x: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(self.mean, self.covariance).log_prob(x)


class Mixture(Denoiser):
    """E[x | x_t] of a mixture of two isotropic Gaussians N(mean_k, std^2) of equal weight."""

    means = torch.tensor([[0.5, 0.3], [-0.4, 0.1]], dtype=torch.float64)
    std = 0.2

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process

    def forward(self, x_t, t, label=None, augment_label=None):
        alpha, sigma = self.process.scales(t)
        variance = alpha**2 * self.std**2 + sigma**2
        distance = x_t[:, None] - alpha[:, None, None] * self.means
        weight = torch.softmax(-distance.square().sum(-1) / (2 * variance[:, None]), 1)[..., None]
        return (weight * (self.means + (alpha * self.std**2 / variance)[:, None, None] * distance)).sum(1)

    @property
    def mean(self) -> Tensor:
        return self.means.mean(0)

    @property
    def covariance(self) -> Tensor:
        centred = self.means - self.mean
        return centred.T @ centred / len(centred) + self.std**2 * torch.eye(2, dtype=torch.float64)
