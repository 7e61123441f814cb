"""A target for each range of noise: cheap where little is to be gained, exact where much is.

    lambda = sigma_t / alpha_t,      T(x_t) = T_b(x_t)   for the band b in which lambda lies

Why it is unbiased, whatever the bands: which estimator answers a row is decided by its t alone, and each estimator
looks at the row's label and map itself. t is drawn without looking at the source, and x_t always comes with its t: the
network learns E[x | x_t, t]. So given (x_t, t) the estimator is fixed, nothing about the source was used to choose it,
and E[T | x_t, t] = E[T_b | x_t, t] = E[x | x_t, t], since each T_b is unbiased (`stablefield.target`). In the words of
the cell law: the cells may depend on t in any way. Rows of different bands may share a draw of references, because the
mean of each row is over its own source and noise, and that draw.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from stablefield.posterior import Posterior
from stablefield.process import Perturbed
from stablefield.pruned import Distances, PrunedDataset
from stablefield.reference import Pool
from stablefield.target import FullDataset, ReferenceBatch, SingleSample, TargetEstimator, check_at_once, joined

Bands = tuple[tuple[float, str], ...]


@dataclass(frozen=True, repr=False)
class Banded(TargetEstimator):
    """Another target in each band of the noise level sigma / alpha. Unbiased.

    Attributes:
        distances: as `PrunedDataset` takes them.
        bands: (upper edge of sigma / alpha, target) in ascending order, the last edge infinite. A level that equals an
            edge belongs below it. Targets are written `single`, `reference:256`, `pruned` and `full`. None: they are
            still to be decided (`engine.choice`), and nothing can be asked.
        budget: what deciding may spend on the targets, as a share of a training step.
        at_once: how many rows `pruned` and `full` answer together, as of theirs.

    Raises:
        ValueError: edges that do not ascend to infinity, an unknown target, or more references than there are members.
    """

    pool: Pool
    distances: Distances | None = None
    bands: Bands = ()
    budget: float = 0.02
    at_once: int = 1024
    _parts: dict[str, TargetEstimator] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        check_at_once(self.at_once)
        if not self.budget >= 0:
            raise ValueError(f"budget is a share of a training step, 0 or more, and not {self.budget}")
        edges = [edge for edge, _ in self.bands]
        if edges and not (all(low < high for low, high in pairwise([0.0, *edges])) and edges[-1] == math.inf):
            raise ValueError(f"the edges of bands must ascend from above 0, and end with inf, unlike {edges}")
        for _, choice in self.bands:
            self.part(choice)

    def __repr__(self) -> str:
        return f"Banded({self.pool!r}, {in_words(self.bands)})"

    def arithmetic(self, device: torch.device) -> str:
        said = {choice: self.part(choice).arithmetic(device) for _, choice in self.bands}
        return "; ".join(f"{choice}: {how}" for choice, how in said.items() if how)

    def __call__(self, noisy: Perturbed, *, generator: torch.Generator | None = None) -> Posterior:
        return self.several([noisy], [generator])[0]

    def steps(self, rows: int) -> int:
        return max((self.part(choice).steps(rows) for _, choice in self.bands), default=1)

    def several(
        self, batches: Sequence[Perturbed], generators: Sequence[torch.Generator | None]
    ) -> Sequence[Posterior]:
        if not self.bands:
            raise ValueError("which target serves which noise is not decided: say bands, or let engine.choice decide")
        starts = [_start(generator) for generator in generators]
        answers: list[list[tuple[Tensor, Posterior]]] = [[] for _ in batches]
        rows = [self._rows(noisy) for noisy in batches]
        for choice in {choice: None for present in rows for choice in present}:
            steps = [step for step, present in enumerate(rows) if choice in present]
            found = self.part(choice).several(
                [batches[step].rows(rows[step][choice]) for step in steps],
                [starts[step].clone_state() for step in steps],
            )
            for step, answer in zip(steps, found, strict=True):
                answers[step].append((rows[step][choice], answer))
        return [joined(parts) for parts in answers]

    @property
    def measures(self) -> bool:
        """Whether it asks for distances, to answer or to decide."""
        return not self.bands or any(choice == "pruned" for _, choice in self.bands)

    def part(self, choice: str) -> TargetEstimator:
        """The target of that name, which is made once.

        Raises:
            ValueError: there is no such target, or more references are wanted than there are members.
        """
        if choice not in self._parts:
            self._parts[choice] = self._make(choice)
        return self._parts[choice]

    def with_bands(self, bands: Bands) -> "Banded":
        """The same with other bands, and with all that the parts have found out about the data."""
        other = replace(self, bands=bands)
        object.__setattr__(other, "_parts", self._parts | {choice: self.part(choice) for _, choice in bands})
        return other

    def _rows(self, noisy: Perturbed) -> Mapping[str, Int[Tensor, "_"]]:
        """The rows that each target answers: those of two bands with the same target together."""
        level = noisy.sigma.double() / noisy.alpha.double()
        edges = torch.tensor([edge for edge, _ in self.bands[:-1]], dtype=torch.float64, device=level.device)
        band = torch.bucketize(level, edges).cpu()
        choices = [choice for _, choice in self.bands]
        present: dict[str, list[int]] = {}
        for number in band.unique().tolist():
            present.setdefault(choices[number], []).append(number)
        return {
            choice: torch.isin(band, torch.tensor(numbers)).nonzero().flatten() for choice, numbers in present.items()
        }

    def _make(self, choice: str) -> TargetEstimator:
        kind, _, number = choice.partition(":")
        if kind == "reference" and number.isdecimal():
            return ReferenceBatch(self.pool, int(number))
        if choice == "single":
            return SingleSample()
        if choice == "pruned":
            return PrunedDataset(self.pool, self.distances, at_once=self.at_once)
        if choice == "full":
            return FullDataset(self.pool, at_once=self.at_once)
        raise ValueError(f"a band's target is single, reference:NUMBER, pruned or full, not {choice!r}")


def _start(generator: torch.Generator | None) -> torch.Generator:
    """Where all targets of a step draw from, whichever bands its rows are in; the generator itself moves on."""
    start = torch.Generator() if generator is None else generator.clone_state()
    seed = int(torch.randint(2**62, (), generator=generator))
    return start.manual_seed(seed) if generator is None else start


def in_words(bands: Bands) -> str:
    """Which target serves up to which sigma / alpha."""
    if not bands:
        return "undecided"
    *before, (_, last) = bands
    said = [f"{choice} up to {edge:g}" for edge, choice in before]
    return ", ".join([*said, f"{last} {'beyond' if said else 'everywhere'}"])
