"""Fashion-MNIST on two CPU cores: train class by class, then show every class, with guidance and without.

    apt-get install dataset-fashion-mnist    # Debian's; any folder with the IDX files will do as --data
    python examples/fashion_mnist.py         # a quarter of an hour; called again it goes on where it was

Settings can be changed as for `stablefield train`: --set training.images=20000. Paints RUN/classes.png and
RUN/guided.png: a row for each class, a column for each seed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from stablefield import Guided
from stablefield.evaluate.pictures import save_grid
from stablefield.run import make_sampler, open_run

DEBIAN = "/usr/share/datasets/fashion-mnist"


def train(run: Path, data: str, settings: list[str]) -> None:
    """`stablefield train`, or on with it."""
    begin = ["--recipe", "fashion-mnist", "--data", data, "--out", str(run)]
    changed = [part for setting in settings for part in ("--set", setting)]
    arguments = ["--resume", str(run)] if run.exists() else begin
    done = subprocess.run([sys.executable, "-m", "stablefield", "train", *arguments, *changed])
    if done.returncode:
        sys.exit(done.returncode)


def paint(run: Path, guidance: float, columns: int = 10) -> None:
    """Samples of every class from the same seeds, without guidance and with it."""
    trained = open_run(run)
    sampler, classes = make_sampler(trained.config), trained.denoiser.label_dim
    seeds, label = list(range(columns)) * classes, torch.arange(classes).repeat_interleave(columns)
    for name, denoiser in {"classes": trained.denoiser, "guided": Guided(trained.denoiser, guidance)}.items():
        made = sampler(denoiser, trained.shape, seeds=seeds, label=label)
        save_grid(run / f"{name}.png", made.x.cpu(), columns=columns)
        print(f"{run / name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DEBIAN, help=f"folder with the IDX files ({DEBIAN})")
    parser.add_argument("--run", type=Path, default=Path("runs/fashion-mnist"), help="folder of the run")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    train(options.run, options.data, options.settings)
    paint(options.run, options.guidance)
