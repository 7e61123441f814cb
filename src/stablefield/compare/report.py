"""The report: one HTML file that needs nothing else, a summary in Markdown, and every number as JSON and CSV."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path

from stablefield.checkpoint import write_text
from stablefield.compare.figures import Plot, plots
from stablefield.compare.findings import findings
from stablefield.compare.results import Results
from stablefield.compare.runs import picture
from stablefield.compare.tables import Table, methods, tables
from stablefield.config import Allowed

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
    """Everything that can be said of an experiment so far, into its folder.

    Args:
        out: the experiment.
        summary: where the Markdown goes, `summary.md` in the folder if not said; the plot it shows goes beside it.
        allow: classes outside this package that the experiment's network may be, as of `resolve`.

    Raises:
        ConfigError: there is no experiment, or it names a class that is not allowed.
    """
    results = Results.read(out, allow=allow)
    results.write(out)
    drawn = plots(results)
    _write(out / "report.html", page(results, drawn, out))
    summary = summary or out / "summary.md"
    summary.parent.mkdir(parents=True, exist_ok=True)
    for plot in drawn[:1]:
        _write(summary.with_suffix(".svg"), plot.svg.decode())
    _write(summary, markdown(results, drawn, summary.with_suffix(".svg").name))
    return results


def title(results: Results) -> str:
    """What is compared, on what."""
    config = results.experiment.config
    path = config["data"].get("path")
    name = config["data"]["kind"] + (f" ({Path(path).name})" if path else "")
    return f"Training targets on {name}, {config['process']['kind'].upper()}, {config['times']['kind']} times"


def page(results: Results, drawn: list[Plot], out: Path) -> str:
    """The report as HTML."""
    first, *rest = findings(results)
    found = "".join(f"<li>{escape(text)}</li>" for text in rest)
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in methods_of(results))
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
<ul>{found}</ul>
{"".join(map(_table, tables(results)))}
<h2>Plots</h2>
<div class="figures">{"".join(map(_figure, drawn))}</div>
{_samples(results, out)}
<h2>Methods</h2>
<dl>{rows}</dl>
</body>
</html>
"""


def markdown(results: Results, drawn: list[Plot], shown: str) -> str:
    """The summary: what was found, tables, one plot, and how it was done."""
    first, *rest = findings(results)
    parts = [f"# {title(results)}", first, "\n".join(f"* {text}" for text in rest)]
    parts += [f"![{plot.title}]({shown})\n\n{plot.caption}" for plot in drawn[:1]]
    for table in tables(results):
        lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
        parts += [f"## {table.title}", "\n".join(f"| {' | '.join(row)} |" for row in lines), table.note]
    said = methods_of(results)
    parts += [
        "## Methods",
        "\n".join(f"* **{name}**: {f'`{text}`' if name == 'command' else text}" for name, text in said),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def methods_of(results: Results) -> list[tuple[str, str]]:
    """How it was done, once there is anything to say it of."""
    return methods(results) if results.last is not None else [("command", results.experiment.command)]


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="note">{escape(table.note)}</p>'
    )


def _figure(plot: Plot) -> str:
    # as an image, so that the names inside of one drawing cannot meet those of another
    return (
        f"<figure><h3>{escape(plot.title)}</h3>{_image(plot.svg, 'svg+xml', plot.title)}"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _samples(results: Results, out: Path) -> str:
    """Grids of all arms side by side, made from the same seeds after as many images: early, and at the end."""
    if results.last is None:
        return ""
    seed = min(results.common(results.last))
    shown = list(dict.fromkeys((results.marks[len(results.marks) // 3], results.last)))
    parts = []
    for mark in shown:
        places = [(arm, picture(results.experiment.folder(out, arm, seed), mark)) for arm in results.experiment.arms]
        figures = "".join(
            f"<figure><h3>{escape(arm.title)}</h3>{_image(place.read_bytes(), 'png', f'Samples, {arm.title}')}</figure>"
            for arm, place in places
            if place.exists()
        )
        if figures:
            head = f"<h2>Samples after {mark:,} images, training seed {seed}</h2>"
            parts.append(f'{head}<div class="figures samples">{figures}</div>')
    note = '<p class="note">The same place holds the same sampling seed in every grid; none was chosen.</p>'
    return "".join(parts) + (note if parts else "")


def _image(content: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{b64encode(content).decode()}">'


def _write(path: Path, text: str) -> None:
    write_text(path, text)
