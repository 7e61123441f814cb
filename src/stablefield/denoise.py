"""The question a diffusion model answers: what was x on average, given x_t?

    D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise)

`Preconditioned` lets a network F answer, with a `Scaling` around it: EDM's, those that the VP, VE and iDDPM networks
were published with, or one that makes E[x | x_t] of whatever head the network `Predicts`. `Ideal` answers from the
data themselves, with no network at all; `Guided` leads one answer away from a weaker one.

The published scalings are written for x + level noise. Here they are applied to x_t / alpha, which is just that with
level = sigma / alpha, and multiplied out: so every scaling serves every process, wherever alpha > 0.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stablefield.augmentation import flip, permutes
from stablefield.parametrize import HEADS, coefficients
from stablefield.posterior import chunk_size, stream
from stablefield.process import VP, Process, per_row
from stablefield.reference import ALL, Pool

Range = tuple[float, float]
Scales = tuple[Tensor, Tensor, Tensor, Tensor]  # c_skip, c_out, c_in, c_noise


class Denoiser(nn.Module, ABC):
    """Answers E[x | x_t] for the process it was made for.

    Attributes:
        process: how x became x_t.
        label_dim: how many classes may be asked for; 0 if it knows none.
        levels: the lowest and highest noise level, sigma / alpha, that it can be asked about. Samplers stay between.
    """

    process: Process
    label_dim: int = 0
    levels: Range = (0.0, inf)

    @abstractmethod
    def forward(
        self,
        x_t: Float[Tensor, "B *D"],
        t: Float[Tensor, "B"],
        label: Int[Tensor, "B"] | None = None,
        augment_label: Float[Tensor, "B A"] | None = None,
    ) -> Float[Tensor, "B *D"]:
        """E[x | x_t], given the class where `label` tells one (-1 or None: not told)."""

    def nearest(self, t: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """The closest times that it has answers for: t itself, unless it was trained on a table of noise levels."""
        return t


class Scaling(ABC):
    """What surrounds the network: how its input is scaled, and how its output becomes E[x | x_t]."""

    @abstractmethod
    def __call__(self, process: Process, t: Float[Tensor, "*S"]) -> Scales:
        """(c_skip, c_out, c_in, c_noise), shaped like t."""

    @property
    def levels(self) -> Range:
        """The noise levels sigma / alpha at which the answer is defined, and the network was trained."""
        return 0.0, inf

    def nearest(self, level: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """The closest noise levels that the network knows."""
        return level


@dataclass(frozen=True)
class EDM(Scaling):
    """EDM's scalings (Karras et al. 2022, table 1).

    Multiplied out they are finite at alpha = 0 too. Input and training target of the network have unit variance at
    every t if the data have variance sigma_data^2.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check_positive(sigma_data=self.sigma_data)

    def __call__(self, process: Process, t: Tensor) -> Scales:
        alpha, sigma = process.scales(t)
        variance = sigma**2 + (alpha * self.sigma_data) ** 2
        return (
            alpha * self.sigma_data**2 / variance,
            sigma * self.sigma_data / variance.sqrt(),
            variance.rsqrt(),
            _log_level(alpha, sigma),
        )


@dataclass(frozen=True)
class VPScaling(Scaling):
    """The scalings of VP networks, DDPM++ among them (Song et al. 2021; Karras et al. 2022, table 1).

    The network predicts the noise, and is told 999 t of the VP process whatever the process it is used with.

    Attributes:
        beta_d: growth of beta over the process that the network was trained on.
        beta_min: beta at its start.
        steps: how many times the network was made for; it is told t (steps - 1).
        t_min: the earliest time that it was trained on.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    steps: int = 1000
    t_min: float = 1e-5

    def __call__(self, process: Process, t: Tensor) -> Scales:
        alpha, sigma = process.scales(t)
        level = sigma / alpha
        return 1 / alpha, -level, _unit_input(alpha, sigma), (self.steps - 1) * self._schedule.time(level)

    @property
    def levels(self) -> Range:
        alpha, sigma = self._schedule.scales(torch.tensor([self.t_min, 1.0], dtype=torch.float64))
        low, high = (sigma / alpha).tolist()
        return low, high

    @property
    def _schedule(self) -> VP:
        return VP(self.beta_min, self.beta_d)


@dataclass(frozen=True)
class VEScaling(Scaling):
    """The scalings of VE networks, NCSN++ among them (Song et al. 2021; Karras et al. 2022, table 1).

    The network predicts minus the noise, and is told ln(level / 2).
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __call__(self, process: Process, t: Tensor) -> Scales:
        alpha, sigma = process.scales(t)
        level = sigma / alpha
        return 1 / alpha, level, 1 / alpha, (level / 2).log()

    @property
    def levels(self) -> Range:
        return self.sigma_min, self.sigma_max


@dataclass(frozen=True)
class IDDPMScaling(Scaling):
    """The scalings of improved-DDPM networks, ADM's among them (Nichol & Dhariwal 2021; Karras et al. 2022, table 1).

    The network knows a table of noise levels by number. It may predict variances beside the noise; `Preconditioned`
    leaves them aside.

    Attributes:
        table: its noise levels u_0 > u_1 > ... > u_M = 0. A checkpoint that holds its own should be given here: the
            recursion loses digits, and was run in float32 when the published networks were trained.
    """

    table: tuple[float, ...] = field(default_factory=lambda: iddpm_levels(), repr=False)

    def __call__(self, process: Process, t: Tensor) -> Scales:
        alpha, sigma = process.scales(t)
        level = sigma / alpha
        c_noise = len(self.table) - 2 - self._index(level).to(level.dtype)
        return 1 / alpha, -level, _unit_input(alpha, sigma), c_noise

    @property
    def levels(self) -> Range:
        return self.table[-2], self.table[0]

    def nearest(self, level: Tensor) -> Tensor:
        return _tensor(self.table, level.dtype, level.device)[self._index(level)]

    def _index(self, level: Tensor) -> Tensor:
        return (level.unsqueeze(-1) - _tensor(self.table, level.dtype, level.device)).abs().argmin(-1)


@dataclass(frozen=True)
class Predicts(Scaling):
    """A network that predicts x0, noise, score, velocity or v outright: x0 = (a F - b x_t) / c (see `parametrize`).

    Its input is scaled to unit variance, and it is told the noise level as EDM's networks are. Trained with
    `HeadWeight(head)`, its own squared error is what is minimised.

    Where alpha = 0, noise and score say nothing of x0. Close to there x0 is the difference of large numbers, so these
    two heads are asked only up to level 1000, and training beyond sees a finite number (of no weight).

    Attributes:
        head: what the network predicts.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: there is no such head, or sigma_data is not positive.
    """

    head: str
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check_positive(sigma_data=self.sigma_data)
        if self.head not in HEADS:
            raise ValueError(f"no head is called {self.head!r}; there are {', '.join(HEADS)}")

    def __call__(self, process: Process, t: Tensor) -> Scales:
        alpha, sigma = process.scales(t)
        a, b, c = coefficients(self.head, process, t)
        c = torch.where(c.abs() < 1e-6, torch.full_like(c, 1e-6).copysign(c), c)
        return -b / c, a / c, _unit_input(alpha * self.sigma_data, sigma), _log_level(alpha, sigma)

    @property
    def levels(self) -> Range:
        return (0.0, 1e3) if self.head in ("noise", "score") else (0.0, inf)


def iddpm_levels(steps: int = 1000, c_1: float = 0.001, c_2: float = 0.008) -> tuple[float, ...]:
    """The noise levels u_0 > ... > u_steps = 0 of improved DDPM (Karras et al. 2022, table 1).

    They follow from alpha_bar(j) = sin^2(pi j / (2 steps (c_2 + 1))), with no step's share below c_1:

        u_(j-1) = sqrt((u_j^2 + 1) / max(alpha_bar(j-1) / alpha_bar(j), c_1) - 1)
    """
    j = torch.arange(steps + 1, dtype=torch.float64)
    alpha_bar = (torch.pi / 2 * j / (steps * (c_2 + 1))).sin().square()
    share = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=c_1)
    # 1 + u_(j-1)^2 is the product of 1 / share from j to the end
    return (*(1 / share.flip(0).cumprod(0).flip(0) - 1).sqrt().tolist(), 0.0)


class Preconditioned(Denoiser):
    """A network with scalings around it.

    Args:
        network: called as network(x, c_noise), and with `label` (one-hot, or zeros where nothing is told) if
            label_dim > 0, and with `augment` if augmentation labels are given. Channels beyond those of x are ignored.
        process: how x became x_t.
        scaling: the four numbers around the network.
        label_dim: how many classes the network knows.
    """

    def __init__(self, network: nn.Module, process: Process, scaling: Scaling, label_dim: int = 0) -> None:
        super().__init__()
        self.network, self.process, self.scaling, self.label_dim = network, process, scaling, label_dim
        self.levels = scaling.levels

    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        x = x_t.to(next(self.parameters()).dtype)
        c_skip, c_out, c_in, c_noise = self.scaling(self.process, t)
        told: dict[str, Tensor] = {}
        if self.label_dim:
            told["label"] = one_hot(label, self.label_dim, x)
        if augment_label is not None:
            told["augment"] = augment_label.to(x.dtype)
        answer = self.network(per_row(c_in, x) * x, c_noise.to(x.dtype), **told)
        answer = answer[:, : x.shape[1]].to(x.dtype)  # what comes behind are variances that nobody asks for
        return per_row(c_skip, x) * x + per_row(c_out, x) * answer

    def nearest(self, t: Tensor) -> Tensor:
        alpha, sigma = self.process.scales(t)
        level = self.scaling.nearest(sigma / alpha)
        return torch.where(level == sigma / alpha, t, self.process.time(level))

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
        if augment_label is not None:
            if not permutes(augment_label).all():
                raise ValueError("of augmented data the exact answer is known for flips only")
            return flip(self(flip(x_t, augment_label), t, label), augment_label)
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


class Guided(Denoiser):
    """An answer led away from a weaker one: weak + strength (strong - weak).

    With no `guide` it is classifier-free guidance: the weaker answer is that of the same denoiser, not told the class
    (Ho & Salimans 2022, eq. 6, with strength = 1 + w). A smaller or less trained `guide` makes it autoguidance (Karras
    et al. 2024, eq. 5), one without classes classifier-free guidance by a network of its own. Each question costs two
    evaluations of a network.

    Args:
        denoiser: whose answers are meant.
        strength: 1 leaves them as they are, 0 is the weaker answer.
        guide: the weaker denoiser.
        interval: noise levels sigma / alpha, the upper one included, between which guidance acts (Kynkäänniemi et al.
            2024).

    Raises:
        ValueError: nothing to guide by, or a guide for another process.
    """

    def __init__(
        self, denoiser: Denoiser, strength: float, guide: Denoiser | None = None, interval: Range = (0.0, inf)
    ) -> None:
        super().__init__()
        if guide is None and not denoiser.label_dim:
            raise ValueError("a denoiser without classes cannot guide itself: give a weaker one as its guide")
        if guide is not None and guide.process != denoiser.process:
            raise ValueError(f"the guide was made for {guide.process}, the denoiser for {denoiser.process}")
        self.denoiser, self.strength, self.guide, self.interval = denoiser, strength, guide, interval
        self.process, self.label_dim = denoiser.process, denoiser.label_dim
        ranges = [asked.levels for asked in (denoiser, guide) if asked is not None]
        self.levels = max(low for low, _ in ranges), min(high for _, high in ranges)

    def forward(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, augment_label: Tensor | None = None
    ) -> Tensor:
        alpha, sigma = self.process.scales(t)
        level, (low, high) = sigma / alpha, self.interval
        extra = torch.where((low < level) & (level <= high), self.strength - 1.0, 0.0)
        strong = self.denoiser(x_t, t, label, augment_label)
        return strong + per_row(extra, strong) * (strong - self._weak(x_t, t, label, augment_label))

    def nearest(self, t: Tensor) -> Tensor:
        return self.denoiser.nearest(t)

    def extra_repr(self) -> str:
        return f"strength={self.strength}, interval={self.interval}"

    def _weak(self, x_t: Tensor, t: Tensor, label: Tensor | None, augment_label: Tensor | None) -> Tensor:
        if self.guide is None:
            return self.denoiser(x_t, t, None, augment_label)
        return self.guide(x_t, t, label if self.guide.label_dim else None, augment_label)


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


def _log_level(alpha: Tensor, sigma: Tensor) -> Tensor:
    """EDM's c_noise, ln(level) / 4, kept finite where there is no data or no noise."""
    return (sigma / alpha).clamp(1e-6, 1e6).log() / 4


def _unit_input(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha**2 + sigma**2).rsqrt()


@lru_cache
def _tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # kept, because copying it to a GPU at every question would make the host wait
    return torch.tensor(values, dtype=dtype, device=device)


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < inf:
            raise ValueError(f"{name} must be positive and finite, not {number}")
