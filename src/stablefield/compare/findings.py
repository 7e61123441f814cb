"""What came out, in plain words. A difference is claimed only where its interval leaves out zero.

A denoiser may come nearer to the training set's exact E[x | x_t] without its samples or its answers on held-out data
getting any better: then it has learnt the training set by heart, and that is said instead of praised.
"""

from math import isfinite

from stablefield.compare.experiment import Arm
from stablefield.compare.results import Results, percent
from stablefield.compare.statistics import Estimate

MEASURED = {
    "frechet": "Frechet distance of samples to the data",
    "held_out_loss": "Loss on held-out data",
    "exact_error": "Error against the training set's exact answer",
    "gradient_variance": "Variance of the gradient",
}

GOAL = 1.5  # of the baseline's last Frechet distance: far enough from the end that most seeds get there


def findings(results: Results) -> list[str]:
    """What was done and found in a few sentences, then some for every arm but the first."""
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
    return [" ".join([*said, _headline(results, last)]), *(_of_arm(results, arm, last) for arm in results.others)]


def _headline(results: Results, last: int) -> str:
    """Whose samples are better, if anyone's."""
    ratios = {arm: results.ratio(arm, last, "frechet") for arm in results.others}
    base = results.baseline.title
    if all(ratio.n < 2 for ratio in ratios.values()):
        return "One seed cannot tell a difference from chance: what follows are observations, not findings."
    groups = {
        f"Samples surely better than {base}'s": [arm for arm, ratio in ratios.items() if _better(ratio)],
        f"Samples surely worse than {base}'s": [arm for arm, ratio in ratios.items() if _worse(ratio)],
        "No difference in samples that can be told from chance": [a for a, ratio in ratios.items() if not ratio.sure],
    }
    return " ".join(f"{what}: {_listed([arm.title for arm in arms])}." for what, arms in groups.items() if arms)


def change(ratio: Estimate) -> str:
    """The logarithm of a ratio as per cent, with its interval.

    >>> change(Estimate(-0.105, 0.05, 0.04, 3))
    '-10.0 % (-14.4 to -5.4)'
    """
    mean, low, high = (_signed(percent(value)) for value in (ratio.mean, ratio.low, ratio.high))
    return f"{mean} %" if ratio.n < 2 else f"{mean} % ({low} to {high})"


def memorises(results: Results, arm: Arm, last: int) -> bool:
    """Nearer to the training set's exact answer than the baseline, and surely better in nothing else."""
    exact, quality, held_out = (results.ratio(arm, last, name) for name in ("exact_error", "frechet", "held_out_loss"))
    return _better(exact) and not _better(quality) and not _better(held_out)


def _of_arm(results: Results, arm: Arm, last: int) -> str:
    ratios = {name: results.ratio(arm, last, name) for name in MEASURED}
    said = [f"{arm.title} against {results.baseline.title}."]
    said += [f"{what}: {_verdict(ratios[name])}." for name, what in MEASURED.items()]
    quality = GOAL * results.over_seeds(results.baseline, last, "frechet").mean
    if (speed := results.speed(arm, quality)).n:
        said.append(f"Images needed to bring that distance down to {quality:.3g}: {_verdict(speed)}.")
    if memorises(results, arm, last):
        said.append(
            "The only gain that can be told from chance is nearness to the training set's exact answer: alone, that is "
            "memorisation, not quality."
        )
    elif _better(ratios["frechet"]) and _worse(ratios["held_out_loss"]):
        said.append("Samples came nearer to the training data while held-out data fared worse: mind memorisation.")
    near, copies = (results.over_seeds(arm, last, name).mean for name in ("nearest_ratio", "copies"))
    if near < 1 and _better(results.ratio(arm, last, "nearest_ratio")):
        said.append(
            f"Its samples lie nearer to training images than {results.baseline.title}'s do: {near:.3f} of held-out "
            f"data's distance, {copies:.1%} copies."
        )
    said.append(f"A step took {percent_of(results.overhead(arm))} time.")
    if isfinite(results.deadline):
        equal = results.ratio_at_equal_time(arm, "frechet")
        said.append(f"Frechet distance after equal time, {results.deadline:,.3g} s: {_verdict(equal)}.")
    return " ".join(said)


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


def _verdict(ratio: Estimate) -> str:
    if ratio.n < 2:
        return f"changed by {change(ratio)}"
    if not ratio.sure:
        return f"no difference that these seeds can tell from chance, {change(ratio)}"
    return f"{'lower' if ratio.mean < 0 else 'higher'}, {change(ratio)}"


def _better(ratio: Estimate) -> bool:
    return ratio.sure and ratio.mean < 0


def _worse(ratio: Estimate) -> bool:
    return ratio.sure and ratio.mean > 0


def _listed(names: list[str]) -> str:
    return f"{'; '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
