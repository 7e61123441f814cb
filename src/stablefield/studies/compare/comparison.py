"""A comparison from Python: start or resume it, and read what was found."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

import torch

from stablefield.build import build, choose_device
from stablefield.config import Allowed, Config, ConfigError
from stablefield.data import Progress, Source, StageProgress, silent, silent_stage
from stablefield.data.identity import fingerprint
from stablefield.engine.checkpoints import locked
from stablefield.files import write_text
from stablefield.kinds import OBJECTIVES
from stablefield.run import RunFolder
from stablefield.studies.compare.endpoints import (
    WEIGHTS,
    Endpoint,
    Finding,
    endpoints_hash,
    measure_endpoint,
)
from stablefield.studies.compare.evaluator import find_spaces
from stablefield.studies.compare.experiment import Arm, Experiment
from stablefield.studies.compare.runs import ReportRun, Worker, is_finished, read_lines, run_all, step_ratio
from stablefield.studies.compare.statistics import Curve, holm


@dataclass(frozen=True)
class Comparison:
    """Records of a comparison, finished or not, and what follows from them. Only finished pairs of runs count.

    Attributes:
        experiment: the experiment.
        lines: records by arm and seed, one dictionary per evaluation; finished runs only.
        machine: description of the machine and of what samples were compared with.
        steps: the newest measurement of training times; empty if there is none.
    """

    experiment: Experiment
    lines: Mapping[tuple[Arm, int], list[dict[str, Any]]]
    machine: Mapping[str, Any]
    steps: Mapping[str, Any]

    @classmethod
    def read(cls, out: Path, *, allow: Iterable[Allowed] = ()) -> "Comparison":
        """Read a comparison from its records; weights and data are not needed.

        Args:
            out: folder of the comparison.
            allow: classes outside this package that the configuration may name, as for `resolve`.

        Raises:
            ConfigError: there is no comparison, or it cannot be read.
        """
        experiment = Experiment.read(out, allow=allow)
        runs = [(arm, seed) for arm in experiment.arms for seed in experiment.seeds]
        lines = {
            run: sorted(read_lines(experiment.record_file(out, *run)), key=lambda line: line["images"])
            for run in runs
            if is_finished(experiment, out, *run)
        }
        machine = out / "records" / "machine.json"
        steps = read_lines(out / "records" / "steps.jsonl")
        return cls(
            experiment,
            lines,
            json.loads(machine.read_text()) if machine.exists() else {},
            steps[-1] if steps else {},
        )

    @property
    def complete(self) -> bool:
        """True if all runs are finished."""
        return len(self.lines) == len(self.experiment.arms) * len(self.experiment.seeds)

    @property
    def exploratory(self) -> bool:
        """True if records were written under other endpoints than those of the comparison."""
        fixed = endpoints_hash(self.experiment.endpoints)
        return any(line["endpoints"] != fixed for lines in self.lines.values() for line in lines)

    def paired_seeds(self, arm: Arm, baseline: Arm) -> list[int]:
        """Seeds with which both arms are finished.

        Args:
            arm: an arm.
            baseline: the baseline of its objective.
        """
        return [s for s in self.experiment.seeds if (arm, s) in self.lines and (baseline, s) in self.lines]

    def curves(self, arm: Arm, weights: str, quantity: str, seeds: Sequence[int] | None = None) -> list[Curve]:
        """A quantity of an arm at every evaluation, one curve per seed.

        Args:
            arm: the arm.
            weights: "average" or "raw".
            quantity: a feature space, "held-out loss" or "excess".
            seeds: the seeds; by default all that are finished.
        """
        seeds = [s for s in self.experiment.seeds if (arm, s) in self.lines] if seeds is None else seeds
        lines = [self.lines[arm, seed] for seed in seeds]
        return [Curve([x["images"] for x in run], [x[weights].get(quantity, math.nan) for x in run]) for run in lines]

    def mean_at_end(self, arm: Arm, name: str, weights: str = "") -> float:
        """Mean over finished seeds of a number in the last record; nan if there is none.

        Args:
            arm: the arm.
            name: name of the number.
            weights: "average" or "raw"; "" for numbers of the whole run.
        """
        last = [lines[-1] for (each, _), lines in self.lines.items() if each == arm]
        values = [(line[weights] if weights else line).get(name, math.nan) for line in last]
        return fmean(values) if values else math.nan

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """Findings of every endpoint for every target, corrected together by Holm's method."""
        asked = [(c, endpoint) for c in self.experiment.contrasts for endpoint in self.experiment.endpoints]
        estimates = [self._estimate(*contrast, endpoint) for contrast, endpoint in asked]
        adjusted = holm([estimate.p for estimate in estimates])
        return tuple(
            Finding(arm.objective, arm.target, baseline.target, endpoint, estimate, p)
            for ((arm, baseline), endpoint), estimate, p in zip(asked, estimates, adjusted, strict=True)
        )

    @property
    def findings_by_contrast(self) -> tuple[tuple[Finding, ...], ...]:
        """The findings of each contrast, in the order of `Experiment.contrasts`."""
        count = len(self.experiment.endpoints)
        return tuple(self.findings[at : at + count] for at in range(0, len(self.findings), count))

    def _estimate(self, arm: Arm, baseline: Arm, endpoint: Endpoint) -> Any:
        seeds = self.paired_seeds(arm, baseline)
        ours, theirs = (self.curves(each, endpoint.weights, endpoint.quantity, seeds) for each in (arm, baseline))
        return measure_endpoint(endpoint, ours, theirs, step_ratio(self.steps, arm, baseline))

    def finding(self, target: str, endpoint: str, objective: str = "") -> Finding:
        """The finding of one endpoint for one target.

        Args:
            target: the target.
            endpoint: the endpoint as text, such as "average/classifier/area".
            objective: name of the objective.

        Raises:
            KeyError: there is no such finding.
        """
        for found in self.findings:
            if (found.target, str(found.endpoint), found.objective) == (target, endpoint, objective):
                return found
        raise KeyError(f"there is no endpoint {endpoint!r} of {target!r}; weights are {', '.join(WEIGHTS)}")


def define(
    config: Config,
    *,
    targets: Sequence[str],
    seeds: Sequence[int],
    objectives: Sequence[str] = (),
    command: tuple[str, str] = ("", ""),
    progress: Progress = silent,
    **options: Any,
) -> Experiment:
    """Define a comparison: load its data, hold a part of them out, and fix its endpoints.

    Args:
        config: configuration that all runs share. If it holds out no data, a sixth is held out, at most 5,000.
        targets: targets to compare; the first is the baseline.
        seeds: training seeds.
        objectives: names of objectives (`OBJECTIVES`); by default the objective of the configuration.
        command: date and command line.
        progress: called with (done, total) while the data are decoded.
        **options: `evaluations`, `samples` and `examples` of `Experiment`.

    Raises:
        ConfigError: there is no such objective, or the configuration does not fit the data.
    """
    if unknown := set(objectives) - OBJECTIVES.keys():
        raise ConfigError(f"there is no objective {', '.join(sorted(unknown))!r}; choose from {', '.join(OBJECTIVES)}")
    source: Source = config.make("data")
    data = source.load(progress)
    if source.holdout == 0:
        config = config.changed(data={"holdout": min(max(2, len(data) // 6), 5000)})
    chosen = {name: OBJECTIVES[name] for name in objectives} or {"": ()}
    return Experiment(
        config,
        tuple(targets),
        tuple(seeds),
        find_spaces(data),
        chosen,
        commands=(command,),
        data_hash=fingerprint(data),
        **options,
    )


def compare(
    experiment: Experiment,
    out: Path,
    *,
    jobs: int = 1,
    stop_after: float = math.inf,
    should_stop: Callable[[], bool] = lambda: False,
    report: ReportRun = lambda arm, seed, status: None,
    stage_progress: StageProgress = silent_stage,
) -> Comparison:
    """Start or resume a comparison, and return what was found so far.

    Args:
        experiment: the comparison, from `define`. If the folder holds one, it is resumed, and may be extended by
            targets, objectives and seeds.
        out: folder of the comparison.
        jobs: number of runs that are trained at once; with more than one, each has a process of one thread.
        stop_after: seconds after which everything is saved, to be resumed by the next call.
        should_stop: called after every step; once it returns True, everything is saved as well.
        report: called as runs proceed, with the arm, the seed, and the images seen or what is prepared.
        stage_progress: opens a progress callback for each stage of the preparation, given its title.

    Raises:
        ConfigError: the folder holds another comparison, the data have changed, or a target does not fit the data.
    """
    end = monotonic() + stop_after
    allow = experiment.config.allowed
    if (out / "comparison.json").exists():
        before = Experiment.read(out, allow=allow)
        merged = {**before.objectives, **experiment.objectives}
        experiment = before.extended_by(replace(experiment, objectives=merged))
    for arm in experiment.arms:  # targets that do not fit the data are refused before any training
        with stage_progress(f"{arm}: nearest neighbours") as progress:
            parts = build(experiment.configure(arm, experiment.seeds[0]), progress)
    experiment.refuse_other_data(parts.data, fingerprint(parts.data))
    with locked(RunFolder(out)):
        experiment.write(out)
        worker = Worker(out, allow, stage_progress)
        machine = describe_machine(experiment.config, jobs) | {"reference": worker.reference(parts).description()}
        write_text(out / "records" / "machine.json", json.dumps(machine, indent=1) + "\n")
        run_all(worker, jobs, report, lambda: should_stop() or monotonic() > end)
    return Comparison.read(out, allow=allow)


def describe_machine(config: Config, jobs: int = 1) -> dict[str, Any]:
    """Device, processor and versions for the report.

    Args:
        config: configuration that names the device.
        jobs: number of runs that are trained at once.
    """
    device = choose_device(config.training.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if jobs == 1 else 1,
        "jobs": jobs,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
