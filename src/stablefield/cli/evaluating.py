"""The work of `stablefield evaluate`: printing and writing tables of scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from stablefield.evaluate import Estimate, ScoreTable, Statistics
from stablefield.generate.images import save_sheet

_TITLES = {
    "fid": "FID",
    "kid": "KID",
    "kid_std": "  std over subsets",
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "kernel_std": "  std over subsets",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception score",
    "inception_score_std": "  std over parts",
    "nearest_distance": "nearest training image",
    "nearest_distance_held_out": "  of held-out images",
    "nearest_ratio": "  ratio of both",
    "copies": "fraction of copies",
    "copies_held_out": "  of held-out images",
}


@dataclass
class TablePrinter:
    """Callback that prints and writes each table of scores.

    Attributes:
        path: file that the scores are appended to, one JSON object per line.
        statistics: file to write mean and covariance of the features to.
        started: True after the first table.
    """

    path: Path
    statistics: Path | None = None
    started: bool = False

    def __call__(self, table: ScoreTable) -> None:
        """Print and write a table.

        Args:
            table: the table.
        """
        if not self.started:
            print(_description(table))
        self.started = True
        if self.statistics and table.statistics:
            write_statistics(self.statistics, table.statistics)
        table.append_to(self.path)
        rows = starmap(_table_row, table.scores.items())
        print("\n" + "\n".join([_title(table.features), *rows, *(f"  note: {note}" for note in table.notes)]))
        if table.pairs is not None:
            sheet = self.path.with_name(self.path.stem.replace("scores", "nearest") + ".png")
            save_sheet(sheet, table.pairs, columns=8)
            print(f"  samples and their nearest training images, most likely copies first: {sheet}")


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write mean and covariance of features, and print where.

    Args:
        path: file to write.
        statistics: the statistics.
    """
    statistics.save(path)
    print(f"statistics  {statistics.n:,} in features {statistics.features}: {path}")


def _description(table: ScoreTable) -> str:
    """Number and origin of the samples, how they were made, and the reference."""
    samples, n = table.samples, table.reference["n"]
    times = f"{samples['repeats']} x " if samples["repeats"] > 1 else ""
    lines = [f"samples     {times}{samples['n']:,} of {samples['name']}"]
    if "sampler" in samples:
        low, high = samples.get("evaluations") or ("?", "?")
        count = f"{low}" if low == high else f"{low} to {high}"
        lines.append(f"            {samples['sampler']}, {count} network evaluations per sample")
    count = "unknown number of data points" if n is None else f"{n:,}"
    return "\n".join([*lines, f"reference   {count} of {table.reference['name']}"])


def _title(features: Mapping[str, Any]) -> str:
    if "held_out" in features:
        return (
            f"memorisation: Euclidean distance between data, bytes as [-1, 1]; held-out images: {features['held_out']}"
        )
    accuracy = features.get("accuracy")
    known = "" if accuracy is None else f", {accuracy:.1%} of held-out images classified correctly"
    return f"{features['name']}: {features['dimension']:,} features{known}"


def _table_row(name: str, estimate: Estimate) -> str:
    repeats = "" if estimate.std is None else f" ± {estimate.std:.2g}, min {estimate.min:.5g}"
    return f"  {_TITLES.get(name, name):<26}{estimate.mean:.5g}{repeats}"
