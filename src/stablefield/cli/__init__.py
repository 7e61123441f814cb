"""The command line. Each command is a file; here they come together, and errors become one plain message."""

import os
import sys

import typer

from stablefield.cli.compare import compare
from stablefield.cli.convert import convert
from stablefield.cli.data import data
from stablefield.cli.demo import demo
from stablefield.cli.evaluate import evaluate
from stablefield.cli.field import field
from stablefield.cli.recipes import recipes
from stablefield.cli.sample import sample
from stablefield.cli.train import train

app = typer.Typer(
    help="""Train diffusion models with the Stable Target Field.

    \b
    stablefield demo                                     the whole thing on handwritten digits, in two minutes
    stablefield train                                    digits, EDM, stable targets from 1,024 references
    stablefield train --set target.kind=single           its twin with single-sample targets (DSM)
    stablefield train --data images.npz                  your own data: a store, zip, folder, array, IDX file, tar
    stablefield recipes                                  published settings
    stablefield train --recipe cifar10-ncsnpp-edm-stf --data cifar10-32x32.zip
    stablefield train --dry-run --set process.kind=flow  all that would be used, without doing it
    stablefield sample runs/digits-reference --seeds 0-63
    stablefield sample RUN --sampler predictor-corrector --steps 1000 --out samples.npz
    stablefield evaluate RUN --repeats 3                 distances to the data it was trained on, and memorisation
    stablefield compare --out runs/compare               DSM, stable and exact targets side by side, and a report
    stablefield convert network-snapshot-200000.pkl runs/edm
    stablefield data convert photos/ faces --resolution 64x64 --transform center-crop
    stablefield field faces                              how much targets vary on them, and what to expect of STF

    A run is a folder: config.toml, checkpoint.safetensors, metrics.jsonl, samples/. In Python,
    stablefield.load("runs/digits-reference") gives its denoiser.
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.command()(demo)
app.command()(train)
app.command()(recipes)
app.command()(sample)
app.command()(evaluate)
app.command()(compare)
app.command()(convert)
app.command()(field)
app.add_typer(data, name="data")


def main() -> None:
    """Run a command; what the user can mend is said without a traceback."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # processes that this one starts: no modules of the current folder
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"stablefield: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        raise SystemExit(1) from None
