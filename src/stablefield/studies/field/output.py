"""The files of a variance study: a table of all quantities, the same as JSON with the report, and figures."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stablefield import __version__
from stablefield.checkpoint import finite
from stablefield.files import atomic_path, write_text
from stablefield.studies.field.plots import plot_bias, plot_field
from stablefield.studies.field.report import VarianceReport
from stablefield.studies.field.study import COLUMNS, VarianceStudy


def write_study(
    folder: Path, study: VarianceStudy, report: VarianceReport, *, name: str, description: Mapping[str, Any]
) -> list[str]:
    """Write field.csv, field.json, field.png and bias.png.

    Args:
        folder: where they are written; made if it does not exist.
        study: the measured quantities.
        report: their consequences for a training.
        name: name of the data, for the titles of the figures.
        description: further entries of the JSON file, such as the data and the seed.

    Returns:
        The names of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = list(study.records())
    with atomic_path(folder / "field.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)
    content = {"stablefield": __version__, **description, "report": asdict(report)}
    write_text(folder / "field.json", json.dumps({**content, "records": finite(records)}, indent=1) + "\n")
    plot_field(folder / "field.png", study, f"Variance of training targets: {name}")
    plot_bias(folder / "bias.png", study, f"Squared error with and without the source in the support: {name}")
    return ["field.csv", "field.json", "field.png", "bias.png"]
