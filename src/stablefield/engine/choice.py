"""Which target serves which noise, within a budget: measured, decided once, and then part of the configuration.

A step's gradient inherits from the targets the variance

    sum over rows of  w(t) E ||T(x_t) - E[x | x_t]||^2,      w: the weight of the loss

Each range of noise levels contributes to it, and to the time of the step; what each target leaves of the first and adds
to the second is measured (`engine.trial`). Among the targets in use and at each price lambda every range takes what
minimises variance + lambda time (Lagrange). Of all such assignments those count than which none leaves less for less;
and of these the most generous whose real cost, on batches of the run, stays within the budget is taken.

The decision depends on timings, so it is no function of the seed. It is made once, before anything is trained, and
written down; a run that goes on, and one whose configuration says the bands, decides nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, groupby
from math import isfinite
from typing import Literal

from stablefield.banded import Banded, Bands
from stablefield.config import Config, overlay, resolve
from stablefield.data import Progress, silent
from stablefield.engine.saving import last_told
from stablefield.engine.trial import Level, Trial, batch_of_the_run, measure, seconds_of_a_step, seconds_of_targets
from stablefield.ranks import Ranks
from stablefield.run import Folder, Parts

BATCHES = 8  # of the run, at least, by which real costs are measured
WORTH = 1e-3  # of DSM's variance: what more time must gain

Plan = tuple[str, ...]  # a target for each level


@dataclass(frozen=True)
class Choice:
    """What was decided, and what it was decided by.

    Attributes:
        bands: as of `Banded`.
        budget: the share of a step that was allowed.
        step: seconds of a training step with single samples.
        seconds: what these targets add to it.
        levels: what was measured at each.
        plan: the target taken at each.
    """

    bands: Bands
    budget: float
    step: float
    seconds: float
    levels: tuple[Level, ...] = field(repr=False)
    plan: Plan = field(repr=False)

    @property
    def left(self) -> float:
        """The share of the variance of single samples that is left."""
        return _ratio(_sum(self.levels, self.plan, "variance"), self._single(self.levels))

    def __str__(self) -> str:
        """A table with a line a band."""
        whole, low = self._single(self.levels), 0.0
        lines = ["sigma / alpha       of the rows   of DSM's variance   target              of that left"]
        for choice, group in groupby(zip(self.levels, self.plan, strict=True), key=lambda pair: pair[1]):
            band = [level for level, _ in group]
            here, left = self._single(band), _sum(band, (choice,) * len(band), "variance")
            span = f"{low:.3g} to {band[-1].edge:.3g}" if isfinite(band[-1].edge) else f"from {low:.3g}"
            share = sum(level.share for level in band)
            lines.append(f"{span:<20}{share:11.1%}{_ratio(here, whole):20.1%}   {choice:<16}{_ratio(left, here):16.1%}")
            low = band[-1].edge
        told = f"{self.left:.1%} of DSM's variance is left" if whole else "no target varies here"
        spent = f"{self.seconds / self.step:.2%} of a step of {self.step:.3g} s (budget: {self.budget:.2%})"
        return "\n".join([*lines, f"{told}, for {spent}"])

    @staticmethod
    def _single(levels: Sequence[Level]) -> float:
        return _sum(levels, ("single",) * len(levels), "variance")


def decided(
    config: Config,
    parts: Parts,
    ranks: Ranks | None = None,
    progress: Progress = silent,
    *,
    folder: Folder | None = None,
) -> tuple[Config, Parts, Choice | None]:
    """The configuration and its parts with bands in the target, where it is `auto` and they are not said.

    All ranks must ask together: the first decides, and the others are told.

    Args:
        progress: told of the levels measured, on the first rank.
        folder: of the run; what it has decided, if it is there, stays.

    Returns:
        Both as they were, and None, where nothing is to be decided.
    """
    target = parts.objective.target
    if not isinstance(target, Banded) or target.bands:
        return config, parts, None
    before = None if folder is None else last_told(folder, config.allowed)
    if before is not None and (bands := before["target"].get("bands")):
        return *_with(config, parts, tuple((float(edge), choice) for edge, choice in bands)), None
    ranks = ranks or Ranks(next(parts.denoiser.parameters()).device)
    choice = ranks.told(lambda: choose(config, parts, progress))
    return *_with(config, parts, choice.bands), choice


def choose(config: Config, parts: Parts, progress: Progress = silent) -> Choice:
    """Measure, and decide. It takes some seconds to a few minutes, and as much memory as the training does."""
    target = parts.objective.target
    assert isinstance(target, Banded)
    step, trial = seconds_of_a_step(config, parts), measure(config, parts, progress)
    together = target.part("full").steps(len(parts.batches(0)))
    batches = [batch_of_the_run(config, parts, number) for number in range(-(-BATCHES // together) * together)]

    def cost(plan: Plan, enough: float) -> float:
        return seconds_of_targets(target.with_bands(bands_of(trial.levels, plan)), batches, enough)

    plan, seconds = most_generous(plans(trial), cost, target.budget * step)
    return Choice(bands_of(trial.levels, plan), target.budget, step, seconds, trial.levels, plan)


def plans(trial: Trial) -> list[Plan]:
    """Assignments than which none leaves less for less, the most generous first, single samples last.

    The most generous is exact everywhere, also where the rows on trial showed nothing to be gained.
    """
    levels, others = trial.levels, [choice for choice in trial.once if choice != "single"]
    found: dict[Plan, float] = {}
    for used in chain.from_iterable(combinations(others, size) for size in range(len(others) + 1)):
        among = {"single", *used}
        # a little beyond each price, where there is no tie
        for price in {0.0, *(price * (1 + 1e-9) for level in levels for price in level.prices(among))}:
            plan = tuple(level.best(price, among) for level in levels)
            found[plan] = _expected(trial, plan)
    last = ("single",) * len(levels)
    worth, best = WORTH * _sum(levels, last, "variance"), [last]
    for plan in sorted(found, key=lambda plan: (found[plan], _sum(levels, plan, "variance"))):
        if _sum(levels, plan, "variance") < _sum(levels, best[-1], "variance") - worth:
            best.append(plan)
    if best == [last]:
        return best
    everywhere = [(choice,) * len(levels) for choice in ("pruned", "full")]
    first = min(everywhere, key=lambda plan: _expected(trial, plan))
    return [first, *(plan for plan in reversed(best) if plan != first)]


def _expected(trial: Trial, plan: Plan) -> float:
    """Seconds that a plan should add to a step."""
    return sum(trial.once[choice] for choice in {*plan}) + _sum(trial.levels, plan, "seconds")


def most_generous(plans: Sequence[Plan], cost: Callable[[Plan, float], float], allowed: float) -> tuple[Plan, float]:
    """The first plan that is within what is allowed, and its cost. The last costs nothing.

    One after the other: what serves several levels passes once for all of them, so that real costs are in no order.

    Args:
        cost: seconds of a plan, or some number of seconds that is too much already.
        allowed: seconds.
    """
    for plan in plans[:-1]:
        if (seconds := cost(plan, allowed)) <= allowed:
            return plan, seconds
    return plans[-1], 0.0


def bands_of(levels: Sequence[Level], plan: Plan) -> Bands:
    """Neighbouring levels with the same target as one band; edges with the digits that people write."""
    edges: dict[float, str] = {}
    for choice, group in groupby(zip(levels, plan, strict=True), key=lambda pair: pair[1]):
        *_, (last, _) = group
        edges[float(f"{last.edge:.3g}")] = choice
    return tuple(edges.items())


def _with(config: Config, parts: Parts, bands: Bands) -> tuple[Config, Parts]:
    target = parts.objective.target
    assert isinstance(target, Banded)
    said = {"target": {"bands": [list(band) for band in bands]}}
    objective = replace(parts.objective, target=target.with_bands(bands))
    return resolve(overlay(config.sections, said), allow=config.allowed), replace(parts, objective=objective)


def _sum(levels: Sequence[Level], plan: Plan, what: Literal["variance", "seconds"]) -> float:
    return sum(getattr(level, what)[choice] for level, choice in zip(levels, plan, strict=True))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
