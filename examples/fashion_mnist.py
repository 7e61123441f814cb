"""Class-conditional Fashion-MNIST on two CPU cores: train, then sample every class with and without guidance.

    apt-get install dataset-fashion-mnist    # Debian's package; --data takes any folder with the IDX files
    python examples/fashion_mnist.py         # about a quarter of an hour; the same command resumes a run

Settings can be changed as for `stablefield train`, for example with --set training.images=20000. It writes
RUN/classes.png and RUN/guided.png, with one class per row and one seed per column.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from stablefield import Guided
from stablefield.build import build_sampler
from stablefield.generate.images import save_sheet
from stablefield.run import open_run

DEBIAN = "/usr/share/datasets/fashion-mnist"


def train(run: Path, data: str, settings: list[str]) -> None:
    """Start the run with `stablefield train`, or resume it."""
    start = ["--recipe", "fashion-mnist", "--data", data, "--out", str(run)]
    changed = [part for setting in settings for part in ("--set", setting)]
    arguments = ["--resume", str(run)] if run.exists() else start
    done = subprocess.run([sys.executable, "-m", "stablefield", "train", *arguments, *changed])
    if done.returncode:
        sys.exit(done.returncode)


def save_samples(run: Path, guidance: float, columns: int = 10) -> None:
    """Write samples of every class from the same seeds, without and with guidance."""
    trained = open_run(run)
    sampler, classes = build_sampler(trained.config), trained.denoiser.num_classes
    seeds, label = list(range(columns)) * classes, torch.arange(classes).repeat_interleave(columns)
    for name, denoiser in {"classes": trained.denoiser, "guided": Guided(trained.denoiser, guidance)}.items():
        made = sampler(denoiser, trained.shape, seeds=seeds, label=label)
        save_sheet(run / f"{name}.png", made.x.cpu(), columns=columns)
        print(f"{run / name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DEBIAN, help=f"folder with the IDX files ({DEBIAN})")
    parser.add_argument("--run", type=Path, default=Path("runs/fashion-mnist"), help="folder of the run")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale (1 = off)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    train(options.run, options.data, options.settings)
    save_samples(options.run, options.guidance)
