"""Results of a comparison: every measured number, and the statistics that follow from them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import exp, inf, isfinite, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

from stablefield.config import Allowed
from stablefield.studies.compare.experiment import Arm, Experiment
from stablefield.studies.compare.runs import read_evaluations
from stablefield.studies.compare.statistics import (
    Estimate,
    images_to_reach,
    paired_difference,
    paired_log_ratio,
    roughness,
    value_at,
)

__all__ = ["POSITIVE_SCORES", "QUALITY_FACTORS", "Lines", "Results", "percent"]

QUALITY_FACTORS = (2.0, 1.5, 1.2, 1.0)  # qualities to reach, relative to the baseline's final Frechet distance
POSITIVE_SCORES = ("frechet", "frechet_held_out", "held_out_loss", "exact_error")  # lower is better

Lines = Mapping[tuple[Arm, int], list[dict[str, Any]]]  # by arm and seed


@dataclass(frozen=True)
class Results:
    """Measurements of an experiment, finished or not.

    Scores of single seeds are dictionaries by seed. Ratios to the baseline are estimated as logarithms, seed by seed.

    Attributes:
        experiment: the experiment.
        scores: scores by arm and seed, one dictionary per evaluation.
        training: training metrics by arm and seed, one dictionary per line of metrics.jsonl.
        evaluator: description of the evaluator (see `Evaluator.description`).
        machine: description of the machine.
    """

    experiment: Experiment
    scores: Lines
    training: Lines
    evaluator: Mapping[str, Any]
    machine: Mapping[str, Any]

    @classmethod
    def read(cls, out: Path, *, allow: Iterable[Allowed] = ()) -> "Results":
        """Read the results of an experiment, finished or not.

        Args:
            out: folder of the experiment.
            allow: classes outside this package that the configuration may name, as for `resolve`.

        Raises:
            ConfigError: there is no experiment, or it cannot be read.
        """
        experiment = Experiment.read(out, allow=allow)
        runs = [(arm, seed) for arm in experiment.arms for seed in experiment.seeds]
        folders = {run: experiment.run_folder(out, *run) for run in runs}
        descriptions = [json.loads((out / name).read_text()) for name in ("evaluator.json", "machine.json")]
        return cls(
            experiment,
            {run: read_evaluations(folder) for run, folder in folders.items()},
            {run: folder.history() for run, folder in folders.items()},
            *descriptions,
        )

    @property
    def baseline(self) -> Arm:
        """The arm that the others are compared with."""
        return self.experiment.arms[0]

    @property
    def others(self) -> tuple[Arm, ...]:
        """Arms other than the baseline."""
        return self.experiment.arms[1:]

    def by_seed(self, arm: Arm, images: int, name: str) -> dict[int, Any]:
        """A score of an arm at one evaluation point, by seed.

        Args:
            arm: the arm.
            images: the evaluation point.
            name: name of the score.
        """
        seeds = self.experiment.seeds
        lines = ((seed, line) for seed in seeds for line in self.scores[arm, seed] if line["images"] == images)
        return {seed: line[name] for seed, line in lines}

    def mean(self, arm: Arm, images: int, name: str) -> Estimate:
        """Mean of a score over seeds.

        Args:
            arm: the arm.
            images: the evaluation point.
            name: name of the score.
        """
        return Estimate.from_values(list(self.by_seed(arm, images, name).values()))

    def difference(self, arm: Arm, images: int, name: str) -> Estimate:
        """Paired difference of a score to the baseline.

        Args:
            arm: the arm.
            images: the evaluation point.
            name: name of the score.
        """
        return paired_difference(self.by_seed(arm, images, name), self.by_seed(self.baseline, images, name))

    def log_ratio(self, arm: Arm, images: int, name: str) -> Estimate:
        """Paired log ratio of a score to the baseline's.

        Args:
            arm: the arm.
            images: the evaluation point.
            name: name of the score.
        """
        return paired_log_ratio(self.by_seed(arm, images, name), self.by_seed(self.baseline, images, name))

    @cached_property
    def common_points(self) -> list[int]:
        """Evaluation points that all arms have reached with at least one common seed."""
        return [images for images in self.experiment.evaluation_points if self.common_seeds(images)]

    def common_seeds(self, images: int) -> set[int]:
        """Seeds with which all arms have been evaluated at one evaluation point.

        Args:
            images: the evaluation point.
        """
        return set.intersection(*(set(self.by_seed(arm, images, "frechet")) for arm in self.experiment.arms))

    @cached_property
    def compared_at(self) -> int | None:
        """Image count at which arms are compared.

        It is the last evaluation point with two common seeds, or with one if no point has two; None if there is none.
        """
        for enough in (2, 1):
            if points := [images for images in self.common_points if len(self.common_seeds(images)) >= enough]:
                return points[-1]
        return None

    def curve(self, arm: Arm, seed: int, name: str) -> tuple[list[int], list[float]]:
        """Image counts of the evaluations of one run, and a score at each.

        Args:
            arm: arm of the run.
            seed: training seed of the run.
            name: name of the score.
        """
        lines = self.scores[arm, seed]
        return [line["images"] for line in lines], [line[name] for line in lines]

    def images_to_reach(self, arm: Arm, quality: float) -> dict[int, float]:
        """Number of images until the Frechet distance falls to a value, by seed; inf where it does not.

        Only seeds that have been evaluated at the point of comparison count.

        Args:
            arm: the arm.
            quality: the Frechet distance to reach.
        """
        return {
            seed: images_to_reach(quality, *self.curve(arm, seed, "frechet"))
            for seed in self.experiment.seeds
            if self.compared_at is not None and seed in self.common_seeds(self.compared_at)
        }

    def log_ratio_of_images(self, arm: Arm, quality: float) -> Estimate:
        """Paired log ratio of the images needed to reach a quality to the baseline's, over seeds where both reach it.

        Args:
            arm: the arm.
            quality: the Frechet distance to reach.
        """
        ours, theirs = (
            {seed: images for seed, images in self.images_to_reach(each, quality).items() if isfinite(images)}
            for each in (arm, self.baseline)
        )
        return paired_log_ratio(ours, theirs)

    def roughness(self, arm: Arm) -> Estimate:
        """Relative scatter of the Frechet distance between evaluations (see `statistics.roughness`).

        Args:
            arm: the arm.
        """
        curves = [self.curve(arm, seed, "frechet")[1] for seed in self.experiment.seeds]
        return Estimate.from_values([value for curve in curves if isfinite(value := roughness(curve))])

    def segment_seconds_per_kimg(self, arm: Arm, seed: int) -> dict[int, float]:
        """Training time of one run by segment, in seconds per thousand images.

        Unfinished segments count only if the run has not finished any (see `Experiment.segment_images`).

        Args:
            arm: arm of the run.
            seed: training seed of the run.
        """
        size = self.experiment.segment_images
        times, counts, before = dict[int, float](), dict[int, int](), 0
        for line in self.training[arm, seed]:
            images = round(1000 * line["progress/kimg"])
            segment = (images - 1) // size  # the segment of the last image
            counts[segment] = counts.get(segment, 0) + images - before
            times[segment] = times.get(segment, 0.0) + line["timing/sec_per_kimg"] * (images - before)
            before = images
        finished = [segment for segment in counts if before >= (segment + 1) * size]
        return {segment: times[segment] / counts[segment] for segment in finished or counts}

    def seconds_per_kimg(self, arm: Arm) -> float:
        """Median training time of an arm over segments, in seconds per thousand images; nan before any training.

        Args:
            arm: the arm.
        """
        runs = (self.segment_seconds_per_kimg(arm, seed) for seed in self.experiment.seeds)
        times = [seconds for run in runs for seconds in run.values()]
        return median(times) if times else float("nan")

    def overhead(self, arm: Arm) -> float:
        """Relative additional training time per image: the median over segments, each compared with the baseline's.

        Args:
            arm: the arm.
        """
        ratios = [
            seconds / theirs[segment] - 1
            for seed in self.experiment.seeds
            for theirs in [self.segment_seconds_per_kimg(self.baseline, seed)]
            for segment, seconds in self.segment_seconds_per_kimg(arm, seed).items()
            if segment in theirs
        ]
        return median(ratios) if ratios else float("nan")

    def paired_seconds_per_kimg(self, arm: Arm) -> float:
        """Training time in seconds per thousand images: the baseline's median times one plus the arm's overhead.

        The overhead is measured segment by segment, so that a machine that is busy at times does not favour an arm.

        Args:
            arm: the arm.
        """
        return self.seconds_per_kimg(self.baseline) * (1 + self.overhead(arm))

    @cached_property
    def equal_time(self) -> float:
        """Training time in seconds at which arms are compared: when the fastest reaches `compared_at`."""
        return (self.compared_at or 0) / 1000 * min(map(self.paired_seconds_per_kimg, self.experiment.arms))

    def images_at_equal_time(self, arm: Arm) -> float:
        """Number of images that an arm has seen after `equal_time`.

        Args:
            arm: the arm.
        """
        fastest = min(map(self.paired_seconds_per_kimg, self.experiment.arms))
        # the ratio is computed first, because it is exactly 1 for the fastest arm
        return (self.compared_at or 0) * (fastest / self.paired_seconds_per_kimg(arm))

    def by_seed_at_equal_time(self, arm: Arm, name: str) -> dict[int, float]:
        """A score of an arm after `equal_time`, interpolated between evaluations, by seed.

        Args:
            arm: the arm.
            name: name of the score.
        """
        assert self.compared_at is not None
        images = self.images_at_equal_time(arm)
        seeds = sorted(self.common_seeds(self.compared_at))
        values = {seed: value_at(images, *self.curve(arm, seed, name)) for seed in seeds}
        return {seed: value for seed, value in values.items() if isfinite(value)}

    def log_ratio_at_equal_time(self, arm: Arm, name: str) -> Estimate:
        """Paired log ratio of a score to the baseline's after `equal_time`.

        Args:
            arm: the arm.
            name: name of the score.
        """
        return paired_log_ratio(self.by_seed_at_equal_time(arm, name), self.by_seed_at_equal_time(self.baseline, name))

    def log_ratio_of_seconds(self, arm: Arm, quality: float) -> Estimate:
        """Paired log ratio of the training time needed to reach a quality to the baseline's.

        The time per image is one number per arm, without an interval of its own.

        Args:
            arm: the arm.
            quality: the Frechet distance to reach.
        """
        ratio = self.paired_seconds_per_kimg(arm) / self.paired_seconds_per_kimg(self.baseline)
        return self.log_ratio_of_images(arm, quality).shifted(log(ratio))

    def statistics(self) -> dict[str, Any]:
        """The part `statistics` of results.json: means, paired differences and ratios at the point of comparison."""
        images = self.compared_at
        if images is None:
            return {"images": None}
        seeds = self.common_seeds(images)
        names = [name for name, value in self.scores[self.baseline, min(seeds)][-1].items() if _is_number(value)]
        return {
            "images": images,
            "seconds": self.equal_time,
            "seeds": sorted(seeds),
            "baseline": str(self.baseline),
            "arms": {str(arm): self._arm_statistics(arm, images, names) for arm in self.experiment.arms},
        }

    def _arm_statistics(self, arm: Arm, images: int, names: list[str]) -> dict[str, Any]:
        """Statistics of one arm for results.json."""
        final = self.mean(self.baseline, images, "frechet").mean
        qualities = {f"{factor * final:.6g}": factor * final for factor in QUALITY_FACTORS}
        seconds = self.paired_seconds_per_kimg(arm)
        return {
            "scores": {name: asdict(self.mean(arm, images, name)) for name in names},
            "differences": {name: asdict(self.difference(arm, images, name)) for name in names},
            "images_to_reach": {
                key: _summary(self.images_to_reach(arm, quality)) for key, quality in qualities.items()
            },
            "log_ratio_of_images_to_reach": {
                key: asdict(self.log_ratio_of_images(arm, quality)) for key, quality in qualities.items()
            },
            "roughness": asdict(self.roughness(arm)),
            "seconds_per_kimg": self.seconds_per_kimg(arm),
            "seconds_per_kimg_paired": seconds,
            "at_equal_time": {
                "images": self.images_at_equal_time(arm),
                "scores": {
                    name: asdict(Estimate.from_values(list(self.by_seed_at_equal_time(arm, name).values())))
                    for name in names
                },
                "log_ratios": {name: asdict(self.log_ratio_at_equal_time(arm, name)) for name in POSITIVE_SCORES},
            },
            "seconds_to_reach": {
                key: _summary(self.images_to_reach(arm, quality), seconds / 1000) for key, quality in qualities.items()
            },
            "log_ratio_of_seconds_to_reach": {
                key: asdict(self.log_ratio_of_seconds(arm, quality)) for key, quality in qualities.items()
            },
            "overhead": self.overhead(arm),
        }


def percent(log_ratio: float) -> float:
    """A log ratio as a change in per cent.

    Args:
        log_ratio: natural logarithm of the ratio.
    """
    return 100 * (exp(log_ratio) - 1) if log_ratio < 700 else inf


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _summary(images: Mapping[int, float], unit: float = 1.0) -> dict[str, Any]:
    """Number of seeds that reached a quality, and the mean of what they needed."""
    reached = [unit * count for count in images.values() if isfinite(count)]
    return {"reached": len(reached), "of": len(images), "mean": fmean(reached) if reached else None}
