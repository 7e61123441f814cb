"""What came out, in plain words. A difference is claimed only where its interval leaves out zero.

A denoiser may come nearer to the training set's exact E[x | x_t] without its samples or its answers on held-out data
getting any better: then it has learnt the training set by heart, and that is said instead of praised.
"""

from stablefield.compare.experiment import Arm
from stablefield.compare.results import Results, percent
from stablefield.compare.statistics import Estimate


def findings(results: Results) -> list[str]:
    """A sentence or two for all, and some for every arm but the first."""
    last = results.last
    if last is None:
        return ["Nothing has been scored yet."]
    experiment, seeds = results.experiment, len(results.common(last))
    said = [
        f"{_listed([arm.title for arm in experiment.arms])} were trained on the same images, times and noise, from the "
        f"same initial weights, and compared after {last:,} images a run, over {_counted(seeds, 'seed')}."
    ]
    if last < experiment.images or seeds < len(experiment.seeds):
        said.append(
            f"The experiment is not finished: it is meant to see {experiment.images:,} images with "
            f"{_counted(len(experiment.seeds), 'seed')}."
        )
    if seeds < 2:
        said.append("One seed cannot tell a difference from chance: what follows are observations, not findings.")
    return said + [_of_arm(results, arm, last) for arm in results.others]


def change(ratio: Estimate) -> str:
    """The logarithm of a ratio as per cent, with its interval.

    >>> change(Estimate(-0.105, 0.05, 0.04, 3))
    '-10.0 % (-14.4 to -5.3)'
    """
    mean, low, high = (_signed(percent(value)) for value in (ratio.mean, ratio.low, ratio.high))
    return f"{mean} %" if ratio.n < 2 else f"{mean} % ({low} to {high})"


def memorises(results: Results, arm: Arm, last: int) -> bool:
    """Nearer to the training set's exact answer than the baseline, and surely better in nothing else."""
    exact, quality, held_out = (results.ratio(arm, last, name) for name in ("exact_error", "frechet", "held_out_loss"))
    return _better(exact) and not _better(quality) and not _better(held_out)


def _of_arm(results: Results, arm: Arm, last: int) -> str:
    quality, held_out, exact = (results.ratio(arm, last, name) for name in ("frechet", "held_out_loss", "exact_error"))
    base = results.baseline.title
    said = [f"{arm.title} against {base}: {_verdict('the Frechet distance of its samples', quality)}"]
    said.append(_verdict("the loss on held-out data", held_out))
    said.append(_verdict("the error against the training set's exact answer", exact))
    text = "; ".join(said) + "."
    if memorises(results, arm, last):
        text += (
            " It came nearer to the training set's exact answer and surely gained nothing else: that is memorisation, "
            "not quality."
        )
    elif _better(quality) and _worse(held_out):
        text += (
            " Its samples are nearer to the training data while its answers on held-out data are worse: mind copies."
        )
    near, copies = results.difference(arm, last, "nearest_ratio"), results.difference(arm, last, "copies")
    if (near.sure and near.mean < 0) or (copies.sure and copies.mean > 0):
        text += (
            f" Its samples lie nearer to training images ({results.over_seeds(arm, last, 'nearest_ratio').mean:.3f} of "
            f"held-out data's distance, {results.over_seeds(results.baseline, last, 'nearest_ratio').mean:.3f} with "
            f"{base})."
        )
    return text + f" A step took {percent_of(results.overhead(arm))} time."


def percent_of(overhead: float) -> str:
    """A change in words.

    >>> percent_of(0.031), percent_of(-0.002)
    ('3 % more', 'the same')
    """
    if abs(overhead) < 0.005 or overhead != overhead:
        return "the same"
    return f"{abs(overhead):.0%} {'more' if overhead > 0 else 'less'}".replace("%", " %")


def _signed(number: float) -> str:
    return f"{number:+.1f}" if abs(number) >= 1 else f"{number:+.2g}"


def _verdict(what: str, ratio: Estimate) -> str:
    if ratio.n < 2:
        return f"{what} changed by {change(ratio)}"
    if not ratio.sure:
        return f"{what} shows no difference that these seeds can tell from chance, {change(ratio)}"
    return f"{what} is {'lower' if ratio.mean < 0 else 'higher'}, {change(ratio)}"


def _better(ratio: Estimate) -> bool:
    return ratio.sure and ratio.mean < 0


def _worse(ratio: Estimate) -> bool:
    return ratio.sure and ratio.mean > 0


def _listed(names: list[str]) -> str:
    return f"{'; '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
