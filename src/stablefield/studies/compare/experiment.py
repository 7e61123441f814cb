"""Definition of a comparison: objectives, targets, seeds, evaluation points and endpoints, fixed before the first run.

DIR/comparison.json          the definition, with the hash of its endpoints and of its data
    records/RUN.jsonl        scores of a run, one line per evaluation
            steps.jsonl      training times, measured alternately by `--measure-steps`
            machine.json     the machine, and what samples were compared with
    README.md, *.png         the page, made from the files above alone
    checkpoints/             weights of the runs: large, not needed by the page, ignored by git

An arm is a target with an objective, maybe with settings of its own. Two arms with the same seed start from the same
weights and train on the same images; with the same objective, also at the same times and noise (`engine.train`), except
for what their settings change.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stablefield.config import (
    Allowed,
    Config,
    ConfigError,
    describe_target,
    override,
    resolve,
    split_settings,
    target_section,
)
from stablefield.data.identity import refuse_other_data
from stablefield.engine.checkpoints import RESUMABLE_KEYS
from stablefield.files import write_text
from stablefield.pool import Pool
from stablefield.run import RunFolder
from stablefield.studies.compare.endpoints import Endpoint, endpoints_hash, fixed_endpoints
from stablefield.times import Adaptive

FORMAT = "stablefield comparison 2"
MIN_EVALUATIONS = 10
CHANGEABLE_KEYS = RESUMABLE_KEYS - {"training.images"}  # the number of images decides the evaluation points
ARM_SECTIONS = ("times", "weight", "preconditioning", "network", "training")
# what pairs runs, what decides the evaluation points, and where all runs are computed
SHARED_KEYS = {f"training.{key}" for key in ("seed", "images", "batch_size", "conditional", "device")}


@dataclass(frozen=True)
class Arm:
    """A target with an objective.

    Attributes:
        objective: name of the objective; "" if all runs share that of the configuration.
        target: the target as text, with settings of the arm or without.
    """

    objective: str
    target: str

    def __str__(self) -> str:
        name = describe_target(self.target)
        return f"{self.objective}, {name}" if self.objective else name

    @property
    def plain(self) -> "Arm":
        """The arm without settings of its own."""
        return Arm(self.objective, split_settings(self.target)[0])


@dataclass(frozen=True)
class Experiment:
    """A comparison: what is trained, how it is evaluated, and what decides.

    Attributes:
        config: configuration that all runs share.
        targets: targets to compare; the first is the baseline.
        seeds: training seeds; every arm has one run per seed.
        spaces: names of the feature spaces in which samples are compared with the data.
        objectives: settings of each objective by name; by default the objective of the configuration.
        evaluations: number of evaluations of each run, at image counts that grow by equal factors.
        samples: number of samples per evaluation.
        examples: number of x_t that the excess is measured on.
        commands: date and command line of the start and of every later extension.
        data_hash: hash of the data (see `data.identity`); "" before they are loaded.
        endpoints: the endpoints; by default all of `fixed_endpoints`.

    Raises:
        ConfigError: there are fewer than two targets, a target occurs twice, a number is too small, or there are more
            evaluations than training steps.
    """

    config: Config
    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    spaces: tuple[str, ...]
    objectives: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"": ()})
    evaluations: int = 12
    samples: int = 500
    examples: int = 2048
    commands: tuple[tuple[str, str], ...] = ()
    data_hash: str = ""
    endpoints: tuple[Endpoint, ...] = ()

    def __post_init__(self) -> None:
        if not self.endpoints:
            object.__setattr__(self, "endpoints", fixed_endpoints(self.spaces))
        if len(self.targets) < 2 or len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"a comparison needs at least two different targets, not {', '.join(self.targets)}")
        if self.evaluations < MIN_EVALUATIONS:
            raise ConfigError(
                f"{self.evaluations} evaluations are too few: areas and spreads need at least {MIN_EVALUATIONS}"
            )
        if not self.seeds or min(self.samples - 1, self.examples) < 1:
            raise ConfigError(
                "a comparison needs at least 1 seed, 2 samples and 1 example, not "
                f"{len(self.seeds)}, {self.samples} and {self.examples}"
            )
        if len(set(self.evaluation_points)) < self.evaluations:
            raise ConfigError(
                f"{self.images:,} images are too few for {self.evaluations} evaluations; raise --images, or lower "
                "--evaluations or training.batch_size"
            )
        for arm in self.arms:
            self.configure(arm, 0)

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """Pairs of an objective and a target."""
        return tuple(Arm(objective, target) for objective in self.objectives for target in self.targets)

    @cached_property
    def contrasts(self) -> tuple[tuple[Arm, Arm], ...]:
        """Each arm that is not a baseline, with its baseline."""
        return tuple((arm, baseline) for arm in self.arms if (baseline := self.baseline(arm)) != arm)

    def baseline(self, arm: Arm) -> Arm:
        """The arm that an arm is compared with: the same without its settings if there is one, else the first target.

        Args:
            arm: the arm.
        """
        first = Arm(arm.objective, self.targets[0])
        return arm.plain if arm not in (first, arm.plain) and arm.plain in self.arms else first

    @cached_property
    def images(self) -> int:
        """Number of images that each run trains on, rounded up to whole steps."""
        return self._whole_steps(self.config.training.images)

    @cached_property
    def evaluation_points(self) -> tuple[int, ...]:
        """Image counts at which runs are evaluated, from a sixteenth of the training to its end."""
        powers = [1 - point / (self.evaluations - 1) for point in range(self.evaluations)]
        return tuple(self._whole_steps(self.images * 16.0**-power) for power in [*powers[:-1], 0.0])

    def _whole_steps(self, images: float) -> int:
        """A number of images, rounded up to whole steps."""
        size = self.config.training.batch_size
        return max(1, -int(-images // size)) * size

    def configure(self, arm: Arm, seed: int) -> Config:
        """Configuration of a run.

        Args:
            arm: the arm.
            seed: training seed of the run.

        Raises:
            ConfigError: the arm has a setting that all runs share, or one of a wrong form or value.
        """
        text, settings = split_settings(arm.target)
        # further keys of the shared section apply only to targets of its kind
        target = target_section(text, self.config.allowed)
        config = self.config.changed(self.objectives[arm.objective], target=target, training={"seed": seed})
        if settings:
            config = config.changed(**_with_base(config, _own_sections(settings)))
        times = config.make("times")
        if isinstance(times, Adaptive) and not times.reweight:
            raise ConfigError(
                f"{arm}: times.reweight=false follows the excess that a run measures as it trains, which runs of a "
                "comparison do not; leave it out"
            )
        return config

    def extended_by(self, other: "Experiment") -> "Experiment":
        """This experiment with the arms and seeds of another one added.

        Args:
            other: an experiment that differs in nothing but targets, objectives and seeds.

        Raises:
            ConfigError: they differ in anything else.
        """
        changed = [key for key in self.config.differences(other.config) if key not in CHANGEABLE_KEYS]
        names = ("evaluations", "samples", "examples", "spaces", "endpoints")
        changed += [name for name in names if getattr(self, name) != getattr(other, name)]
        changed += [f"objective {k}" for k in self.objectives if list(self.objectives[k]) != list(other.objectives[k])]
        if changed:
            raise ConfigError(
                f"cannot change {', '.join(changed)} of an existing comparison, which can only be extended by targets, "
                "objectives and seeds; start a new one with another --out"
            )
        added = ("targets", "objectives", "seeds")
        same = all(set(getattr(self, name)) >= set(getattr(other, name)) for name in added)
        return replace(
            self,
            config=other.config,
            targets=tuple(dict.fromkeys((*self.targets, *other.targets))),
            objectives={**self.objectives, **other.objectives},
            seeds=tuple(sorted({*self.seeds, *other.seeds})),
            commands=self.commands if same else (*self.commands, *other.commands),
        )

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
        """Folder of the checkpoints of a run.

        Args:
            out: folder of the experiment.
            arm: the arm.
            seed: its training seed.
        """
        return RunFolder(out / "checkpoints" / _run_name(arm, seed))

    def record_file(self, out: Path, arm: Arm, seed: int) -> Path:
        """File of the scores of a run.

        Args:
            out: folder of the experiment.
            arm: the arm.
            seed: its training seed.
        """
        return out / "records" / f"{_run_name(arm, seed)}.jsonl"

    def write(self, out: Path) -> None:
        """Write `comparison.json`, and folders for records and checkpoints.

        Args:
            out: folder of the experiment, created if necessary.
        """
        for name in ("records", "checkpoints"):
            (out / name).mkdir(parents=True, exist_ok=True)
        write_text(out / "checkpoints" / ".gitignore", "*\n")
        endpoints = {"endpoints": list(map(str, self.endpoints)), "endpoints_hash": endpoints_hash(self.endpoints)}
        content = {"format": FORMAT, **asdict(replace(self, endpoints=())), "config": self.config.sections, **endpoints}
        write_text(out / "comparison.json", json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, out: Path, *, allow: Iterable[Allowed] = ()) -> "Experiment":
        """Read the experiment in a folder.

        Args:
            out: folder of the experiment.
            allow: classes outside this package that the configuration may name, as for `resolve`.

        Raises:
            ConfigError: there is no experiment; it is damaged or has another format version; its endpoints do not have
                the hash that was written with them; or it names a class that is not allowed.
        """
        file = out / "comparison.json"
        if not file.exists():
            raise ConfigError(f"there is no comparison in {out}: {file.name} is missing; start one with --out {out}")
        new = "start a new comparison with another --out"
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            if (version := content.pop("format", None)) != FORMAT:
                raise ConfigError(f"{file} has the format version {version!r}, not {FORMAT!r}; {new}")
            config = resolve(content.pop("config"), allow=allow)
            content["endpoints"] = tuple(map(Endpoint.parse, content["endpoints"]))
            if (found := endpoints_hash(content["endpoints"])) != (written := content.pop("endpoints_hash")):
                raise ConfigError(
                    f"the endpoints in {file} have the hash {found}, not {written} as when the comparison was started; "
                    f"restore the file, or {new}"
                )
            names = ("targets", "seeds", "spaces")
            content |= {name: tuple(content[name]) for name in names}
            return cls(config, **(content | {"commands": tuple(map(tuple, content["commands"]))}))
        except (AttributeError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ConfigError(f"{file} is damaged: {error}") from None


def _own_sections(settings: list[str]) -> dict[str, Any]:
    """Sections that the settings of an arm change.

    Raises:
        ConfigError: a setting that all runs share.
    """
    sections = override({}, settings)
    for section, values in sections.items():
        for name in (f"{section}.{key}" for key in values):
            if section not in ARM_SECTIONS or name in SHARED_KEYS:
                raise ConfigError(
                    f"{name} cannot differ between targets; they may change {', '.join(ARM_SECTIONS)} (but not "
                    f"{', '.join(sorted(SHARED_KEYS))}); set it for all runs with --set"
                )
    return sections


def _with_base(config: Config, changes: dict[str, Any]) -> dict[str, Any]:
    """Sections in which an adaptive distribution of t without a base has that of the objective."""
    own = changes.get("times", {})
    if own.get("kind") != "adaptive" or "base" in own or config.kind("times") == "adaptive":
        return changes
    kind, *parameters = config.values("times").values()
    return {**changes, "times": {"base": kind, "parameters": parameters, **own}}


def _run_name(arm: Arm, seed: int) -> str:
    target, settings = split_settings(arm.target)
    parts = [re.sub(r"[^\w.]+", "-", part) for part in (arm.objective, target) if part]
    own = "".join("+" + re.sub(r"[^\w.=+-]+", "-", setting) for setting in settings)  # the sign of a number stays
    return f"{'-'.join(parts)}{own}-seed-{seed}"
