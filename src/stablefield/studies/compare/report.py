"""Report of a comparison: a self-contained HTML page, a summary in Markdown, and all numbers as JSON and CSV."""

import csv
import json
from base64 import b64encode
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from stablefield.checkpoint import finite
from stablefield.config import Allowed
from stablefield.files import atomic_path, write_text
from stablefield.studies.compare.figures import Plot, plots
from stablefield.studies.compare.results import Lines, Results
from stablefield.studies.compare.runs import sheet_file
from stablefield.studies.compare.summary import summarize
from stablefield.studies.compare.tables import Table, methods, tables

__all__ = ["html_page", "markdown", "title", "write_numbers", "write_report"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto; padding: 1rem;
       max-width: 72rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.lead { font-size: 1.05rem; max-width: 50rem; } p.note, figcaption { color: #444; font-size: .88rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figure h3 { font-size: 1rem; margin: 0 0 .3rem; } img { width: 100%; height: auto; }
.samples img { image-rendering: pixelated; max-width: 28rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 1px solid #111; font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


def write_report(out: Path, summary: Path | None = None, *, allow: Iterable[Allowed] = ()) -> Results:
    """Write the report of an experiment, finished or not, into its folder.

    Args:
        out: folder of the experiment.
        summary: path of the Markdown summary, by default `summary.md` in the folder; its plot is written beside it.
        allow: classes outside this package that the configuration may name, as for `resolve`.

    Returns:
        The results that were reported.

    Raises:
        ConfigError: there is no experiment, or it names a class that is not allowed.
    """
    results = Results.read(out, allow=allow)
    write_numbers(results, out)
    figures = plots(results)
    write_text(out / "report.html", html_page(results, figures, out))
    summary = summary or out / "summary.md"
    summary.parent.mkdir(parents=True, exist_ok=True)
    for plot in figures[:1]:
        write_text(summary.with_suffix(".svg"), plot.svg.decode())
    write_text(summary, markdown(results, figures, summary.with_suffix(".svg").name))
    return results


def write_numbers(results: Results, out: Path) -> None:
    """Write all numbers as `results.json` and `results.csv`.

    Args:
        results: results of the experiment.
        out: folder of the experiment.
    """
    experiment = results.experiment
    content = {
        "experiment": experiment.as_dict() | {"evaluation_points": experiment.evaluation_points},
        "machine": results.machine,
        "evaluator": results.evaluator,
        "statistics": results.statistics(),
        "scores": _with_run(results.scores),
        "training": _with_run(results.training),
    }
    write_text(out / "results.json", json.dumps(finite(content), indent=1) + "\n")
    with atomic_path(out / "results.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "images", "name", "noise_level", "value"])
        writer.writerows(_csv_rows(results))


def title(results: Results) -> str:
    """Title of the report: what is compared, on which data, process and distribution of t.

    Args:
        results: results of the experiment.
    """
    config = results.experiment.config
    path = config["data"].get("path")
    name = config["data"]["kind"] + (f" ({Path(path).name})" if path else "")
    return f"Training targets on {name}, {config['process']['kind'].upper()}, {config['times']['kind']} times"


def html_page(results: Results, figures: list[Plot], out: Path) -> str:
    """The report as HTML.

    Args:
        results: results of the experiment.
        figures: its plots.
        out: folder of the experiment, from which sheets of samples are read.
    """
    first, *rest = summarize(results)
    paragraphs = "".join(f"<li>{escape(text)}</li>" for text in rest)
    details = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _methods(results))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title(results))}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title(results))}</h1>
<p class="lead">{escape(first)}</p>
<ul>{paragraphs}</ul>
{"".join(map(_table, tables(results)))}
<h2>Plots</h2>
<div class="figures">{"".join(map(_figure, figures))}</div>
{_samples(results, out)}
<h2>Methods</h2>
<dl>{details}</dl>
</body>
</html>
"""


def markdown(results: Results, figures: list[Plot], figure_name: str) -> str:
    """The summary as Markdown: sentences, tables, one plot, and the methods.

    Args:
        results: results of the experiment.
        figures: its plots, of which the first is shown.
        figure_name: file name of that plot, beside the summary.
    """
    first, *rest = summarize(results)
    parts = [f"# {title(results)}", first, "\n".join(f"* {text}" for text in rest)]
    parts += [f"![{plot.title}]({figure_name})\n\n{plot.caption}" for plot in figures[:1]]
    for table in tables(results):
        lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
        parts += [f"## {table.title}", "\n".join(f"| {' | '.join(row)} |" for row in lines), table.note]
    details = (f"* **{name}**: {f'`{text}`' if name == 'command' else text}" for name, text in _methods(results))
    parts += ["## Methods", "\n".join(details)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _with_run(runs: Lines) -> list[dict[str, Any]]:
    """Lines of every run, each with its arm and seed."""
    return [{"arm": str(arm), "seed": seed} | line for (arm, seed), lines in runs.items() for line in lines]


def _csv_rows(results: Results) -> Iterator[list[Any]]:
    """Rows of results.csv, one number per row."""
    for (arm, seed), lines in results.scores.items():
        seconds = results.paired_seconds_per_kimg(arm)
        for line in lines:
            yield [arm, seed, line["images"], "training_seconds", "", line["images"] / 1000 * seconds]
            for name, value in line.items():
                if name.endswith("_by_level"):
                    for level, part in zip(results.evaluator["levels"], value, strict=True):
                        yield [arm, seed, line["images"], name.removesuffix("_by_level"), f"{level:.6g}", part]
                elif name != "images":
                    yield [arm, seed, line["images"], name, "", value]
    for (arm, seed), lines in results.training.items():
        for line in lines:
            for name, value in line.items():
                if name != "progress/kimg":
                    yield [arm, seed, round(1000 * line["progress/kimg"]), name, "", value]


def _methods(results: Results) -> list[tuple[str, str]]:
    """The methods; only the command while nothing has been evaluated."""
    return methods(results) if results.compared_at is not None else [("command", results.experiment.command)]


def _table(table: Table) -> str:
    """A table as HTML."""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="note">{escape(table.note)}</p>'
    )


def _figure(plot: Plot) -> str:
    """A plot as HTML."""
    # as an image, because the identifiers of inline SVGs would collide with each other
    return (
        f"<figure><h3>{escape(plot.title)}</h3>{_image(plot.svg, 'svg+xml', plot.title)}"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _samples(results: Results, out: Path) -> str:
    """Sheets of samples of all arms side by side, made from the same seeds: early in training, and at its end."""
    if results.compared_at is None:
        return ""
    seed = min(results.common_seeds(results.compared_at))
    points = results.common_points
    parts = []
    for images in dict.fromkeys((points[len(points) // 3], results.compared_at)):
        sheets = [
            (arm, sheet_file(results.experiment.run_folder(out, arm, seed), images)) for arm in results.experiment.arms
        ]
        figures = "".join(
            f"<figure><h3>{escape(arm.title)}</h3>{_image(file.read_bytes(), 'png', f'Samples, {arm.title}')}</figure>"
            for arm, file in sheets
            if file.exists()
        )
        if figures:
            head = f"<h2>Samples after {images:,} images, training seed {seed}</h2>"
            parts.append(f'{head}<div class="figures samples">{figures}</div>')
    note = (
        '<p class="note">Samples at the same position of a sheet have the same sampling seed; none were selected.</p>'
    )
    return "".join(parts) + (note if parts else "")


def _image(content: bytes, kind: str, alt: str) -> str:
    """An image that is embedded in the page."""
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{b64encode(content).decode()}">'
