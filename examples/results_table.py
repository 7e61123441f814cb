"""Table of what comparisons found: a row for each contrast, with the endpoints of averaged weights.

    python examples/results_table.py DIR [DIR ...]

DIR is the folder of a comparison (`stablefield compare --out DIR`), and DIR.md the page that `--page` wrote. The table
in docs/results/README.md is this one.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from stablefield.studies.compare import Comparison, Finding

ENDPOINTS = ("area", "end", "held-out loss/end", "held-out loss/time", "excess/end")  # of the first feature space
COLUMNS = (
    "page",
    "contrast",
    "pairs",
    "endpoints that decrease, increase, of all",
    "distance, mean over log images",
    "distance, at the end",
    "held-out loss, at equal images",
    "at equal time",
    "excess",
)


def cell(found: Finding) -> str:
    """The change of an endpoint; bold if it is significant."""
    return f"**{found.change}**" if found.direction in ("decreases", "increases") else found.change


def rows(folder: Path) -> Iterator[str]:
    """Rows of a comparison.

    Args:
        folder: its folder.
    """
    comparison = Comparison.read(folder)
    space = comparison.experiment.spaces[0]
    names = ["average/" + (name if "/" in name else f"{space}/{name}") for name in ENDPOINTS]
    for findings in comparison.findings_by_contrast:
        down, up = (sum(found.direction == word for found in findings) for word in ("decreases", "increases"))
        cells = {str(found.endpoint): cell(found) for found in findings}
        counts = f"{findings[0].estimate.n} | {down}, {up}, {len(findings)}"
        changes = " | ".join(cells[name] for name in names)
        yield f"| [{folder.name}]({folder.name}.md) | {findings[0].contrast} | {counts} | {changes} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders of comparisons")
    print(f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", sep="\n")
    for each in parser.parse_args().folders:
        print(*rows(each), sep="\n")
