"""Summary of a comparison in sentences; a difference is claimed only where its interval excludes zero.

A denoiser may come closer to the exact posterior mean over the training set without better samples or a lower loss on
held-out data. Then it has memorised the training set, which the summary reports as such.
"""

from math import isfinite

from stablefield.studies.compare.experiment import Arm
from stablefield.studies.compare.results import Results, percent
from stablefield.studies.compare.statistics import Estimate

__all__ = ["format_change", "format_overhead", "memorises", "summarize"]

SCORE_TITLES = {
    "frechet": "Frechet distance of samples to the training data",
    "held_out_loss": "Loss on held-out data",
    "exact_error": "Error to the exact posterior mean over the training set",
    "gradient_variance": "Variance of the gradient",
}
QUALITY_FACTOR = 1.5  # of the baseline's final Frechet distance: large enough that most seeds reach it


def summarize(results: Results) -> list[str]:
    """A paragraph on the comparison, then one for every arm but the baseline.

    Args:
        results: results of the experiment, finished or not.
    """
    images = results.compared_at
    if images is None:
        return ["Nothing has been evaluated yet."]
    experiment, seeds = results.experiment, len(results.common_seeds(images))
    sentences = [
        f"{_enumerate([arm.title for arm in experiment.arms])} were trained on the same images, times and noise, from "
        f"the same initial weights, and compared after {images:,} images per run, over {_count(seeds, 'seed')}."
    ]
    if images < experiment.images or seeds < len(experiment.seeds):
        sentences.append(
            f"The experiment is not finished: it is planned with {experiment.images:,} images per run and "
            f"{_count(len(experiment.seeds), 'seed')}."
        )
    return [
        " ".join([*sentences, _headline(results, images)]),
        *(_compare_with_baseline(results, arm, images) for arm in results.others),
    ]


def format_change(log_ratio: Estimate) -> str:
    """A log ratio as a change in per cent, with its interval.

    Args:
        log_ratio: estimate of the log ratio.

    >>> format_change(Estimate(-0.105, 0.05, 0.04, 3))
    '-10.0 % (-14.4 to -5.4)'
    """
    mean, low, high = (_signed(percent(value)) for value in (log_ratio.mean, log_ratio.low, log_ratio.high))
    return f"{mean} %" if log_ratio.n < 2 else f"{mean} % ({low} to {high})"


def format_overhead(overhead: float) -> str:
    """A relative change of time in words.

    Args:
        overhead: the relative change.

    >>> format_overhead(0.031), format_overhead(-0.002)
    ('3 % more', 'the same')
    """
    if abs(overhead) < 0.005 or overhead != overhead:
        return "the same"
    return f"{abs(overhead):.0%} {'more' if overhead > 0 else 'less'}".replace("%", " %")


def memorises(results: Results, arm: Arm, images: int) -> bool:
    """True if an arm is closer to the exact posterior mean than the baseline, and significantly better in nothing else.

    Args:
        results: results of the experiment.
        arm: the arm.
        images: evaluation point at which they are compared.
    """
    exact, quality, held_out = (
        results.log_ratio(arm, images, name) for name in ("exact_error", "frechet", "held_out_loss")
    )
    return _better(exact) and not _better(quality) and not _better(held_out)


def _headline(results: Results, images: int) -> str:
    """Which arms have better or worse samples than the baseline."""
    ratios = {arm: results.log_ratio(arm, images, "frechet") for arm in results.others}
    baseline = results.baseline.title
    if all(ratio.n < 2 for ratio in ratios.values()):
        return "One seed cannot separate a difference from chance: the following are observations, not findings."
    groups = {
        f"Samples significantly better than {baseline}'s": [arm for arm, ratio in ratios.items() if _better(ratio)],
        f"Samples significantly worse than {baseline}'s": [arm for arm, ratio in ratios.items() if _worse(ratio)],
        "No significant difference in samples": [arm for arm, ratio in ratios.items() if not ratio.significant],
    }
    return " ".join(f"{text}: {_enumerate([arm.title for arm in arms])}." for text, arms in groups.items() if arms)


def _compare_with_baseline(results: Results, arm: Arm, images: int) -> str:
    """A paragraph on one arm."""
    baseline = results.baseline.title
    ratios = {name: results.log_ratio(arm, images, name) for name in SCORE_TITLES}
    sentences = [f"{arm.title} against {baseline}."]
    sentences += [f"{title}: {_verdict(ratios[name])}." for name, title in SCORE_TITLES.items()]
    quality = QUALITY_FACTOR * results.mean(results.baseline, images, "frechet").mean
    if (ratio := results.log_ratio_of_images(arm, quality)).n:
        sentences.append(f"Images needed to reach a Frechet distance of {quality:.3g}: {_verdict(ratio)}.")
    if memorises(results, arm, images):
        sentences.append(
            "The only significant gain is a smaller error to the exact posterior mean over the training set: on its "
            "own, this is memorisation, not quality."
        )
    elif _better(ratios["frechet"]) and _worse(ratios["held_out_loss"]):
        sentences.append(
            "Samples came closer to the training data while the loss on held-out data increased, a possible sign of "
            "memorisation."
        )
    near, copies = (results.mean(arm, images, name).mean for name in ("nearest_ratio", "copies"))
    if near < 1 and _better(results.log_ratio(arm, images, "nearest_ratio")):
        sentences.append(
            f"Its samples are closer to training images than {baseline}'s: at {near:.3f} of the distance of held-out "
            f"data, with {copies:.1%} copies."
        )
    sentences.append(f"A step took {format_overhead(results.overhead(arm))} time.")
    if isfinite(results.equal_time):
        equal = results.log_ratio_at_equal_time(arm, "frechet")
        sentences.append(f"Frechet distance after equal time, {results.equal_time:,.3g} s: {_verdict(equal)}.")
    return " ".join(sentences)


def _signed(number: float) -> str:
    return f"{number:+.1f}" if abs(number) >= 1 else f"{number:+.2g}"


def _verdict(log_ratio: Estimate) -> str:
    """Direction and size of a change, or that it is not significant."""
    if log_ratio.n < 2:
        return f"changed by {format_change(log_ratio)}"
    if not log_ratio.significant:
        return f"no significant difference, {format_change(log_ratio)}"
    return f"{'lower' if log_ratio.mean < 0 else 'higher'}, {format_change(log_ratio)}"


def _better(log_ratio: Estimate) -> bool:
    return log_ratio.significant and log_ratio.mean < 0


def _worse(log_ratio: Estimate) -> bool:
    return log_ratio.significant and log_ratio.mean > 0


def _enumerate(names: list[str]) -> str:
    return f"{'; '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
