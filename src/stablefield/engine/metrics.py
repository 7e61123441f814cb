"""What there is to see of training: means over the last steps, by noise level, on images held out.

The names are EDM's where EDM has one. Sums are in float64 and over the rows of all ranks.
"""

import time
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.engine.state import TrainState
from stablefield.engine.train import StepReport
from stablefield.objective import Objective
from stablefield.process import Process
from stablefield.ranks import Ranks
from stablefield.reference import Pool
from stablefield.seeding import generator
from stablefield.target import SingleSample
from stablefield.times import Times

CHANGED = 1.01  # a target is called changed if more members than this shared in it (ESS); alone, the source counts 1


@dataclass(frozen=True, eq=False)
class Bins:
    """Ranges of the noise level sigma / alpha that training visits equally often.

    Attributes:
        edges: the times between them.
        names: the noise levels of each, as `0.1..0.2`.
    """

    edges: Float[Tensor, "inner"]
    names: tuple[str, ...]

    @classmethod
    def of(cls, times: Times, process: Process, count: int = 8) -> "Bins":
        """So many of them, for these times."""
        t = times.quantile(torch.linspace(0, 1, count + 1, dtype=torch.float64))
        alpha, sigma = process.scales(t)
        names = tuple(f"{low:.3g}..{high:.3g}" for low, high in pairwise((sigma / alpha).tolist()))
        return cls(t[1:-1], names)

    def sums(self, t: Float[Tensor, "n"], loss: Float[Tensor, "n"]) -> Float[Tensor, "K 2"]:
        """The sum of losses and the number of rows in each."""
        rows = torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)], 1).cpu()
        where = torch.bucketize(t.double().cpu().contiguous(), self.edges)
        return torch.zeros(len(self.names), 2, dtype=torch.float64).index_add_(0, where, rows)

    def means(self, group: str, sums: Float[Tensor, "K 2"]) -> dict[str, float]:
        """The mean loss of all rows and of each range that had any."""
        total, count = sums.sum(0).tolist()
        each = {f"{group}_by_noise/{name}": s / n for name, (s, n) in zip(self.names, sums.tolist(), strict=True) if n}
        return {f"{group}/loss": total / count} | each


class Meter:
    """Means over the steps since the last line of the metrics.

    Args:
        bins: ranges of the noise level.
        ranks: whose rows count.
        before: seconds that the run had taken before this process.
    """

    def __init__(self, bins: Bins, ranks: Ranks, before: float = 0.0) -> None:
        self.bins, self.ranks = bins, ranks
        self.began, self.since = perf_counter() - before, perf_counter()
        self.steps: list[StepReport] = []
        self.seconds, self.images = 0.0, 0

    def add(self, step: StepReport, images: int) -> None:
        """Take note of a step of so many images, which has ended now."""
        self.steps.append(step)
        self.images += images
        self.seconds += perf_counter() - self.since
        self.since = perf_counter()

    def rest(self) -> None:
        """What was done since the last step was no training."""
        self.since = perf_counter()

    def line(self, state: TrainState) -> dict[str, Any]:
        """A line of the metrics; what has been noted is forgotten. All ranks must ask for it together."""
        steps, seconds, images = self.steps, self.seconds, self.images
        self.steps, self.seconds, self.images = [], 0.0, 0
        return {
            "Progress/kimg": state.images / 1000,
            **self._means([step for step in steps if step.taken]),
            "Loss/learning_rate": steps[-1].rate,
            "Steps/skipped": state.skipped,
            "Timing/sec_per_kimg": seconds / images * 1000,
            "Timing/total_sec": perf_counter() - self.began,
            **_resources(state.device),
            "timestamp": time.time(),
        }

    def _means(self, steps: list[StepReport]) -> dict[str, float]:
        """What the steps that were taken say; one that was not has no loss to speak of."""
        if not steps:
            return {}
        mine = torch.cat([torch.stack([s.report.each, s.report.t, s.report.ess.to(s.report.t)], 1) for s in steps])
        each, t, ess = self.ranks.gather(mine.float()).double().cpu().unbind(1)
        told = [step.alone for step in steps if step.alone is not None]
        alone = {"Target/alone": float(self.ranks.gather(torch.stack(told)).double().mean())} if told else {}
        return {
            **self.bins.means("Loss", self.bins.sums(t, each)),
            "Loss/gradient_norm": float(torch.stack([step.gradient_norm for step in steps]).double().mean()),
            "Target/ess": float(ess.mean()),
            "Target/changed": float((ess > CHANGED).double().mean()),
            **alone,
        }


def _resources(device: torch.device) -> dict[str, float]:
    memory = {"Resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        memory["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return memory


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The loss on members that were never trained on, against themselves: the same rows, times and noise every time.

    Stable targets would need references of their own; against the source alone the loss has the same minimiser, and
    runs with different targets can be compared. Times are evenly spread over their density.

    Attributes:
        pool: the members; each is looked at once, or several times if they are few, or some of them if they are many.
        objective: times and weight.
        bins: ranges of the noise level.
        ranks: which share the rows.
        batch: rows of a rank at once.
    """

    pool: Pool
    objective: Objective
    bins: Bins
    ranks: Ranks
    batch: int
    fewest: int = 1024
    most: int = 8192

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser) -> dict[str, float]:
        """The loss, and that in each range of the noise level. All ranks must ask for it together."""
        n = min(max(len(self.pool), self.fewest), self.most)
        index = torch.arange(n) * len(self.pool) // n
        level = (torch.randperm(n, generator=generator(0, "held out")).double() + 0.5) / n
        t = self.objective.times.quantile(level)
        sums = torch.zeros(len(self.bins.names), 2, dtype=torch.float64)
        for rows in torch.arange(n)[self.ranks.rank :: self.ranks.total].split(self.batch):
            sums += self._sums(denoiser, rows, index[rows], t[rows])
        whole = self.ranks.gather(sums[None].to(self.ranks.device)).sum(0).cpu()
        return self.bins.means("Held_out", whole)

    def _sums(self, denoiser: Denoiser, rows: Tensor, index: Tensor, t: Tensor) -> Tensor:
        device = self.ranks.device
        x, label = self.pool.take(index).to(device), self.pool.label(index)
        noise = [
            torch.randn(x.shape[1:], generator=generator(0, "held out", row), dtype=x.dtype) for row in rows.tolist()
        ]
        told = None if label is None else label.to(device)
        noisy = denoiser.process.perturb(x, t.to(x), torch.stack(noise).to(device), label=told, index=index)
        report = self.objective.loss(denoiser, denoiser.process, noisy, SingleSample()(noisy))
        return self.bins.sums(t, report.each)
