"""`stablefield convert`: checkpoints of EDM and STF into runs, and runs into EDM's names."""

from pathlib import Path
from typing import Annotated

import typer

from stablefield.checkpoint import read, save
from stablefield.config import Config, ConfigError
from stablefield.interop.convert import from_edm, to_edm
from stablefield.interop.edm import read as read_edm
from stablefield.run import Folder, checkpoint_of


def convert(
    source: Annotated[Path, typer.Argument(help="network-snapshot-*.pkl, training-state-*.pt, or a run.")],
    out: Annotated[Path, typer.Argument(help="Folder of the new run; with --to edm a .safetensors file.")],
    to: Annotated[str, typer.Option(help="stablefield, or edm: safetensors with EDM's names.")] = "stablefield",
) -> None:
    """Read a published EDM or STF checkpoint, without running anything from it, and write it as a run (or back)."""
    if to == "edm":
        if out.suffix != ".safetensors":
            raise ConfigError(f"--to edm writes a .safetensors file, not {out}")
        if out.exists():
            raise ConfigError(f"{out} is there already: remove it, or choose another name")
        to_edm(read(checkpoint_of(source)), out)
        print(f"Written with EDM's names: {out}")
        return
    if to != "stablefield":
        raise ConfigError(f"--to is stablefield or edm, not {to!r}")
    folder = Folder(out)
    folder.refuse_if_occupied()
    found = from_edm(read_edm(source))
    folder.claim(Config(found.config["config"]))
    try:
        save(folder.checkpoint, found.tensors, config=found.config, images=found.images)
    except OSError:
        folder.config.unlink(missing_ok=True)  # without a checkpoint it would be a run that has not begun
        raise
    numbers = sum(tensor.numel() for tensor in found.tensors.values())
    print(f"{numbers:,} numbers of {source.name}: {out}. Look at it with: stablefield sample {out} --seeds 0-15")
