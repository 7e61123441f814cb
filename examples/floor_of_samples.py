"""Floor of a loss on a finite sample, beside that of the distribution the sample was drawn from.

    python examples/floor_of_samples.py        prints a table and writes floor-of-samples.png

The data are N draws of one Gaussian, N(0, I), or of two, 1/2 N(mu, v I) + 1/2 N(-mu, v I) with |mu| = 1, v = 0.09. The
floor at noise level sigma is the mean trace of Cov[x | x_t], x_t = x + sigma noise. For the distribution it is known
(`two_gaussians.py`); for the sample it is a sum over all N data points, at x_t drawn from a seed. Where no second data
point is within reach of x_t, the sample's floor is 0, whatever that of the distribution.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from two_gaussians import TwoGaussians

from stablefield.evaluate.plots import label, save_figure
from stablefield.floor import ByNoise, Levels, LossFloor, SquaredError
from stablefield.seeding import generator

DIMS = (1, 2, 64)
STYLES = (("-", "o", "#000000"), ("--", "s", "#666666"), (":", "^", "#333333"))
POPULATIONS = {
    "one Gaussian": lambda dim: TwoGaussians(dim, offset=0.0, variance=1.0),
    "two Gaussians": lambda dim: TwoGaussians(dim, offset=dim**-0.5, variance=0.09),
}


def measure(population: TwoGaussians, sigma: torch.Tensor, n: int, examples: int, seed: int) -> ByNoise:
    """Floor of a sample at each noise level, divided by that of the distribution.

    Args:
        population: the distribution.
        sigma: noise levels, (L,).
        n: number of draws.
        examples: number of x_t at each noise level.
        seed: seed of all draws.
    """
    loss = SquaredError(Levels(torch.ones_like(sigma), sigma), reduction="sum")
    data = population.draw(n, generator(seed, "data"))
    floor = LossFloor.measure(data, loss, bins=len(sigma), per_bin=examples, seed=seed).floors["dsm"]
    return floor.map(lambda values: values / population.dsm(sigma)[:, None, None])


def main() -> None:
    parser = argparse.ArgumentParser(description="Floor of a loss on samples of known distributions.")
    parser.add_argument("--n", type=int, default=50_000, help="size of the sample")
    parser.add_argument("--examples", type=int, default=256, help="number of x_t at each noise level")
    parser.add_argument("--levels", type=int, default=25, help="number of noise levels")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--out", type=Path, default=Path("floor-of-samples.png"), help="file of the figure")
    options = parser.parse_args()
    sigma = torch.logspace(-5, 1, options.levels, dtype=torch.float64)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for panel, (name, make) in zip(figure.subplots(1, 2, sharey=True), POPULATIONS.items(), strict=True):
        print(f"{name}\n{'sigma':>9}  " + "  ".join(f"{f'D = {dim}':>15}" for dim in DIMS))
        found = [measure(make(dim), sigma, options.n, options.examples, options.seed) for dim in DIMS]
        for row, level in enumerate(sigma.tolist()):
            cells = (f"{float(f.by_bin[row]):.3f} +- {float(f.errors_by_bin[row]):.3f}" for f in found)
            print(f"{level:9.2e}  " + "  ".join(f"{cell:>15}" for cell in cells))
        panel.axhline(1, color="0.8", linewidth=1)
        for dim, ratio, (line, marker, colour) in zip(DIMS, found, STYLES, strict=True):
            style = {"linestyle": line, "marker": marker, "color": colour, "markersize": 5, "linewidth": 1.8}
            panel.errorbar(sigma, ratio.by_bin, ratio.errors_by_bin, label=f"D = {dim}", **style)
        panel.set_xscale("log")
        panel.set_title(f"{options.n:,} draws of {name}", fontsize=14)
        label(panel, "noise level sigma (units of x)", "floor of the sample /\nfloor of the distribution")
        panel.tick_params(labelsize=12)
        for text in (panel.xaxis.label, panel.yaxis.label):
            text.set_size(13)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=13)
    save_figure(figure, options.out)


if __name__ == "__main__":
    main()
