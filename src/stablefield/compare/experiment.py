"""An experiment: arms that differ in their target and in nothing else, seeds, and when to look at them.

DIR/experiment.json               what is compared
    runs/ARM/seed-0/              a run like any other: config.toml, checkpoint.safetensors, metrics.jsonl
                    looks.jsonl   what was measured of it, a line a look
                    samples/      its first samples, at each look
    report.html, summary.md, results.json, results.csv

Two arms with one seed start from the same weights and see the same images, times and noise: what a step draws follows
from the seed and the images seen (`engine.train`), and from nothing that an arm decides.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stablefield.checkpoint import write_text
from stablefield.config import Allowed, Config, ConfigError, overlay, resolve
from stablefield.data import Progress, silent
from stablefield.engine.choice import decided
from stablefield.engine.saving import MAY_CHANGE
from stablefield.reference import Pool
from stablefield.run import Folder, assemble, fingerprint, refuse_other_data

# the targets that can be compared, and the one number that tells those of a kind apart
NUMBER = {"single": "", "reference": "size", "neighbours": "neighbours", "full": "", "pruned": "", "auto": ""}
FREE = MAY_CHANGE - {"training.images"}  # which says where runs are looked at


@dataclass(frozen=True)
class Arm:
    """A target to compare, as people write it: `single`, `reference:256`, `neighbours:64`, `full`, `pruned`
    or `auto`.

    Attributes:
        kind: as in the section `target` of a configuration.
        number: members of the support, where the kind needs it.
    """

    kind: str
    number: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Raises:
        ConfigError: a number that is none, is missing, or means nothing to this kind.
        """
        kind, colon, number = text.strip().partition(":")
        if kind not in NUMBER or bool(colon) != bool(NUMBER[kind]) or (colon and not number.isdecimal()):
            kinds = ", ".join(f"{kind}:NUMBER" if key else kind for kind, key in NUMBER.items())
            raise ConfigError(f"a target to compare looks like one of {kinds}, not {text.strip()!r}")
        return cls(kind, int(number) if colon else None)

    def __str__(self) -> str:
        return self.kind if self.number is None else f"{self.kind}:{self.number}"

    @property
    def title(self) -> str:
        """As papers call it."""
        titles = {"single": "DSM", "full": "exact", "pruned": "exact (pruned)", "auto": "chosen by noise"}
        return f"STF, n = {self.number:,}" if self.kind == "reference" else titles.get(self.kind, str(self))

    def configured(self, base: Config, seed: int) -> Config:
        """The configuration of this arm's run with a seed."""
        # what all have in common says more only of a target of the same kind
        common = base["target"] if base["target"]["kind"] == self.kind else {}
        number = {NUMBER[self.kind]: self.number} if self.number is not None else {}
        target = {**common, "kind": self.kind, **number}
        sections = overlay({**base.sections, "target": target}, {"training": {"seed": seed}})
        return resolve(sections, allow=base.allowed)


@dataclass(frozen=True)
class Experiment:
    """What is compared, and how it is looked at.

    Attributes:
        config: what all arms have in common.
        arms: the first is what the others are compared with.
        seeds: one run of each arm for each.
        looks: how often each run is scored, at image counts that grow by equal factors.
        samples: how many are made at each look.
        rows: x_t at each noise level, at each look.
        command: how it was begun.
        begun: on which day.
        data: hash of the data (see `fingerprint`); "" before they are loaded.

    Raises:
        ConfigError: less than two arms, an arm or seed named twice, or more looks than steps.
    """

    config: Config
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    looks: int = 8
    samples: int = 500
    rows: int = 256
    command: str = ""
    begun: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        if len(self.arms) < 2 or len(set(self.arms)) < len(self.arms):
            raise ConfigError(f"there must be at least two different targets, not {', '.join(map(str, self.arms))}")
        if not self.seeds or min(self.looks, self.samples - 1, self.rows) < 1:
            raise ConfigError("there must be at least one seed, one look, two samples and one row")
        if len(set(self.marks)) < self.looks:
            raise ConfigError(f"{self.images:,} images are too few for {self.looks} looks: train longer, or look less")

    @cached_property
    def images(self) -> int:
        """Of each run, in whole steps."""
        return self._steps(self.config.training.images)

    @cached_property
    def marks(self) -> tuple[int, ...]:
        """Image counts at which runs are scored: the last at the end, the first at a sixteenth of it."""
        powers = [1 - look / max(1, self.looks - 1) for look in range(self.looks)]
        return tuple(self._steps(self.images * 16.0**-power) for power in [*powers[:-1], 0.0])

    @cached_property
    def goals(self) -> tuple[int, ...]:
        """Image counts at which another arm has its turn: up to a hundred, and every mark."""
        turn = -(-self._steps(min(self.images / 100, 5_000)) // self.stretch) * self.stretch
        return tuple(sorted({*range(turn, self.images, turn), *self.marks}))

    @cached_property
    def stretch(self) -> int:
        """Images of the steps whose targets are asked for together, in the arm that asks for most.

        Turns are of whole stretches, and so are times: what is asked for beforehand is paid for at once.
        """
        configs = [arm.configured(self.config, self.seeds[0]) for arm in self.arms]
        size = self.config.training.batch_size
        return size * max(1, *(config["target"].get("at_once", 1) // size for config in configs))

    def _steps(self, images: float) -> int:
        size = self.config.training.batch_size
        return max(1, -int(-images // size)) * size

    def joined(self, other: "Experiment") -> "Experiment":
        """This one, with the arms and seeds of another beside its own.

        Raises:
            ConfigError: they differ in anything else.
        """
        changed = [key for key in self.config.differences(other.config) if key not in FREE]
        changed += [name for name in ("looks", "samples", "rows") if getattr(self, name) != getattr(other, name)]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)}: this experiment was begun otherwise, and can only be given more targets and "
                "seeds; for another one choose another --out"
            )
        arms, seeds = dict.fromkeys((*self.arms, *other.arms)), dict.fromkeys((*self.seeds, *other.seeds))
        return replace(self, config=other.config, arms=tuple(arms), seeds=tuple(sorted(seeds)))

    def with_data(self, progress: Progress = silent) -> "Experiment":
        """With the hash of its data.

        Raises:
            ConfigError: they are not those that it was begun with.
        """
        data: Pool = self.config.make("data").load(progress)
        found = fingerprint(data)
        self.refuse_other_data(data, found)
        return replace(self, data=found)

    def refuse_other_data(self, data: Pool, found: str) -> None:
        """Raises:
        ConfigError: data of this hash are not those that it was begun with.
        """
        if self.data:
            way_out = "bring those back, or begin another comparison with another --out"
            refuse_other_data(data, found, self.data, way_out)

    def decided(self, progress: Progress = silent) -> "Experiment":
        """With the bands of its `auto` target, if it has one, decided once for all runs (and kept in `config`).

        Args:
            progress: told while they are measured.
        """
        auto = Arm("auto")
        if auto not in self.arms:
            return self
        config = auto.configured(self.config, self.seeds[0])
        if config["target"]["bands"]:
            return self
        config, _, _ = decided(config, assemble(config, progress), progress=progress)
        sections = {**self.config.sections, "target": config["target"]}
        return replace(self, config=resolve(sections, allow=self.config.allowed))

    def folder(self, out: Path, arm: Arm, seed: int) -> Folder:
        """Where the run of an arm with a seed is."""
        return Folder(out / "runs" / str(arm).replace(":", "-") / f"seed-{seed}")

    def write(self, out: Path) -> None:
        """Into its folder."""
        out.mkdir(parents=True, exist_ok=True)
        write_text(place(out), json.dumps(self.said(), indent=2) + "\n")

    def said(self) -> dict[str, Any]:
        """In plain values."""
        return {**asdict(self), "config": self.config.sections, "arms": [str(arm) for arm in self.arms]}

    @classmethod
    def read(cls, out: Path, *, allow: Iterable[Allowed] = ()) -> "Experiment":
        """From its folder.

        Args:
            allow: classes outside this package that its network may be, as of `resolve`.

        Raises:
            ConfigError: there is none, it is damaged, or it names a class that is not allowed.
        """
        if not place(out).exists():
            raise ConfigError(f"{out} holds no experiment: there is no {place(out).name}")
        try:
            said: dict[str, Any] = json.loads(place(out).read_text())
            arms, seeds = tuple(map(Arm.parse, said.pop("arms"))), tuple(said.pop("seeds"))
            return cls(config=resolve(said.pop("config"), allow=allow), arms=arms, seeds=seeds, **said)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ConfigError(f"{place(out)} is damaged: {error}") from None


def place(out: Path) -> Path:
    """The file that says what an experiment in this folder is."""
    return out / "experiment.json"
