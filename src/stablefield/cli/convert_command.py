"""`stablefield convert`: convert checkpoints of EDM and STF to runs, and runs to weights with EDM's names."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint of EDM or STF (network-snapshot-*.pkl, training-state-*.pt), or a run.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the new run; with --to edm a .safetensors file.")],
    to: Annotated[
        str, typer.Option(help="stablefield writes a run; edm writes safetensors with EDM's names.")
    ] = "stablefield",
) -> None:
    """Convert a published checkpoint of EDM or STF to a run, without running code from it, or a run to EDM's names."""
    from stablefield.checkpoint import read, save
    from stablefield.config import Config, ConfigError
    from stablefield.data.store import refuse_existing
    from stablefield.files import atomic_folder
    from stablefield.interop.convert import from_edm, to_edm
    from stablefield.interop.edm import read as read_edm
    from stablefield.run import RunFolder, checkpoint_of

    if to == "edm":
        if out.suffix != ".safetensors":
            raise ConfigError(f"--to edm writes a .safetensors file, not {out}")
        if out.exists():
            raise ConfigError(f"{out} exists already; choose another name, or remove it")
        to_edm(read(checkpoint_of(source)), out)
        print(f"Wrote the weights with EDM's names to {out}")
        return
    if to != "stablefield":
        raise ConfigError(f"--to must be stablefield or edm, not {to!r}")
    if source.is_dir():
        raise ConfigError(f"{source} is a folder, not a checkpoint of EDM or STF; --to edm converts a run")
    RunFolder(out).refuse_if_occupied()
    refuse_existing(out)
    checkpoint = from_edm(read_edm(source))
    with atomic_folder(out) as temporary:
        folder = RunFolder(temporary)
        folder.claim(Config(checkpoint.sections))
        save(folder.checkpoint, checkpoint.tensors, config=checkpoint.config, images=checkpoint.images)
    numbers = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    print(f"Wrote {numbers:,} numbers of {source.name} to {out}. Sample with: stablefield sample {out} --seeds 0-15")
