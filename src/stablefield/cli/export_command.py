"""`stablefield export`: the weights of a run, their configuration and a model card, as a folder to share."""

from pathlib import Path
from typing import Annotated

import typer

from stablefield.cli.options import Allow, Weights


def export(
    run: Annotated[Path, typer.Argument(help="The run's folder, or a checkpoint file.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; an earlier export is replaced.")],
    weights: Weights = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="License of the weights, for example apache-2.0; by default none."
        ),
    ] = None,
    allow: Allow = None,
) -> None:
    """Write the weights of a run without the optimizer, their configuration and a model card to a folder."""
    from stablefield.run import export_run

    folder = export_run(run, out, weights=weights, license=license_, allow=allow or ())
    size = (folder / "model.safetensors").stat().st_size
    print(f"Wrote weights ({size:,} bytes), config.json and README.md to {folder}.")
    print("Read README.md before you share the folder: it shows the settings and scores of the run.")
