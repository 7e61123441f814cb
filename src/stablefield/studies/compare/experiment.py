"""Definition of a comparison: arms that differ only in their target, seeds, and the points at which they are evaluated.

DIR/experiment.json               what is compared
    evaluator.json, machine.json  what the arms are evaluated with, and the machine
    runs/ARM/seed-0/              a run like any other: config.toml, checkpoint.safetensors, metrics.jsonl
                    evaluations.jsonl   its scores, one line per evaluation
                    samples/            a sheet of its first samples per evaluation
    report.html, summary.md, results.json, results.csv

Two arms with the same seed start from the same weights and train on the same images, times and noise: the random
numbers of a step depend on the seed and the number of images seen (`engine.train`), never on the arm.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stablefield.config import Allowed, Config, ConfigError, overlay, resolve
from stablefield.data import Progress, silent
from stablefield.engine.checkpoints import RESUMABLE_KEYS
from stablefield.files import write_text
from stablefield.pool import Pool
from stablefield.run import RunFolder, fingerprint, refuse_other_data

__all__ = ["SUPPORT_SIZE_KEYS", "Arm", "Experiment", "experiment_file"]

FORMAT = "stablefield comparison 1"
# targets that can be compared, and the configuration key of the support size that is written after the colon
SUPPORT_SIZE_KEYS = {"dsm": "", "stf": "size", "knn": "neighbours", "exact": ""}
CHANGEABLE_KEYS = RESUMABLE_KEYS - {"training.images"}  # the number of images decides the evaluation points


@dataclass(frozen=True)
class Arm:
    """A target to compare, written `dsm`, `stf:256`, `knn:64` or `exact`.

    Attributes:
        kind: kind of the target, as in the section `target` of a configuration.
        number: number of candidates in the support, for the kinds that have one; None for the others.
    """

    kind: str
    number: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """The arm that a text such as `stf:256` names.

        Args:
            text: the kind, followed by a colon and the number where the kind has one.

        Raises:
            ConfigError: the kind is unknown, or the number is missing, not a number, or not used by this kind.
        """
        kind, colon, number = text.strip().partition(":")
        known = kind in SUPPORT_SIZE_KEYS
        if not known or bool(colon) != bool(SUPPORT_SIZE_KEYS[kind]) or (colon and not number.isdecimal()):
            kinds = ", ".join(f"{kind}:NUMBER" if key else kind for kind, key in SUPPORT_SIZE_KEYS.items())
            raise ConfigError(f"cannot compare the target {text.strip()!r}; write it as one of {kinds}")
        return cls(kind, int(number) if colon else None)

    def __str__(self) -> str:
        return self.kind if self.number is None else f"{self.kind}:{self.number}"

    @property
    def title(self) -> str:
        """Name of the target in reports, as papers write it."""
        titles = {"dsm": "DSM", "exact": "exact"}
        return f"STF, n = {self.number:,}" if self.kind == "stf" else titles.get(self.kind, str(self))

    def configure(self, base: Config, seed: int) -> Config:
        """Configuration of this arm's run with one seed.

        Args:
            base: configuration that all arms share.
            seed: training seed of the run.
        """
        # further keys of the shared target section apply only to targets of its kind
        shared = base["target"] if base["target"]["kind"] == self.kind else {}
        number = {SUPPORT_SIZE_KEYS[self.kind]: self.number} if self.number is not None else {}
        target = {**shared, "kind": self.kind, **number}
        sections = overlay({**base.sections, "target": target}, {"training": {"seed": seed}})
        return resolve(sections, allow=base.allowed)


@dataclass(frozen=True)
class Experiment:
    """A comparison: what is trained, and how it is evaluated.

    Attributes:
        config: configuration that all arms share.
        arms: targets to compare; the first is the baseline.
        seeds: training seeds; every arm has one run per seed.
        evaluations: number of evaluations of each run, at image counts that grow by equal factors.
        samples: number of samples per evaluation.
        examples: number of examples x_t per noise level and evaluation.
        command: command line that started the comparison.
        started: date on which it was started (ISO 8601).
        data_hash: hash of the data (see `fingerprint`); "" before they are loaded.

    Raises:
        ConfigError: there are fewer than two arms, an arm occurs twice, a number is too small, or there are more
            evaluations than training steps.
    """

    config: Config
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    evaluations: int = 8
    samples: int = 500
    examples: int = 256
    command: str = ""
    started: str = ""
    data_hash: str = ""

    def __post_init__(self) -> None:
        if len(self.arms) < 2 or len(set(self.arms)) < len(self.arms):
            arms = ", ".join(map(str, self.arms))
            raise ConfigError(f"a comparison needs at least two different targets, not {arms}; set --targets")
        if not self.seeds or min(self.evaluations, self.samples - 1, self.examples) < 1:
            raise ConfigError(
                "a comparison needs at least 1 seed, 1 evaluation, 2 samples and 1 example per noise level, not "
                f"{len(self.seeds)}, {self.evaluations}, {self.samples} and {self.examples}"
            )
        if len(set(self.evaluation_points)) < self.evaluations:
            raise ConfigError(
                f"{self.images:,} images are too few for {self.evaluations} evaluations; increase --images or "
                "decrease --evaluations"
            )

    @cached_property
    def images(self) -> int:
        """Number of images that each run trains on, rounded up to whole steps."""
        return self._whole_steps(self.config.training.images)

    @cached_property
    def evaluation_points(self) -> tuple[int, ...]:
        """Image counts at which runs are evaluated, from a sixteenth of the training to its end."""
        powers = [1 - point / max(1, self.evaluations - 1) for point in range(self.evaluations)]
        return tuple(self._whole_steps(self.images * 16.0**-power) for power in [*powers[:-1], 0.0])

    @cached_property
    def switch_points(self) -> tuple[int, ...]:
        """Image counts at which training switches to the next arm: about a hundred, and every evaluation point."""
        size = self.segment_images
        every = -(-self._whole_steps(min(self.images / 100, 5_000)) // size) * size
        return tuple(sorted({*range(every, self.images, every), *self.evaluation_points}))

    @cached_property
    def segment_images(self) -> int:
        """Number of images in a segment: the most for which any arm computes its targets in one call.

        Arms alternate, and their times are compared, in whole segments, because prefetched targets are paid for in
        the first step of a segment.
        """
        training = self.config.training
        # references that are the whole data set are computed as the exact target is
        prefetched = any(arm.kind in ("exact", "stf") for arm in self.arms)
        return training.batch_size * max(1, training.target_prefetch // training.batch_size if prefetched else 1)

    def _whole_steps(self, images: float) -> int:
        """A number of images, rounded up to whole steps."""
        size = self.config.training.batch_size
        return max(1, -int(-images // size)) * size

    def extended_by(self, other: "Experiment") -> "Experiment":
        """This experiment with the arms and seeds of another one added.

        Args:
            other: an experiment that differs in nothing but arms and seeds.

        Raises:
            ConfigError: they differ in anything else.
        """
        changed = [key for key in self.config.differences(other.config) if key not in CHANGEABLE_KEYS]
        names = ("evaluations", "samples", "examples")
        changed += [name for name in names if getattr(self, name) != getattr(other, name)]
        if changed:
            raise ConfigError(
                f"cannot change {', '.join(changed)} of an existing comparison, which can only be extended by targets "
                "and seeds; start a new one with another --out"
            )
        arms, seeds = dict.fromkeys((*self.arms, *other.arms)), dict.fromkeys((*self.seeds, *other.seeds))
        return replace(self, config=other.config, arms=tuple(arms), seeds=tuple(sorted(seeds)))

    def with_data_hash(self, progress: Progress = silent) -> "Experiment":
        """This experiment with the hash of its data, which are loaded for it.

        Args:
            progress: called with (done, total) while the data are decoded.

        Raises:
            ConfigError: the experiment was started with other data.
        """
        data: Pool = self.config.make("data").load(progress)
        data_hash = fingerprint(data)
        self.refuse_other_data(data, data_hash)
        return replace(self, data_hash=data_hash)

    def refuse_other_data(self, data: Pool, data_hash: str) -> None:
        """Check that data are those that the experiment was started with.

        Args:
            data: data that were loaded.
            data_hash: their hash.

        Raises:
            ConfigError: the experiment was started with other data.
        """
        if self.data_hash:
            way_out = "restore them, or start a new comparison with another --out"
            refuse_other_data(data, data_hash, self.data_hash, way_out)

    def run_folder(self, out: Path, arm: Arm, seed: int) -> RunFolder:
        """Folder of the run of one arm with one seed.

        Args:
            out: folder of the experiment.
            arm: the arm.
            seed: its training seed.
        """
        return RunFolder(out / "runs" / str(arm).replace(":", "-") / f"seed-{seed}")

    def write(self, out: Path) -> None:
        """Write `experiment.json`.

        Args:
            out: folder of the experiment, created if necessary.
        """
        write_text(experiment_file(out), json.dumps(self.as_dict(), indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """The content of `experiment.json`: a format version and all attributes as plain values."""
        arms = [str(arm) for arm in self.arms]
        return {"format": FORMAT, **asdict(self), "config": self.config.sections, "arms": arms}

    @classmethod
    def read(cls, out: Path, *, allow: Iterable[Allowed] = ()) -> "Experiment":
        """Read the experiment in a folder.

        Args:
            out: folder of the experiment.
            allow: classes outside this package that the configuration may name, as for `resolve`.

        Raises:
            ConfigError: there is no experiment, it is damaged or has another format version, or it names a class that
                is not allowed.
        """
        file = experiment_file(out)
        if not file.exists():
            raise ConfigError(f"there is no comparison in {out}: {file.name} is missing; start one with --out {out}")
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            _check_format(file, content.pop("format", None))
            arms, seeds = tuple(map(Arm.parse, content.pop("arms"))), tuple(content.pop("seeds"))
            return cls(config=resolve(content.pop("config"), allow=allow), arms=arms, seeds=seeds, **content)
        except (AttributeError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ConfigError(f"{file} is damaged: {error}") from None


def _check_format(file: Path, version: str | None) -> None:
    """Refuse a file of another format version."""
    if version != FORMAT:
        written = "has no format version" if version is None else f"has the format version {version!r}"
        raise ConfigError(
            f"{file} {written}, and this version of stablefield reads {FORMAT!r} only; start a new comparison with "
            "another --out"
        )


def experiment_file(out: Path) -> Path:
    """Path of the file that defines the experiment in a folder.

    Args:
        out: folder of the experiment.
    """
    return out / "experiment.json"
