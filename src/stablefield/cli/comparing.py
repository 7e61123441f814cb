"""The work of `stablefield compare`: the plan, and the progress of a comparison."""

from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stablefield.cli.progress import progress_bar
from stablefield.engine.stopping import stop_signals
from stablefield.studies.compare import Arm, Experiment, describe_machine, measure_steps
from stablefield.studies.compare import compare as run_comparison


def run_with_progress(experiment: Experiment, out: Path, jobs: int, stop_after: float) -> None:
    """Print the plan, and train and evaluate all runs with a progress bar.

    Args:
        experiment: the experiment.
        out: folder of the experiment.
        jobs: number of runs to train at once.
        stop_after: seconds after which training stops.
    """
    print(_describe_plan(experiment, out))
    seen: dict[tuple[Arm, int], int] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    times = (TimeElapsedColumn(), TimeRemainingColumn(compact=True), TextColumn("left; {task.fields[status]}"))
    with stop_signals() as stop, Progress(*columns, *times) as progress:
        total = experiment.images * len(experiment.arms) * len(experiment.seeds)
        bar = progress.add_task("comparing", total=total, status="")

        def report(arm: Arm, seed: int, status: int | str) -> None:
            if isinstance(status, int):
                seen[arm, seed] = status
                status = f"{status:,} images"
            progress.update(bar, completed=sum(seen.values()), status=f"{arm}, seed {seed}: {status}")

        run_comparison(
            experiment,
            out,
            jobs=jobs,
            stop_after=stop_after,
            should_stop=lambda: stop.number > 0,
            report=report,
            stage_progress=progress_bar,
        )


def _describe_plan(experiment: Experiment, out: Path) -> str:
    """Targets, runs and endpoints in a few lines."""
    runs = len(experiment.arms) * len(experiment.seeds)
    return "\n".join(
        (
            f"arms      {'; '.join(map(str, experiment.arms))}",
            f"runs      {runs}: seeds {', '.join(map(str, experiment.seeds))}; {experiment.images:,} images each, "
            f"{experiment.evaluations} evaluations",
            f"spaces    {', '.join(experiment.spaces)}",
            f"endpoints {len(experiment.endpoints)} for each of {len(experiment.contrasts)} comparisons",
            f"folder    {out}",
        )
    )


def print_step_times(experiment: Experiment, out: Path) -> None:
    """Measure training times, and print them.

    Args:
        experiment: the experiment.
        out: folder of the experiment.
    """
    if not (out / "comparison.json").exists():
        experiment.write(out)
    with progress_bar("measuring steps") as progress:
        line = measure_steps(experiment, out, describe_machine(experiment.config), report=progress)
    if line["load"] > 0.5:
        print(f"warning: the load average was {line['load']:.1f} before; measure on an idle machine")
    for arm, times in line["sec_per_kimg"].items():
        ordered = sorted(times)
        middle, least, most = ordered[len(times) // 2], ordered[0], ordered[-1]
        print(f"{arm:<24} {middle:.3g} s per 1,000 images ({least:.3g} to {most:.3g} over {len(times)} turns)")
    print(f"records   {out / 'records' / 'steps.jsonl'}")
