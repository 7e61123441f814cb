"""The command line: parsing and printing only, one module per command.

`app` is the Typer application with all commands; `main` runs it and prints the user's mistakes as one line. Commands
import what they work with when they run: their help needs nothing that is slow to import, such as torch.
"""

import faulthandler
import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from stablefield import __version__
from stablefield.cli import (
    compare_command,
    config_command,
    convert_command,
    data_command,
    demo_command,
    evaluate_command,
    export_command,
    field_command,
    floor_command,
    recipes_command,
    sample_command,
    train_command,
)

__all__ = ["app", "main"]

app = typer.Typer(
    help="""Train diffusion models with the Stable Target Field.

    \b
    stablefield demo                                     train, sample, score and plot on handwritten digits
    stablefield train                                    digits, EDM, stable targets from 1,024 references
    stablefield train --set target.kind=dsm              the same with DSM targets
    stablefield train --data images.npz                  your data: a store, ZIP, folder, array, IDX file or tar
    stablefield train --dry-run --set process.kind=flow  print the resolved configuration and exit
    stablefield train --resume runs/digits-stf           resume a run
    stablefield recipes                                  list the published settings
    stablefield config target                            list the keys of a section with their meanings
    stablefield train --recipe cifar10-ncsnpp-edm-stf --data cifar10-32x32.zip
    stablefield sample runs/digits-stf --seeds 0-63
    stablefield sample RUN --sampler predictor-corrector --steps 1000 --out samples.npz
    stablefield evaluate RUN --repeats 3                 distances to the training data, and memorisation
    stablefield compare --out runs/compare               train with DSM, stable and exact targets; write a report
    stablefield export RUN FOLDER --license apache-2.0   weights, configuration and a model card, to share
    stablefield convert network-snapshot-200000.pkl runs/edm
    stablefield data convert photos/ faces --resolution 64x64 --transform center-crop
    stablefield field faces                              variance of the targets, and what stable targets change
    stablefield floor faces --run runs/faces             what the loss cannot go below, and how far a run is above it

    A run is a folder: config.toml, checkpoint.safetensors, metrics.jsonl, samples/. In Python,
    stablefield.load("runs/digits-stf") returns its denoiser.
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"stablefield {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the name of a command."""


for _command in (
    *(demo_command.demo, train_command.train, recipes_command.recipes, config_command.config, sample_command.sample),
    *(evaluate_command.evaluate, compare_command.compare, export_command.export, convert_command.convert),
    *(field_command.field, floor_command.floor),
):
    app.command()(_command)
app.add_typer(data_command.data, name="data")


def main() -> None:
    """Run the command of `sys.argv`; print an error that the user can fix as one line instead of a traceback."""
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # if there is no terminal or log to write to
        faulthandler.enable()  # a mapped file that becomes shorter ends in a message that says where it was used
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # child processes import no modules from the current folder
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        from stablefield.data import printable

        rank = int(os.environ.get("RANK", "0"))
        shown = "\n".join(printable(line, 10_000) for line in str(error).split("\n"))
        print(f"stablefield: {f'rank {rank}: ' if rank else ''}{shown}", file=sys.stderr)
        raise SystemExit(1) from None
