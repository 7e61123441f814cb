"""The page of a comparison in Markdown: a summary, three figures, and a table of all endpoints."""

import os
from collections import Counter
from collections.abc import Iterator
from math import isnan
from pathlib import Path
from statistics import median

from stablefield.config import Config
from stablefield.files import write_text
from stablefield.seeding import format_seeds
from stablefield.studies.compare.comparison import Comparison
from stablefield.studies.compare.endpoints import Finding, endpoints_hash
from stablefield.studies.compare.experiment import Arm, Experiment
from stablefield.studies.compare.figures import save_figures


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison, and its figures beside it.

    Args:
        comparison: the comparison.
        path: the page; the figures have the same name, with "-distance.png" and so on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = [f"# Training targets compared: {_data_name(comparison)}", *_status(comparison)]
    if _has_pairs(comparison):
        files = save_figures(comparison, path.with_suffix(""))
        figures = [f"![{name}]({os.path.relpath(files[name], path.parent)})\n\n{_CAPTIONS[name]}" for name in files]
        blocks += ["\n".join(f"* {line}" for line in summarize(comparison)), *_levels(comparison), *figures]
        blocks += _table(comparison)
    blocks += ["## Methods", "\n".join(f"* **{name}**: {text}" for name, text in _methods(comparison))]
    write_text(path, "\n\n".join(blocks) + "\n")


_CAPTIONS = {
    "distance": "Frechet distance of samples to the training data in the first feature space: geometric mean over "
    "seeds. Bands: 95 % interval of the ratio to the baseline, over paired seeds. Grey line: held-out data.",
    "endpoints": "All endpoints: change against the baseline with its 95 % interval. Filled: significant after Holm's "
    "correction over the page.",
    "loss": "Left: loss on held-out data. Right: variance of the gradient of a batch; thin lines with open markers: "
    "the part that is due to the target, which stable targets can lower; exact targets have none.",
}


def summarize(comparison: Comparison) -> list[str]:
    """Findings in one sentence per contrast.

    Args:
        comparison: the comparison.
    """
    if not _has_pairs(comparison):
        return ["No pair of runs is finished yet."]
    contrasts = zip(comparison.experiment.contrasts, comparison.findings_by_contrast, strict=True)
    return [_sentence(len(comparison.paired_seeds(*arms)), findings) for arms, findings in contrasts]


def _sentence(pairs: int, findings: tuple[Finding, ...]) -> str:
    """Numbers of endpoints of a contrast by direction, and the changes of the first two."""
    count = Counter(finding.direction for finding in findings)
    return (
        f"**{findings[0].contrast}** ({pairs} {'pair' if pairs == 1 else 'pairs'}): of {len(findings)} endpoints "
        f"{count['decreases']} decrease, {count['increases']} increase, {count['not distinguishable']} are not "
        f"distinguishable and {count['not measured']} not measured; "
        + "; ".join(f"{f.endpoint.title} [{f.endpoint.weights}] {_cell(f)}" for f in findings[:2])
    )


def _levels(comparison: Comparison) -> Iterator[str]:
    """Table of the means over seeds at the end of training, of averaged weights; a row per arm."""
    spaces = comparison.experiment.spaces
    real = comparison.machine["reference"]["held_out_distance"]
    columns = [f"{space}, to {data} data" for space in spaces for data in ("training", "held-out")]
    columns += ["held-out loss", "excess", "copies", "gradient variance", "of the target", "s per 1,000 images"]
    lines = [f"| arm | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    names = [name for space in spaces for name in (space, f"{space}, held-out")] + ["held-out loss", "excess", "copies"]
    for arm in comparison.experiment.arms:
        if any(each == arm for each, _ in comparison.lines):
            values = [comparison.mean_at_end(arm, name, "average") for name in names]
            values += [comparison.mean_at_end(arm, f"gradient_variance{end}") for end in ("", "_of_target")]
            times = comparison.steps.get("sec_per_kimg", {}).get(str(arm), [])
            cells = [f"{value:.3g}" for value in values] + [f"{median(times):.3g}" if times else ""]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    held_out = [cell for space in spaces for cell in (f"{real[space]:.3g}", "")]
    lines.append(f"| held-out data | {' | '.join(held_out + [''] * (len(columns) - len(held_out)))} |")
    yield "## At the end"
    yield "\n".join(lines)
    yield (
        "Averaged weights, means over seeds. The first columns are Frechet distances; gradients are those of the raw "
        "weights, and the part of the target is what stable targets can reduce."
    )


def _status(comparison: Comparison) -> Iterator[str]:
    """Findings in one line, and what a reader must know before reading on."""
    findings = comparison.findings
    if comparison.exploratory:
        yield (
            "**Exploratory.** Records were written under other endpoints than those listed here, so the endpoints were "
            "not fixed before the runs."
        )
    if not comparison.complete:
        total = len(comparison.experiment.arms) * len(comparison.experiment.seeds)
        yield f"**Unfinished**: {len(comparison.lines)} of {total} runs are complete; only complete pairs are used."
    count = Counter(finding.direction for finding in findings)
    yield (
        f"Of {len(findings)} endpoints fixed before the runs, {count['decreases']} decrease and {count['increases']} "
        "increase significantly (Holm, 5 % over the page); lower is better for each of them."
    )


def _table(comparison: Comparison) -> Iterator[str]:
    """Table of the endpoints of all contrasts."""
    yield "## All endpoints"
    contrasts = comparison.findings_by_contrast
    names = [found[0].contrast for found in contrasts]
    lines = [f"| endpoint | weights | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
    for row in zip(*contrasts, strict=True):
        lines.append(f"| {row[0].endpoint.title} | {row[0].endpoint.weights} | {' | '.join(map(_cell, row))} |")
    yield "\n".join(lines)
    yield "Change against the baseline (95 % interval), p-value after Holm's correction over the page, and the finding."


def _cell(finding: Finding) -> str:
    if isnan(finding.estimate.p):
        return finding.change
    if finding.direction == "not distinguishable":
        return f"{finding.change}, p = {finding.p_adjusted:.2g}: not distinguishable"
    p = f"p = {finding.p_adjusted:.2g}" if finding.p_adjusted >= 1e-4 else "p < 0.0001"
    return f"{finding.change}, {p}: **{finding.direction}**"


def _methods(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Everything that the numbers depend on."""
    experiment, machine = comparison.experiment, comparison.machine
    reference = machine.get("reference", {})
    config = experiment.config
    training = config.training
    yield "data", _data_name(comparison)
    for objective in experiment.objectives:
        objective_config = experiment.configure(Arm(objective, experiment.targets[0]).plain, 0)
        parts = ("process", "times", "weight", "preconditioning", "sampler", "grid")
        text = "; ".join(f"{name} {_component(objective_config, name)}" for name in parts)
        yield f"objective {objective}".strip(), text
    for arm in experiment.arms:
        if arm != arm.plain:
            yield f"{arm}", f"differs in {_differences(experiment, arm)}; evaluated as all arms of the objective"
    yield "network", _component(config, "network")
    yield (
        "training",
        f"{experiment.images:,} images per run, batches of {training.batch_size}, learning rate "
        f"{training.learning_rate:g}, averaged weights with a half-life of {training.half_lives[0]:,.0f} images",
    )
    yield "pairing", "runs with one seed share initial weights, order of images, and, per objective, times and noise"
    points = ", ".join(f"{point:,}" for point in experiment.evaluation_points)
    yield "evaluations", f"{experiment.evaluations}, after {points} images; {experiment.samples} samples each"
    for name, features in reference.get("features", {}).items():
        accuracy = f", {features['accuracy']:.1%} accuracy" if "accuracy" in features else ""
        yield f"feature space {name}", f"{features['identity']}{accuracy}; its Frechet distance is not FID"
    if len(experiment.spaces) < 2:
        yield "general image network", "not used: the data are not images, or `image-network` was not installed"
    if steps := comparison.steps:
        yield "equal time", f"step times measured alternately on {steps['date']}, load {steps['load']:.1f} before"
    else:
        yield "equal time", "not measured; `stablefield compare --measure-steps` on an idle machine adds it"
    yield "endpoints", f"{len(experiment.endpoints)} per contrast, hash {endpoints_hash(experiment.endpoints)}"
    about = {key: value for key, value in machine.items() if key != "reference"}
    yield "machine", ", ".join(f"{key} {value}" for key, value in about.items())
    yield "seeds", format_seeds(experiment.seeds)
    for day, command in experiment.commands:
        yield f"command of {day}", f"`{command}`"


def _differences(experiment: Experiment, arm: Arm) -> str:
    """Keys that settings of an arm change, with their values."""
    own, shared = (experiment.configure(each, 0) for each in (arm, arm.plain))
    changed = own.differences(shared).items()
    return ", ".join(f"{key} {value}" for key, (value, _) in changed if value is not None)


def _component(config: Config, section: str) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in config.values(section).items() if key != "kind")
    return f"{config.kind(section)} ({rest})" if rest else config.kind(section)


def _data_name(comparison: Comparison) -> str:
    config, reference = comparison.experiment.config, comparison.machine.get("reference", {})
    path = f" {Path(config.data_path).name}" if config.data_path else ""
    sizes = f", {reference['train_size']:,} to train on, {reference['held_out_size']:,} held out" if reference else ""
    return f"{config.kind('data')}{path}{sizes}"


def _has_pairs(comparison: Comparison) -> bool:
    return any(comparison.paired_seeds(*contrast) for contrast in comparison.experiment.contrasts)
