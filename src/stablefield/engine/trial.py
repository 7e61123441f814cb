"""Targets on trial: how much variance each leaves at each noise level, and what it costs, on rows of a run.

Nothing here touches the run: steps are taken by a copy of the denoiser, and all that is drawn is drawn for this.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import permutations
from math import inf
from statistics import median
from time import perf_counter, thread_time

import torch
from jaxtyping import Float
from torch import Tensor

from stablefield.banded import Banded
from stablefield.config import Config
from stablefield.data import Batch, Progress, silent
from stablefield.engine.begin import begun, compile_network, descent_of, exactly
from stablefield.engine.train import train
from stablefield.posterior import Posterior
from stablefield.process import Perturbed
from stablefield.run import Parts
from stablefield.seeding import generator
from stablefield.target import SingleSample, TargetEstimator

# shares of the training rows, from little noise to much: where there is most, a few rows have most of the variance
SHARES = (*[1 / 16] * 15, 1 / 32, 1 / 64, 1 / 64)
ROWS = 32  # in each range, at least, by which variance is measured
SIZES = (64, 256, 1024, 4096)  # of reference batches
DRAWS = 2  # of each
REPEATS = 3  # of what is timed
PATIENCE = 10.0  # seconds in which training steps are repeated


@dataclass(frozen=True)
class Level:
    """A range of noise levels, measured.

    Attributes:
        share: of the training rows.
        edge: the upper end, as sigma / alpha.
        variance: what each target leaves: what it adds to the mean over a batch, weighted as by the loss.
        seconds: what its rows cost a step with each target.
    """

    share: float
    edge: float
    variance: Mapping[str, float]
    seconds: Mapping[str, float]

    def best(self, price: float, among: Collection[str]) -> str:
        """The target that leaves least variance where a second costs so much of it; of equals the fastest."""
        here = [choice for choice in self.variance if choice in among]
        return min(here, key=lambda of: (self.variance[of] + price * self.seconds[of], self.seconds[of]))

    def prices(self, among: Collection[str]) -> list[float]:
        """Where the best may change."""
        pairs = permutations([choice for choice in self.variance if choice in among], 2)
        gains = ((self.variance[a] - self.variance[b], self.seconds[b] - self.seconds[a]) for a, b in pairs)
        return [less / more for less, more in gains if less > 0 and more > 0]


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        levels: from little noise to much.
        once: what each target costs a step as soon as it is used (seconds), beside its rows.
    """

    levels: tuple[Level, ...]
    once: Mapping[str, float]


def measure(config: Config, parts: Parts, progress: Progress = silent) -> Trial:
    """Try every target at every level.

    The rows are of the run: with their labels, some of them not told, and their maps. Those under a map through which
    references cannot be seen keep their source whatever is chosen, and count nowhere.
    """
    target, batch = parts.objective.target, len(parts.batches(0))
    assert isinstance(target, Banded)
    each = min(max(ROWS, round(batch * max(SHARES))), 256)
    noisy = _spread(config, parts, each)
    sizes = [f"reference:{size}" for size in SIZES if size < len(parts.pool)]
    steps = {of: target.part(of).steps(batch) for of in ("single", *sizes, "pruned", "full")}
    variances, times, counts = list[dict[str, float]](), list[dict[str, float]](), list[dict[str, int]]()
    one: dict[str, float] = {}  # what the first row costs at least
    full: dict[int, float] = {}
    for number, share in enumerate(SHARES):
        progress(number, len(SHARES))
        rows = _Rows(noisy.rows(slice(number * each, (number + 1) * each)), parts)
        single = share * rows.variance
        # where the source is all there is to know, references are nothing but slower
        wanted = sizes if single > 0 else []
        left = {of: min(single, share * rows.left(target.part(of))) for of in wanted}
        variances.append({"single": single, **left, "pruned": 0.0, "full": 0.0})
        count = {of: _count(batch * steps[of] * share, each) for of in variances[-1]}
        took = {of: rows.seconds(target.part(of), count[of]) for of in ("single", *wanted, "pruned")}
        if count["full"] not in full:  # it takes as long whatever the noise is
            full[count["full"]] = rows.seconds(target.part("full"), count["full"])
        took["full"] = full[count["full"]]
        for of in ("single", *wanted, "pruned"):
            one[of] = min(one.get(of, inf), rows.seconds(target.part(of), 1))
        one["full"] = one.get("full") or rows.seconds(target.part("full"), 1)
        times.append(took)
        counts.append(count)
    progress(len(SHARES), len(SHARES))
    levels = []
    for share, edge, variance, took, count in zip(SHARES, _edges(parts), variances, times, counts, strict=True):
        row = {of: max(0.0, took[of] - one[of]) / (count[of] - 1) for of in took}
        seconds = {of: batch * share * max(0.0, row[of] - row["single"]) for of in took}
        levels.append(Level(share, edge, variance, seconds))
    once = {of: max(0.0, seconds - one["single"]) / steps[of] for of, seconds in one.items()}
    return Trial(tuple(levels), once)


def seconds_of_a_step(config: Config, parts: Parts) -> float:
    """The median time of a training step with single samples, on a copy of the denoiser."""
    objective = replace(parts.objective, target=SingleSample())
    parts = replace(parts, denoiser=copy.deepcopy(parts.denoiser), objective=objective)
    training, found, began = config.training, list[float](), perf_counter()
    with exactly(training.deterministic):
        state = begun(config, parts)
        compile_network(config, parts)
        # one process's part of a step: it does not wait for others
        steps = train(state, objective, parts.batches, images=2**62, seed=training.seed, descent=descent_of(training))
        # the first steps find memory and algorithms, and are not typical
        while len(found) < 3 or (len(found) < 8 and perf_counter() - began < PATIENCE):
            found.append(_seconds(lambda: next(steps), state.device))
    return median(found[2:])


def seconds_of_targets(target: TargetEstimator, batches: Sequence[Perturbed], enough: float = inf) -> float:
    """What a target costs a batch more than single samples do; cut short where it is more than enough for certain.

    It is asked as in a run: about as many batches together as it likes.
    """
    total, together = 0.0, target.steps(len(batches[0]))
    for start in range(0, len(batches), together):
        some = batches[start : start + together]
        total += max(0.0, median(_times(target, some)) - median(_times(SingleSample(), some)))
        if total > enough * len(batches):
            break
    return total / len(batches)


def batch_of_the_run(config: Config, parts: Parts, number: int) -> Perturbed:
    """A batch as the run has them."""
    seen = number * parts.batches.size
    t = parts.objective.times.draw(parts.batches.size, generator(config.training.seed, "choice", "times", number))
    batch = parts.batches(seen)
    return _perturbed(config, parts, batch, t[batch.number - seen])


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows at one level, with their exact means."""

    noisy: Perturbed
    parts: Parts

    @cached_property
    def exact(self) -> Posterior:
        target = self.parts.objective.target
        assert isinstance(target, Banded)
        return target.part("pruned")(self.noisy, generator=generator(0, "choice", "exact"))

    @property
    def variance(self) -> float:
        """Of single samples."""
        return self._weighted(self.exact.variance)

    def left(self, target: TargetEstimator) -> float:
        """The mean squared distance of a target from the exact means."""
        means = (target(self.noisy, generator=generator(0, "choice", "draw", draw)).mean for draw in range(DRAWS))
        squares = [(mean - self.exact.mean).double().square().flatten(1).sum(1) for mean in means]
        return self._weighted(torch.stack(squares).mean(0))

    def seconds(self, target: TargetEstimator, count: int) -> float:
        """What so many of the rows take together; the least of some, because the machine may be busy."""
        return min(_times(target, [self.noisy.rows(torch.arange(count) * (len(self.noisy) // count))]))

    def _weighted(self, squares: Float[Tensor, "B"]) -> float:
        """The mean of squares of distances, weighted as by the loss."""
        weight = self.parts.objective.weight(self.parts.denoiser.process, self.noisy.t).double()
        # a weight may be infinite where nothing varies
        return float(torch.where(squares > 0, weight * squares.double(), 0.0).mean())


def _count(rows: float, most: int) -> int:
    """So many rows, and at least two: one more than the first."""
    return min(max(2, round(rows)), most)


def _times(target: TargetEstimator, batches: Sequence[Perturbed]) -> list[float]:
    """Some repeats, or one of what takes long."""
    generators = [generator(0, "choice", "time") for _ in batches]
    act, found = partial(target.several, batches, generators), list[float]()
    while len(found) < REPEATS and sum(found) < 1:
        found.append(_seconds(act, batches[0].x_t.device))
    return found


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    """What an act takes: on a CPU of this thread, which others may have interrupted; else until the device is done."""
    if device.type == "cpu":
        began = thread_time()
        act()
        return thread_time() - began
    torch.accelerator.synchronize(device)
    began = perf_counter()
    act()
    torch.accelerator.synchronize(device)
    return perf_counter() - began


def _edges(parts: Parts) -> list[float]:
    """The upper ends of the levels, as sigma / alpha."""
    below = torch.tensor(SHARES[:-1], dtype=torch.float64).cumsum(0)
    alpha, sigma = parts.denoiser.process.scales(parts.objective.times.quantile(below))
    return [*(sigma / alpha).tolist(), inf]


def _spread(config: Config, parts: Parts, each: int) -> Perturbed:
    """So many rows of the run at each level, evenly spread within it."""
    total = each * len(SHARES)
    steps = -(-total // len(parts.batches(0)))
    batch = Batch.joined([parts.batches(step * parts.batches.size) for step in range(steps)]).rows(slice(0, total))
    inside = (torch.arange(each, dtype=torch.float64) + 0.5) / each
    share = torch.tensor(SHARES, dtype=torch.float64)
    level = ((share.cumsum(0) - share)[:, None] + share[:, None] * inside).flatten()
    return _perturbed(config, parts, batch, parts.objective.times.quantile(level))


def _perturbed(config: Config, parts: Parts, batch: Batch, t: Float[Tensor, "B"]) -> Perturbed:
    batch = batch.to(next(parts.denoiser.parameters()).device)
    source = generator(config.training.seed, "choice", "noise", int(batch.number[0]))
    noise = torch.randn(batch.x.shape, generator=source, dtype=batch.x.dtype).to(batch.x.device)
    known = {name: getattr(batch, name) for name in ("label", "index", "augmentation", "number")}
    return parts.denoiser.process.perturb(batch.x, t.to(batch.x), noise, **known)
