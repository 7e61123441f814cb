"""Forward processes: how data x turn into noise.

    x_t = alpha_t x + sigma_t noise,      noise ~ N(0, I)

A `Process` is the pair (alpha, sigma) as functions of t, and the inverse of their ratio. Posterior weights, the
preconditioning of a network and the steps of a sampler follow from these two numbers. A process with alpha > 0 is
the variance-exploding one rescaled: x_t / alpha is x plus noise of level sigma / alpha.

| process  | alpha                                   | sigma             | source                               |
|----------|-----------------------------------------|-------------------|--------------------------------------|
| `VE`     | 1                                       | t                 | Song et al. 2021; Karras et al. 2022 |
| `VP`     | exp(-(beta_d t^2 / 2 + beta_min t) / 2) | sqrt(1 - alpha^2) | Ho et al. 2020; Song et al. 2021     |
| `SubVP`  | as VP                                   | 1 - alpha^2       | Song et al. 2021                     |
| `Cosine` | cos(pi t / 2)                           | sin(pi t / 2)     | Nichol & Dhariwal 2021               |
| `Flow`   | 1 - t                                   | t                 | Liu et al. 2022; Lipman et al. 2023  |

`Tabulated` and `TabulatedVE` interpolate a table of noise levels, such as the `alphas_cumprod` of a diffusers
scheduler. t runs from 0 (data) to 1; VE's t has no upper bound.
"""

from stablefield.process.base import BatchRecord, NoisyBatch, Process, draw_noise, move, per_example
from stablefield.process.closed import VE, VP, Cosine, Flow, SubVP
from stablefield.process.tabulated import Tabulated, TabulatedVE

__all__ = [
    "VE",
    "VP",
    "BatchRecord",
    "Cosine",
    "Flow",
    "NoisyBatch",
    "Process",
    "SubVP",
    "Tabulated",
    "TabulatedVE",
    "draw_noise",
    "move",
    "per_example",
]
