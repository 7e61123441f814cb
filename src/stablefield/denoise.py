"""The question a diffusion model answers: what was x on average, given x_t?

    D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise)

`Preconditioned` lets a network F answer, with the scalings that give it inputs and targets of unit variance;
`Ideal` answers from the data themselves, with no network at all.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stablefield.posterior import chunk_size, stream
from stablefield.process import Process, per_row
from stablefield.reference import ALL, Pool


class Denoiser(nn.Module, ABC):
    """Answers E[x | x_t] for the process it was made for.

    Attributes:
        process: how x became x_t.
        label_dim: how many classes may be asked for; 0 if it knows none.
    """

    process: Process
    label_dim: int = 0

    @abstractmethod
    def forward(
        self,
        x_t: Float[Tensor, "B *D"],
        t: Float[Tensor, "B"],
        label: Int[Tensor, "B"] | None = None,
        augment_label: Float[Tensor, "B A"] | None = None,
    ) -> Float[Tensor, "B *D"]:
        """E[x | x_t], given the class where `label` tells one (-1 or None: not told)."""


class Scaling(ABC):
    """What surrounds the network: how its input is scaled, and how its output becomes E[x | x_t]."""

    @abstractmethod
    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise), shaped like sigma."""


@dataclass(frozen=True)
class EDM(Scaling):
    """EDM's scalings (Karras et al. 2022, table 1), for any process.

    x_t / alpha is data plus noise of level sigma / alpha; EDM's formulas there, multiplied out, are finite at alpha = 0
    too. Input and training target of the network have unit variance at every t if the data have variance sigma_data^2.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < float("inf"):
            raise ValueError(f"sigma_data must be positive and finite, not {self.sigma_data}")

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        variance = sigma**2 + (alpha * self.sigma_data) ** 2
        c_noise = (sigma / alpha).clamp(1e-6, 1e6).log() / 4
        return (
            alpha * self.sigma_data**2 / variance,
            sigma * self.sigma_data / variance.sqrt(),
            variance.rsqrt(),
            c_noise,
        )


class Preconditioned(Denoiser):
    """A network with scalings around it.

    Args:
        network: called as network(x, c_noise), and with `label` (one-hot, or zeros where nothing is told) if
            label_dim > 0, and with `augment` if augmentation labels are given.
        process: how x became x_t.
        scaling: the four numbers around the network.
        label_dim: how many classes the network knows.
    """

    def __init__(self, network: nn.Module, process: Process, scaling: Scaling, label_dim: int = 0) -> None:
        super().__init__()
        self.network, self.process, self.scaling, self.label_dim = network, process, scaling, label_dim

    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        x = x_t.to(next(self.parameters()).dtype)
        c_skip, c_out, c_in, c_noise = self.scaling(*self.process.scales(t))
        told: dict[str, Tensor] = {}
        if self.label_dim:
            told["label"] = one_hot(label, self.label_dim, x)
        if augment_label is not None:
            told["augment"] = augment_label.to(x.dtype)
        answer = self.network(per_row(c_in, x) * x, c_noise.to(x.dtype), **told)
        return per_row(c_skip, x) * x + per_row(c_out, x) * answer.to(x.dtype)

    def extra_repr(self) -> str:
        return f"process={self.process}, scaling={self.scaling}, label_dim={self.label_dim}"


class Ideal(Denoiser):
    """The exact E[x | x_t] when x is a member of a pool: the minimiser of every unbiased training loss."""

    def __init__(self, pool: Pool, process: Process) -> None:
        super().__init__()
        self.pool, self.process, self.label_dim = pool, process, pool.classes

    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        alpha, sigma = self.process.scales(t)
        if label is None:
            return self._mean(x_t, alpha, sigma, ALL)
        answer = torch.empty_like(x_t)
        for told in label.unique().tolist():
            rows = label == told
            answer[rows] = self._mean(x_t[rows], alpha[rows], sigma[rows], told)
        return answer

    def _mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, label: int) -> Tensor:
        blocks = ((block, None) for block in self.pool.blocks(label, chunk_size(x_t)))
        return stream(x_t, blocks, sigma=sigma, alpha=alpha).mean


def one_hot(label: Int[Tensor, "B"] | None, classes: int, like: Tensor) -> Float[Tensor, "B L"]:
    """Labels as the rows of a matrix in the type of `like`; zeros for -1, or where none are given.

    Raises:
        ValueError: a label beyond the classes.
    """
    if label is None:
        return torch.zeros(len(like), classes, dtype=like.dtype, device=like.device)
    if (unknown := (label < -1) | (label >= classes)).any():
        raise ValueError(f"no class {label[unknown][0].item()}: there are {classes} classes, from 0")
    return (label[:, None] == torch.arange(classes, device=label.device)).to(like.device, like.dtype)
