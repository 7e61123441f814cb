"""The model card of an export: data and their hash, settings, scores with n and their limits, and the license.

A card is Markdown that other programs render. Strings from files are escaped, so that they are shown as text: names of
files, classes and data sets cannot add HTML, links, headings or cells of a table.
"""

import json
import re
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import PurePath
from typing import Any

from stablefield import __version__
from stablefield.checkpoint import Checkpoint
from stablefield.config import Config
from stablefield.files import printable
from stablefield.run.folder import RunFolder, run_folder
from stablefield.run.trained import TrainedRun

_MOST_SCORES = 2**26  # bytes of a file of scores
_MARKUP = re.compile(r"[!#$&*:<>@\[\\\]^_`{|}~]|(?<=[wW])\.")  # the last: "www." makes a link

_USE = """\
```python
import stablefield

denoiser = stablefield.load("FOLDER")  # or "hf:OWNER/NAME"
x0 = denoiser(x_t, t)  # E[x | x_t]; with a label for each example: denoiser(x_t, t, label)
```

`stablefield sample FOLDER --seeds 0-63` draws samples with the settings below. No code in this folder is run."""
_LIMITS = """\
* Distances and FID depend on the number of samples, on the features and on the reference: compare them only with scores
  of the same n, features and reference.
* Scores do not show whether samples are suitable for any use, and the model can reproduce training data.
* The hash identifies the training data. It does not say who may use them."""


def escape(text: object) -> str:
    r"""Text from a file as Markdown that is shown as it is, in one line.

    >>> print(escape("<b>|`a`"))
    \<b\>\|\`a\`

    Args:
        text: the text, or an object that is converted to one.
    """
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def model_card(trained: TrainedRun, exported: Checkpoint, license: str | None) -> str:
    """The model card of an export.

    Args:
        trained: the run, whose folder has the scores.
        exported: the checkpoint of the export.
        license: identifier of the license; None if there is none.
    """
    config = Config(exported.sections, trained.config.allowed)
    tables = [_table(record, trained) for record in _records(trained)]
    header = ["library_name: stablefield", *([f"license: {license}"] if license else [])]
    scores = "\n\n".join(tables) if tables else "No scores of these weights were recorded."
    parts = (
        "\n".join(["---", *header, "tags:", "- diffusion-models", "- stable-target-field", "---"]),  # the hub reads it
        "# Diffusion model trained with stablefield",
        f"A denoiser E[x | x_t] for data of shape {trained.shape}. {_license(license)}",
        f"## Use\n\n{_USE}{_own_classes(config)}",
        f"## Model\n\n{_list(_model(trained, config))}",
        f"## Data\n\n{_list(_data(trained, config))}",
        f"## Scores\n\n{scores}",
        f"## Limits\n\n{_LIMITS}",
        f"## Settings\n\n{_code(config.toml())}",
    )
    return "\n\n".join(parts) + "\n"


def _license(license: str | None) -> str:
    if license is None:
        return "No license was given for these weights; ask their authors before you use them."
    return f"License of these weights: {escape(license)}."


def _own_classes(config: Config) -> str:
    """The paragraph about classes that are not of stablefield; empty without any."""
    if not config.own_classes:
        return ""
    names = ", ".join(map(escape, config.own_classes))
    return (
        f"\n\nIt needs classes that are not in this folder: {names}. `load` imports them only if they are passed to "
        "`allow`, and importing them runs their code."
    )


def _model(trained: TrainedRun, config: Config) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in trained.denoiser.parameters())
    kinds = {name: escape(config.kind(name)) for name in ("network", "process", "preconditioning", "target")}
    classes = trained.denoiser.num_classes
    return {
        "network": f"{kinds['network']}, {parameters:,} parameters",
        "process and preconditioning": f"{kinds['process']}, {kinds['preconditioning']}",
        "training target": kinds["target"],
        "training": f"{trained.images:,} images seen, in batches of {config.training.batch_size:,}",
        "weights": escape(trained.weights),
        "conditioning": f"{classes:,} classes" if classes else "none",
        "checkpoint": escape(trained.checksum),
        "exported with": f"stablefield {escape(__version__)}",
    }


def _data(trained: TrainedRun, config: Config) -> dict[str, str]:
    return {
        **{escape(key): escape(value) for key, value in config.values("data").items()},
        "values": f"{trained.values}, {trained.num_levels:,} levels",
        "hash (SHA-256)": escape(trained.data) if trained.data else "not recorded",
    }


def _records(trained: TrainedRun) -> Iterator[dict[str, Any]]:
    """Tables of scores of these weights; the last one, where the same samples were scored several times."""
    file = RunFolder(run_folder(trained.path)).scores
    found: dict[str, dict[str, Any]] = {}
    if not file.is_file() or file.stat().st_size > _MOST_SCORES:
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut short
        if _part(record, "samples").get("checkpoint") == trained.checksum and _part(record, "scores"):
            key = {name: record.get(name) for name in ("samples", "reference", "features")}
            found[json.dumps(key, sort_keys=True)] = record
    yield from found.values()


def _table(record: Mapping[str, Any], trained: TrainedRun) -> str:
    """One table of scores, with what they were computed from and the notes on their limits."""
    samples, reference, features = (_part(record, name) for name in ("samples", "reference", "features"))
    rows = [
        f"| {escape(name)} | {_number(score.get('mean'))} | {_number(score.get('std'))} |"
        for name in _part(record, "scores")
        if (score := _part(_part(record, "scores"), name))
    ]
    notes = record.get("notes")
    described = {
        "samples": f"n = {_number(samples.get('n'))}, repeats: {_number(samples.get('repeats'))}, "
        f"seeds: {_text(samples.get('seeds'))}",
        "sampler": f"{_text(samples.get('sampler'))}, network evaluations per sample: "
        f"{_text(samples.get('evaluations'))}",
        **{key: _text(samples[key]) for key in ("class", "guidance", "guide", "precision") if samples.get(key)},
        "reference": f"{_reference(reference, trained)}, n = {_number(reference.get('n'))}, "
        f"hash {_text(reference.get('hash'))}",
        "features": _text(PurePath(str(features.get("name"))).name)
        + (f" ({_number(features['dimension'])})" if "dimension" in features else ""),
        "date": _text(str(record.get("date"))[:10]),
    }
    limits = "".join(f"\n\nNote: {escape(note)}" for note in (notes if isinstance(notes, list) else []))
    return f"{_list(described)}\n\n" + "\n".join(["| score | mean | std of repeats |", "|---|---|---|", *rows]) + limits


def _reference(reference: Mapping[str, Any], trained: TrainedRun) -> str:
    """Name of a reference without the folders in its path."""
    name, own = str(reference.get("name")), repr(trained.config.make("data"))
    if name.startswith(own):
        return f"training data{escape(name.removeprefix(own))}"
    return escape(PurePath(name).name)


def _part(record: Any, name: str) -> dict[str, Any]:
    """A table in a record; empty if there is none."""
    found = record.get(name) if isinstance(record, dict) else None
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    """A value from a file, or several."""
    if isinstance(value, list):
        return ", ".join(map(_text, dict.fromkeys(map(str, value))))
    return "none" if value is None else escape(value)


def _number(value: Any) -> str:
    """A number with five digits; counts are shown whole."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) and isfinite(value) else "none"


def _list(entries: Mapping[str, str]) -> str:
    return "\n".join(f"* {name}: {text}" for name, text in entries.items())


def _code(text: str) -> str:
    """Lines as an indented block of code, which no line can end."""
    return "\n".join(f"    {printable(line)}" for line in text.splitlines())
