"""The first figure of README.md: samples of three targets from equal seeds, and distances during training.

    stablefield compare --out runs/digits --objectives flow --targets dsm,stf:256,exact --seeds 0-9
    python examples/readme_figure.py runs/digits docs/images/comparison.png

The samples are those of the averaged weights of seed 0 at the end of training, which the comparison keeps beside its
checkpoints.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from stablefield.studies.compare import Comparison
from stablefield.studies.compare.figures import draw_distance

NAMES = {"dsm": "DSM", "stf:256": "STF, 256 references", "exact": "exact: all data"}
SIDE = 300  # of the 8 x 8 sheet of samples, the first 6 rows and columns are shown


def main() -> None:
    """Draw the figure of a finished comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder of `stablefield compare`")
    parser.add_argument("figure", type=Path, help="image file to write")
    parser.add_argument("--objective", default="flow")
    parser.add_argument("--seed", type=int, default=0, help="training seed of the samples")
    options = parser.parse_args()
    comparison = Comparison.read(options.comparison)
    arms = [arm for arm in comparison.experiment.arms if arm.objective == options.objective]
    names = [NAMES.get(arm.target, arm.target) for arm in arms]
    figure = Figure(figsize=(12.6, 3.4), dpi=110, layout="constrained")
    *sheets, curves = figure.subplots(1, len(arms) + 1, width_ratios=[1] * len(arms) + [1.35])
    for arm, name, axes in zip(arms, names, sheets, strict=True):
        folder = comparison.experiment.run_folder(options.comparison, arm, options.seed)
        with Image.open(folder.path / "samples.png") as sheet:
            axes.imshow(sheet.crop((0, 0, SIDE, SIDE)).resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST), "gray")
        axes.set_axis_off()
        axes.set_title(name, fontsize=11)
    draw_distance(comparison, curves, options.objective, "average")
    curves.set_title("distance to the data, lower is better", fontsize=11)
    curves.legend(curves.get_lines()[1:], names, frameon=False, fontsize=9)
    figure.savefig(options.figure)


if __name__ == "__main__":
    main()
