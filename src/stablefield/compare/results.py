"""What came out of an experiment: every number, and what follows from them."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import exp, inf, isfinite, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

from stablefield.checkpoint import finite, replacing, write_text
from stablefield.compare.experiment import Arm, Experiment
from stablefield.compare.runs import scores
from stablefield.compare.statistics import Estimate, images_to_reach, paired, paired_ratio, roughness, value_at
from stablefield.config import Allowed

# of the baseline's last Frechet distance: how good is good
GOALS = (2.0, 1.5, 1.2, 1.0)
SCORES = ("frechet", "frechet_held_out", "held_out_loss", "exact_error")  # that are above 0, and better if lower


@dataclass(frozen=True)
class Results:
    """Everything that was measured so far.

    Attributes:
        scores: of each arm and seed, a line a look.
        training: of each arm and seed, a line a turn.
        about: what the yardstick says of itself.
        machine: what it ran on.
    """

    experiment: Experiment
    scores: Mapping[tuple[Arm, int], list[dict[str, Any]]]
    training: Mapping[tuple[Arm, int], list[dict[str, Any]]]
    about: Mapping[str, Any]
    machine: Mapping[str, Any]

    @classmethod
    def read(cls, out: Path, *, allow: Iterable[Allowed] = ()) -> "Results":
        """From an experiment's folder, however far it has come.

        Args:
            allow: classes outside this package that its network may be, as of `resolve`.
        """
        experiment = Experiment.read(out, allow=allow)
        runs = [(arm, seed) for arm in experiment.arms for seed in experiment.seeds]
        folders = {run: experiment.folder(out, *run) for run in runs}
        notes = [json.loads((out / name).read_text()) for name in ("yardstick.json", "machine.json")]
        return cls(
            experiment,
            {run: scores(folder) for run, folder in folders.items()},
            {run: folder.history() for run, folder in folders.items()},
            *notes,
        )

    @property
    def baseline(self) -> Arm:
        return self.experiment.arms[0]

    @property
    def others(self) -> tuple[Arm, ...]:
        return self.experiment.arms[1:]

    def at(self, arm: Arm, images: int, name: str) -> dict[int, Any]:
        """A score of an arm after so many images, by seed."""
        seeds = self.experiment.seeds
        lines = ((seed, line) for seed in seeds for line in self.scores[arm, seed] if line["images"] == images)
        return {seed: line[name] for seed, line in lines}

    def over_seeds(self, arm: Arm, images: int, name: str) -> Estimate:
        """Its mean."""
        return Estimate.of(list(self.at(arm, images, name).values()))

    def difference(self, arm: Arm, images: int, name: str) -> Estimate:
        """Paired with the baseline."""
        return paired(self.at(arm, images, name), self.at(self.baseline, images, name))

    def ratio(self, arm: Arm, images: int, name: str) -> Estimate:
        """Paired with the baseline, as a logarithm."""
        return paired_ratio(self.at(arm, images, name), self.at(self.baseline, images, name))

    @cached_property
    def marks(self) -> list[int]:
        """Where all arms have been scored with at least one common seed."""
        return [mark for mark in self.experiment.marks if self.common(mark)]

    def common(self, mark: int) -> set[int]:
        """Seeds with which all arms have been scored after so many images."""
        return set.intersection(*(set(self.at(arm, mark, "frechet")) for arm in self.experiment.arms))

    @cached_property
    def last(self) -> int | None:
        """Where arms are compared: the last mark with two common seeds, or with one if there is none; None before."""
        for enough in (2, 1):
            if found := [mark for mark in self.marks if len(self.common(mark)) >= enough]:
                return found[-1]
        return None

    def curve(self, arm: Arm, seed: int, name: str) -> tuple[list[int], list[float]]:
        """A score against images."""
        lines = self.scores[arm, seed]
        return [line["images"] for line in lines], [line[name] for line in lines]

    def needed(self, arm: Arm, quality: float) -> dict[int, float]:
        """Images until the Frechet distance is this small, by seed, of seeds that have come to the end; or inf."""
        return {
            seed: images_to_reach(quality, *self.curve(arm, seed, "frechet"))
            for seed in self.experiment.seeds
            if self.last is not None and seed in self.common(self.last)
        }

    def speed(self, arm: Arm, quality: float) -> Estimate:
        """log(images needed / the baseline's), pair by pair, over the seeds where both get there."""
        mine, theirs = (
            {seed: images for seed, images in self.needed(each, quality).items() if isfinite(images)}
            for each in (arm, self.baseline)
        )
        return paired_ratio(mine, theirs)

    def roughness(self, arm: Arm) -> Estimate:
        """Of the Frechet distance from look to look, relative."""
        curves = [self.curve(arm, seed, "frechet")[1] for seed in self.experiment.seeds]
        return Estimate.of([rough for curve in curves if isfinite(rough := roughness(curve))])

    def paces(self, arm: Arm, seed: int) -> dict[int, float]:
        """Seconds per thousand images of a run, in each stretch that it has come through (or in the first)."""
        stretch = self.experiment.stretch
        spent, seen, before = dict[int, float](), dict[int, int](), 0
        for line in self.training[arm, seed]:
            images = round(1000 * line["Progress/kimg"])
            number = (images - 1) // stretch  # that of the turn's last image
            seen[number] = seen.get(number, 0) + images - before
            spent[number] = spent.get(number, 0.0) + line["Timing/sec_per_kimg"] * (images - before)
            before = images
        whole = [number for number in seen if before >= (number + 1) * stretch]
        return {number: spent[number] / seen[number] for number in whole or seen}

    def seconds(self, arm: Arm) -> float:
        """Per thousand images: the median over all stretches; nan before any."""
        found = [pace for seed in self.experiment.seeds for pace in self.paces(arm, seed).values()]
        return median(found) if found else float("nan")

    def overhead(self, arm: Arm) -> float:
        """Seconds an image, relative to the baseline: the median over stretches, compared pair by pair."""
        ratios = [
            pace / theirs[number] - 1
            for seed in self.experiment.seeds
            for theirs in [self.paces(self.baseline, seed)]
            for number, pace in self.paces(arm, seed).items()
            if number in theirs
        ]
        return median(ratios) if ratios else float("nan")

    def pace(self, arm: Arm) -> float:
        """Seconds of training per thousand images, all arms by one clock; nan before any turn.

        The baseline's median, and what this arm takes beside it, stretch by stretch: what slows the machine down now
        and then slows no arm down more than another.
        """
        return self.seconds(self.baseline) * (1 + self.overhead(arm))

    @cached_property
    def deadline(self) -> float:
        """Seconds of training after which the fastest arm has seen the images at which arms are compared."""
        return (self.last or 0) / 1000 * min(map(self.pace, self.experiment.arms))

    def by_then(self, arm: Arm) -> float:
        """Images that an arm has seen at that moment."""
        # a ratio first, which is 1 for the fastest
        return (self.last or 0) * (min(map(self.pace, self.experiment.arms)) / self.pace(arm))

    def at_equal_time(self, arm: Arm, name: str) -> dict[int, float]:
        """A score of an arm at that moment, by seed."""
        assert self.last is not None
        images = self.by_then(arm)
        found = {seed: value_at(images, *self.curve(arm, seed, name)) for seed in sorted(self.common(self.last))}
        return {seed: value for seed, value in found.items() if isfinite(value)}

    def ratio_at_equal_time(self, arm: Arm, name: str) -> Estimate:
        """Paired with the baseline, as a logarithm."""
        return paired_ratio(self.at_equal_time(arm, name), self.at_equal_time(self.baseline, name))

    def faster(self, arm: Arm, quality: float) -> Estimate:
        """As `speed`, of seconds instead of images; how long a step takes is one number an arm, without an interval."""
        return self.speed(arm, quality).moved(log(self.pace(arm) / self.pace(self.baseline)))

    def statistics(self) -> dict[str, Any]:
        """What follows from the numbers, for `results.json`."""
        last = self.last
        if last is None:
            return {"images": None}
        names = [
            name for name, value in self.scores[self.baseline, min(self.common(last))][-1].items() if _is_number(value)
        ]
        quality = self.over_seeds(self.baseline, last, "frechet").mean
        return {
            "images": last,
            "seconds": self.deadline,
            "seeds": sorted(self.common(last)),
            "baseline": str(self.baseline),
            "arms": {
                str(arm): {
                    "scores": {name: _plain(self.over_seeds(arm, last, name)) for name in names},
                    "differences": {name: _plain(self.difference(arm, last, name)) for name in names},
                    "images_to_reach": {
                        f"{goal * quality:.6g}": _known(self.needed(arm, goal * quality)) for goal in GOALS
                    },
                    "log_ratio_of_images_to_reach": {
                        f"{goal * quality:.6g}": _plain(self.speed(arm, goal * quality)) for goal in GOALS
                    },
                    "roughness": _plain(self.roughness(arm)),
                    "seconds_per_kimg": self.seconds(arm),
                    "seconds_per_kimg_paired": self.pace(arm),
                    "at_equal_time": {
                        "images": self.by_then(arm),
                        "scores": {
                            name: _plain(Estimate.of(list(self.at_equal_time(arm, name).values()))) for name in names
                        },
                        "log_ratios": {name: _plain(self.ratio_at_equal_time(arm, name)) for name in SCORES},
                    },
                    "seconds_to_reach": {
                        f"{goal * quality:.6g}": _known(self.needed(arm, goal * quality), self.pace(arm) / 1000)
                        for goal in GOALS
                    },
                    "log_ratio_of_seconds_to_reach": {
                        f"{goal * quality:.6g}": _plain(self.faster(arm, goal * quality)) for goal in GOALS
                    },
                    "overhead": self.overhead(arm),
                }
                for arm in self.experiment.arms
            },
        }

    def write(self, out: Path) -> None:
        """`results.json` and `results.csv`."""
        whole = {
            "experiment": self.experiment.said() | {"marks": self.experiment.marks},
            "machine": self.machine,
            "yardstick": self.about,
            "statistics": self.statistics(),
            "scores": [run | line for run, lines in self._lines(self.scores) for line in lines],
            "training": [run | line for run, lines in self._lines(self.training) for line in lines],
        }
        write_text(out / "results.json", json.dumps(finite(whole), indent=1) + "\n")
        with replacing(out / "results.csv") as beside, beside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["arm", "seed", "images", "name", "noise_level", "value"])
            writer.writerows(self._rows())

    def _lines(
        self, of: Mapping[tuple[Arm, int], list[dict[str, Any]]]
    ) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        return (({"arm": str(arm), "seed": seed}, lines) for (arm, seed), lines in of.items())

    def _rows(self) -> Iterator[list[Any]]:
        """One number a row."""
        for (arm, seed), lines in self.scores.items():
            pace = self.pace(arm)
            for line in lines:
                yield [arm, seed, line["images"], "training_seconds", "", line["images"] / 1000 * pace]
                for name, value in line.items():
                    if name.endswith("_by_level"):
                        for level, part in zip(self.about["levels"], value, strict=True):
                            yield [arm, seed, line["images"], name.removesuffix("_by_level"), f"{level:.6g}", part]
                    elif name != "images":
                        yield [arm, seed, line["images"], name, "", value]
        for (arm, seed), lines in self.training.items():
            for line in lines:
                for name, value in line.items():
                    if name != "Progress/kimg":
                        yield [arm, seed, round(1000 * line["Progress/kimg"]), name, "", value]


def percent(logarithm: float) -> float:
    """What a logarithm of a ratio makes, in per cent."""
    return 100 * (exp(logarithm) - 1) if logarithm < 700 else inf


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _plain(estimate: Estimate) -> dict[str, Any]:
    return asdict(estimate)


def _known(needed: Mapping[int, float], unit: float = 1.0) -> dict[str, Any]:
    reached = [unit * images for images in needed.values() if isfinite(images)]
    return {"reached": len(reached), "of": len(needed), "mean": fmean(reached) if reached else None}
