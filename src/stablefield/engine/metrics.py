"""Metrics of training: means over the latest steps, by noise level, and the loss on held-out images.

Names are `group/name`, those of EDM where it has one, in lower case. Sums are float64 and over the examples of all
ranks.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.denoise import Denoiser
from stablefield.distributed import Ranks
from stablefield.engine.loop import StepReport
from stablefield.engine.state import TrainState
from stablefield.objective import Objective
from stablefield.pool import Pool
from stablefield.process import Process
from stablefield.seeding import generator
from stablefield.targets import DSMTarget
from stablefield.times import TimeDistribution

ESS_THRESHOLD = 1.01
"""Effective sample size above which a target counts as different from its source; the source alone has 1."""


@dataclass(frozen=True, eq=False)
class NoiseBins:
    """Ranges of the noise level sigma / alpha, for losses by noise level.

    Attributes:
        edges: the times between two ranges, ascending; one less than there are ranges.
        names: the noise levels at both ends of each range, such as `0.1..0.2`.
    """

    edges: Float[Tensor, "inner"]
    names: tuple[str, ...]

    @classmethod
    def equally_likely(cls, times: TimeDistribution, process: Process) -> "NoiseBins":
        """Eight ranges that training visits equally often.

        Args:
            times: distribution of t.
            process: the process, for the noise level at each time.
        """
        t = times.quantile(torch.linspace(0, 1, 9, dtype=torch.float64))
        alpha, sigma = process.scales(t)
        names = tuple(f"{low:.3g}..{high:.3g}" for low, high in pairwise((sigma / alpha).tolist()))
        return cls(t[1:-1], names)

    def sums(self, t: Float[Tensor, "n"], losses: Float[Tensor, "n"]) -> Float[Tensor, "K 2"]:
        """The sum of the losses and the number of examples in each range, float64 on the CPU.

        Args:
            t: time of each example.
            losses: loss of each example.
        """
        values = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)], 1).cpu()
        bins = torch.bucketize(t.double().cpu().contiguous(), self.edges)
        return torch.zeros(len(self.names), 2, dtype=torch.float64).index_add_(0, bins, values)

    def means(self, group: str, sums: Float[Tensor, "K 2"]) -> dict[str, float]:
        """The mean loss over all examples, and over each range that has any, by the names of the metrics.

        Args:
            group: group of the metrics, such as `loss` for `loss/loss` and `loss_by_noise/LOW..HIGH`.
            sums: sum and number for each range, as `sums` returns them.
        """
        total, count = sums.sum(0).tolist()
        by_noise = {
            f"{group}_by_noise/{name}": s / n for name, (s, n) in zip(self.names, sums.tolist(), strict=True) if n
        }
        return {f"{group}/loss": total / count} | by_noise


class MetricsLogger:
    """Collects the reports of steps, and averages them into one set of metrics.

    Args:
        bins: ranges of the noise level.
        ranks: this process and those it trains with, whose examples are averaged over.
        elapsed: seconds that the run has taken in earlier processes.
    """

    def __init__(self, bins: NoiseBins, ranks: Ranks, elapsed: float = 0.0) -> None:
        self.bins, self.ranks = bins, ranks
        self.start, self.last = perf_counter() - elapsed, perf_counter()
        self.steps: list[StepReport] = []
        self.seconds, self.images = 0.0, 0

    def add(self, step: StepReport, batch_size: int) -> None:
        """Collect a step that has just ended.

        Args:
            step: report of the step.
            batch_size: images of the step, over all ranks.
        """
        self.steps.append(step)
        self.images += batch_size
        self.seconds += perf_counter() - self.last
        self.last = perf_counter()

    def restart_clock(self) -> None:
        """Exclude the time since the last step (for saving, scoring, sampling) from the time of training."""
        self.last = perf_counter()

    def flush(self, state: TrainState, ranks: Ranks | None = None) -> dict[str, Any]:
        """Metrics of the steps since the last call, which are then forgotten unless a rank has died.

        Args:
            state: state after the last of the steps.
            ranks: ranks whose examples are averaged over, all of which must call this; by default all ranks.
        """
        metrics = {
            "progress/kimg": state.images / 1000,
            **self._means([step for step in self.steps if step.step_taken], ranks or self.ranks),
            "loss/learning_rate": self.steps[-1].learning_rate,
            "steps/skipped": state.skipped,
            "timing/sec_per_kimg": self.seconds / self.images * 1000,
            "timing/total_sec": perf_counter() - self.start,
            **_resources(state.device),
            "timestamp": time.time(),
        }
        self.steps, self.seconds, self.images = [], 0.0, 0
        return metrics

    def _means(self, steps: Sequence[StepReport], ranks: Ranks) -> dict[str, float]:
        """Means over steps that were taken; the losses of skipped steps need not be finite."""
        if not steps:
            return {}
        own = torch.cat(
            [torch.stack([s.report.losses, s.report.t, s.report.ess.to(s.report.t), _importance(s)], 1) for s in steps]
        )
        losses, t, ess, importance = ranks.all_gather(own.float()).double().cpu().unbind(1)
        fractions = [step.fraction_dsm for step in steps if step.fraction_dsm is not None]
        return {
            **self.bins.means("loss", self.bins.sums(t, losses)),
            **({} if steps[0].importance is None else {"loss/loss": _mean(importance * losses)}),
            "loss/gradient_norm": _mean(torch.stack([step.gradient_norm for step in steps])),
            "target/ess": _mean(ess),
            "target/fraction_ess_above_1.01": _mean(ess > ESS_THRESHOLD),
            **({"target/fraction_dsm": _mean(ranks.all_gather(torch.stack(fractions)))} if fractions else {}),
        }


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _importance(step: StepReport) -> Float[Tensor, "B"]:
    """Importance weights of the examples of a step."""
    return torch.ones_like(step.report.t) if step.importance is None else step.importance.to(step.report.t)


def _resources(device: torch.device) -> dict[str, float]:
    """Memory that this process uses, in GiB."""
    memory = {"resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        memory["resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return memory


@dataclass(frozen=True, eq=False)
class HeldOutLoss:
    """The loss on held-out images against the images themselves, at the same times and with the same noise every time.

    Stable targets would need references among the held-out images. The DSM loss has the same minimiser, so runs with
    different targets can be compared by it. Times are evenly spaced quantiles of their distribution.

    Attributes:
        pool: the held-out images; each is used once, or several times if there are fewer than `min_examples`, or an
            evenly spaced part of them if there are more than `max_examples`.
        objective: distribution of t and weight of the loss.
        bins: ranges of the noise level.
        ranks: this process and those it trains with, among which the examples are divided.
        batch_size: examples of a rank that pass through the network at once.
        min_examples: smallest number of examples.
        max_examples: largest number of examples.
    """

    pool: Pool
    objective: Objective
    bins: NoiseBins
    ranks: Ranks
    batch_size: int
    min_examples: int = 1024
    max_examples: int = 8192

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser) -> dict[str, float]:
        """The loss of a model, over all examples and by noise level; must be called on all ranks.

        Args:
            denoiser: the model, in evaluation mode.
        """
        n = min(max(len(self.pool), self.min_examples), self.max_examples)
        index = torch.arange(n) * len(self.pool) // n
        level = (torch.randperm(n, generator=generator(0, "held out")).double() + 0.5) / n
        t = self.objective.times.quantile(level)
        sums = torch.zeros(len(self.bins.names), 2, dtype=torch.float64)
        for examples in torch.arange(n)[self.ranks.rank :: self.ranks.world_size].split(self.batch_size):
            x, label = self.pool.take(index[examples]).to(self.ranks.device), self.pool.label(index[examples])
            noisy = self.objective.perturb(
                denoiser.process,
                x,
                t=t[examples],
                generators=(generator(0, "held out", number) for number in examples.tolist()),
                label=None if label is None else label.to(x.device),
                index=index[examples],
            )
            report = self.objective.loss(denoiser, denoiser.process, noisy, DSMTarget()(noisy))
            sums += self.bins.sums(t[examples], report.losses)
        total = self.ranks.all_gather(sums[None].to(self.ranks.device)).sum(0).cpu()
        return self.bins.means("held_out", total)
