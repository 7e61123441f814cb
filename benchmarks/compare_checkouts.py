"""Check that two checkouts compute the same results, bit for bit.

    python compare_checkouts.py BEFORE AFTER [--renamed] [--only REGEX] [--steps 200] [--out FOLDER]

Each checkout trains short runs on the digits, on one thread, for every target and variant (labels with dropout,
augmentations, bfloat16, micro-batches, two ranks, ...), samples from a run with every sampler, scores it, and measures
the variance of targets. The results of both are compared by SHA-256, item by item; where they differ, the largest
difference is printed. No hash is stored: they depend on the machine.

Settings are written in the names of AFTER. If those of BEFORE are older, --renamed translates them by `RENAMED`.
The exit status is 0 if all results are equal, and 1 otherwise.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RENAMED = {
    "target.kind=dsm": "target.kind=single",
    "target.kind=stf": "target.kind=reference",
    "target.references=recent": "target.kind=rolling",
    "target.kind=knn": "target.kind=neighbours",
    "target.kind=exact": "target.kind=pruned",
    "target.missing_mass=0": "target.kind=full",
    "target.missing_mass": "target.lost",
    "training.target_sharding": "target.sharded",
    "training.target_prefetch": "target.at_once",
    "training.micro_batch_size": "training.micro_batch",
    "training.learning_rate_warmup": "training.ramp",
    "training.gradient_clip": "training.clip",
    "preconditioning.kind=none": "scaling.kind=predicts",
    "preconditioning.prediction_type": "scaling.head",
    "--noise-levels": "--levels",
}
"""Settings (`section.key=value`), keys (`section.key`) or options of AFTER, and their names in BEFORE."""

BASE = (
    "network.kind=unet",
    "network.channels=8",
    "training.batch_size=16",
    "training.learning_rate_warmup=320",
    "training.ema_half_life=[320, 1600]",
    "training.log_every=320",
    "data.holdout=100",
    "sampler.steps=4",
)
TARGETS = {
    "dsm": ("target.kind=dsm",),
    "stf": ("target.kind=stf", "target.size=64"),
    "stf recent": ("target.kind=stf", "target.references=recent", "target.size=64"),
    "knn": ("target.kind=knn", "target.neighbours=16"),
    "exact": ("target.kind=exact", "target.missing_mass=1e-8"),
    "exact streamed": ("target.kind=exact", "target.missing_mass=0"),
}
LABELS = ("training.conditional=true", "training.label_dropout=0.2")
VARIANTS = {
    "plain": (),
    "labels": LABELS,
    "edm augmentation": ("augmentation.kind=edm", "augmentation.p=0.3"),
    "mirror": ("augmentation.kind=mirror",),
    "bfloat16": ("training.precision=bfloat16",),
    "micro-batches": ("training.micro_batch_size=5", "training.gradient_clip=1.0"),
    "flow": ("process.kind=flow", "preconditioning.kind=none", "preconditioning.prediction_type=velocity"),
}
SAMPLERS = (
    *("heun", "euler", "dpm", "rk45", "ancestral", "euler-maruyama", "reverse-diffusion", "predictor-corrector"),
)
SHARDABLE = ("exact", "exact streamed")
NUMBER = r"-?\d+(\.\d*)?(e[-+]?\d+)?|-?inf|nan"
UNSTABLE = ("timing/", "resources/", "timestamp")  # metrics that depend on the time and the machine

Arrays = dict[str, np.ndarray]  # by `item/name`


@dataclass(frozen=True)
class Case:
    """Something to compute in both checkouts.

    Attributes:
        name: what is printed.
        measure: computes the results in an empty folder, given the translation of settings and the number of steps.
    """

    name: str
    measure: Callable[[Path, "Names", int], Arrays]


@dataclass(frozen=True)
class Names:
    """Translation of settings into those of a checkout.

    Attributes:
        table: settings or keys, and what the checkout calls them; empty for a checkout with the names of this file.
    """

    table: Mapping[str, str]

    def flags(self, settings: Sequence[str]) -> list[str]:
        """The settings as options of the command line."""
        return [part for setting in settings for part in ("--set", self.translated(setting))]

    def option(self, option: str) -> str:
        """An option of the command line in the names of the checkout."""
        return self.table.get(option, option)

    def translated(self, setting: str) -> str:
        """A setting in the names of the checkout."""
        key, _, value = setting.partition("=")
        return self.table.get(setting) or f"{self.table.get(key, key)}={value}"


def cases() -> Iterator[Case]:
    """Everything to compare."""
    for target, of_target in TARGETS.items():
        for variant, of_variant in VARIANTS.items():
            yield training_case(f"{target}, {variant}", (*of_target, *of_variant))
        yield training_case(f"{target}, two ranks", (*of_target, *LABELS), ranks=2)
        if target in SHARDABLE:
            settings = (*of_target, *LABELS, "training.target_sharding=true")
            yield training_case(f"{target}, two ranks, sharded", settings, ranks=2)
    yield Case("samplers", measure_samplers)
    yield Case("evaluate", measure_scores)
    yield Case("field", measure_field)


def training_case(name: str, settings: Sequence[str], ranks: int = 1) -> Case:
    """A short run, on one rank or several, and samples from it."""

    def measure(folder: Path, names: Names, steps: int) -> Arrays:
        train(folder / "run", settings, names, steps, ranks)
        return results_of(folder / "run") | {"samples/heun": draw(folder / "run")}

    return Case(name, measure)


def train(run: Path, settings: Sequence[str], names: Names, steps: int, ranks: int = 1) -> None:
    """Train a run with the command line, within this process if it has one rank."""
    arguments = ["train", "--out", str(run), *names.flags((*BASE, *settings, f"training.images={16 * steps}"))]
    if ranks == 1:
        command(*arguments)
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*launch, "-m", "stablefield", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"torchrun ended with {done.returncode}: {done.stderr[-2000:]}")


def command(*arguments: str) -> None:
    """Call the command line within this process."""
    from typer.testing import CliRunner

    from stablefield.cli import app

    result = CliRunner().invoke(app, list(arguments))
    if result.exception:
        raise result.exception


def results_of(run: Path) -> Arrays:
    """Tensors of the newest checkpoint, and all metrics that do not depend on the time."""
    from safetensors.numpy import load_file

    items = {"model": "weights", "optimizer": "optimizer"}
    found: Arrays = {}
    for key, value in load_file(run / "checkpoint.safetensors").items():
        group, _, name = key.partition(".")
        if group.startswith("average"):
            found[f"averages/{key}"] = value
        elif group in items:
            found[f"{items[group]}/{name}"] = value
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stable = [{k: v for k, v in line.items() if not k.lower().startswith(UNSTABLE)} for line in lines]
    return found | {"metrics/all": sorted_numbers(stable)}


def draw(run: Path, settings: Sequence[str] = ("sampler.steps=4",), label: int | None = None) -> np.ndarray:
    """Eight samples of a run in float64, with the sampler of the settings."""
    from stablefield.build import build_sampler
    from stablefield.config import override, resolve
    from stablefield.run import load, open_run

    sampler = build_sampler(resolve(override(open_run(run).config.sections, settings)))
    return sampler(load(run), (1, 8, 8), seeds=range(8), label=label).x.numpy()


def measure_samplers(folder: Path, names: Names, steps: int) -> Arrays:
    """Samples of a run with labels by every sampler, of one class, and with guidance."""
    run = folder / "run"
    train(run, (*TARGETS["stf"], *LABELS), names, steps)
    found: Arrays = {}
    for kind in SAMPLERS:
        found[f"{kind}/all classes"] = draw(run, (f"sampler.kind={kind}", "sampler.steps=8"))
        found[f"{kind}/one class"] = draw(run, (f"sampler.kind={kind}", "sampler.steps=8"), label=3)
    guided = folder / "guided.npz"
    command("sample", str(run), "--seeds", "0-7", "--guidance", "2", "--out", str(guided))
    return found | {"guided/bytes": np.load(guided)["arr_0"]}


def measure_scores(folder: Path, names: Names, steps: int) -> Arrays:
    """Scores of a run by `evaluate`, in two feature spaces."""
    run = folder / "run"
    train(run, TARGETS["stf"], names, steps)
    command("evaluate", str(run), "--samples", "128", "--features", "pixels", "--features", "classifier")
    lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    return {"scores/all": sorted_numbers(lines)}


def measure_field(folder: Path, names: Names, steps: int) -> Arrays:
    """The table of the variance study, without and with labels."""
    found: Arrays = {}
    for name, options in {"plain": (), "conditional": ("--conditional",)}.items():
        out = folder / name
        command(
            "field", "digits", "--out", str(out), names.option("--noise-levels"), "4", "--sizes", "64,1024", *options
        )
        with (out / "field.csv").open() as file:
            cells = [cell for row in csv.reader(file) for cell in row if re.fullmatch(NUMBER, cell)]
        found[f"table/{name}"] = np.array(sorted(map(float, cells)))
    return found


def sorted_numbers(value: object) -> np.ndarray:
    """Floating-point numbers in JSON values, in ascending order and without their names."""

    def numbers(part: object) -> Iterator[float]:
        if isinstance(part, dict):
            part = list(part.values())
        if isinstance(part, list):
            for each in part:
                yield from numbers(each)
        elif isinstance(part, float):
            yield part

    return np.array(sorted(numbers(value)))


def measure_all(out: Path, names: Names, steps: int, only: str) -> None:
    """Compute the cases with the checkout that is on Python's path, and write a file for each."""
    import torch

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for case in cases():
        if not re.search(only, case.name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                arrays = case.measure(Path(folder), names, steps)
            except Exception:
                arrays = {"failed": np.array(traceback.format_exc())}
        np.savez(out / f"{case.name}.npz", **arrays)
        print(f"{out.name}: {case.name}", file=sys.stderr, flush=True)


def start(checkout: Path, out: Path, options: Sequence[str]) -> subprocess.Popen:
    """Start measuring a checkout in a process of its own, on one thread and with a cache of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve() / "src"),
        "OMP_NUM_THREADS": "1",
        "STABLEFIELD_CACHE": str(out.with_name(f"{out.name} cache")),
    }
    return subprocess.Popen([sys.executable, __file__, "--measure", str(out), *options], env=environment)


def report(case: str, before: Arrays, after: Arrays) -> bool:
    """Print a line for each item of a case; true if all are equal."""
    if failures := [str(arrays["failed"]) for arrays in (before, after) if "failed" in arrays]:
        print(f"{case:32} FAILED", *failures, sep="\n", flush=True)
        return False
    equal = True
    for item in dict.fromkeys(key.partition("/")[0] for key in (*before, *after)):
        one, other = (
            {key: value for key, value in arrays.items() if key.partition("/")[0] == item} for arrays in (before, after)
        )
        same = digest(one) == digest(other)
        print(f"{case:32} {item:20} {f'equal      {digest(one)[:12]}' if same else difference(one, other)}", flush=True)
        equal &= same
    return equal


def digest(arrays: Arrays) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for key in sorted(arrays):
        value = np.ascontiguousarray(arrays[key])
        found.update(f"{key} {value.dtype} {value.shape}".encode() + value.tobytes())
    return found.hexdigest()


def difference(before: Arrays, after: Arrays) -> str:
    """Description of the difference between two items."""
    if before.keys() != after.keys():
        return f"DIFFERENT  names: {sorted(before.keys() ^ after.keys())[:6]}"
    changed = {key for key in before if digest({key: before[key]}) != digest({key: after[key]})}
    if shapes := [key for key in changed if before[key].shape != after[key].shape]:
        key = min(shapes)
        return f"DIFFERENT  {key}: shape {before[key].shape} and {after[key].shape}"
    most = max(float(np.abs(after[key].astype(float) - before[key]).max()) for key in changed)
    size = max(float(np.abs(before[key].astype(float)).max()) for key in changed)
    return f"DIFFERENT  in {len(changed)} of {len(before)} arrays, by at most {most:.3g} (largest value {size:.3g})"


def main() -> None:
    """Measure both checkouts at the same time, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="BEFORE AFTER", help="folders with src/stablefield")
    parser.add_argument("--renamed", action="store_true", help="translate settings for BEFORE by the table RENAMED")
    parser.add_argument("--only", default="", metavar="REGEX", help="compare only cases whose name matches")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run, of 16 images")
    parser.add_argument("--out", type=Path, help="keep the results of both checkouts in this folder")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in the process of a checkout
    given = parser.parse_args()
    if given.measure:
        measure_all(given.measure, Names(RENAMED if given.renamed else {}), given.steps, given.only)
        return
    if len(given.checkouts) != 2:
        parser.error("give two checkouts, BEFORE and AFTER")
    options = ["--steps", str(given.steps), "--only", given.only]
    with tempfile.TemporaryDirectory() as folder:
        places = [(given.out or Path(folder)).resolve() / name for name in ("before", "after")]
        renamed = (["--renamed"] if given.renamed else [], [])
        running = [
            start(checkout, place, [*options, *names])
            for checkout, place, names in zip(given.checkouts, places, renamed, strict=True)
        ]
        if any([process.wait() for process in running]):
            sys.exit("a checkout could not be measured")
        found = [case.name for case in cases() if re.search(given.only, case.name)]
        results = [report(name, *(dict(np.load(place / f"{name}.npz")) for place in places)) for name in found]
    print(f"\n{sum(results)} of {len(results)} cases are equal")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
