"""Export of a run as a folder to share: one set of its weights, their configuration, and a model card.

exported/model.safetensors    the weights without the optimizer, in the format of checkpoints, which `load` reads
         config.json          the description in its header, for readers and other programs
         README.md            the model card (see `run.card`)

The folders in the paths of data are left out, so that an export does not show where its author keeps files.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from stablefield.checkpoint import Checkpoint, save
from stablefield.config import Allowed, Config, ConfigError
from stablefield.files import atomic_folder, printable, sweep
from stablefield.run.card import model_card
from stablefield.run.folder import RunFolder, is_readable
from stablefield.run.trained import TrainedRun, as_json, open_run

_FILES = {"model.safetensors", "config.json", "README.md"}
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    weights: str | None = None,
    license: str | None = None,
    allow: Iterable[Allowed] = (),
) -> Path:
    """Write the weights of a run, their configuration and a model card to a folder, which `load` reads.

    The folder is complete or absent. An earlier export is replaced; anything else at that path is refused.

    Args:
        run: folder of a run, or a checkpoint file.
        out: the folder to write.
        weights: name of the weights, as for `load`; by default the first moving average.
        license: identifier of the license of the weights, such as "apache-2.0"; the model card states that there is
            none by default.
        allow: classes outside this package that the run may name, as for `load`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint does not exist, or is damaged.
        ConfigError: there is something else at `out`, the license is not an identifier, or the run names a class that
            is not allowed.
        ValueError: the checkpoint has no such weights.
        OSError: the folder could not be written.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigError(f"--license takes an identifier such as apache-2.0 or cc-by-4.0, not {license!r}")
    folder = RunFolder(Path(out).absolute())
    _refuse_other_files(folder)
    trained = open_run(run, weights=weights, device="cpu", allow=allow)
    checkpoint = _checkpoint(trained)
    sweep(folder.path.parent)
    with atomic_folder(folder.path, replace=True) as temporary:
        save(temporary / "model.safetensors", checkpoint.tensors, config=checkpoint.config, images=checkpoint.images)
        (temporary / "config.json").write_text(as_json(checkpoint), encoding="utf-8")
        (temporary / "README.md").write_text(model_card(trained, checkpoint, license), encoding="utf-8")
        _refuse_other_files(folder)
    return Path(out)


def _refuse_other_files(folder: RunFolder) -> None:
    """Refuse a path that holds anything but an earlier export."""
    try:
        names = {entry.name for entry in folder.path.iterdir()}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ConfigError(f"{folder.path} is a file; choose another folder for the export") from None
    if is_readable(folder.exported):
        names -= _FILES
    if names:
        raise ConfigError(
            f"{folder.path} holds more than an earlier export: {printable(', '.join(sorted(names)))}; choose another "
            "folder, or remove these files"
        )


def _checkpoint(trained: TrainedRun) -> Checkpoint:
    """The weights and the description of an export."""
    description = {
        "config": _without_folders(trained.config).sections,
        "shape": list(trained.shape),
        "num_classes": trained.denoiser.num_classes,
        "num_levels": trained.num_levels,
        "values": trained.values,
        "data": trained.data,
    }
    tensors = {f"{trained.weights}.{name}": value for name, value in trained.denoiser.state_dict().items()}
    return Checkpoint(tensors, description, trained.images)


def _without_folders(config: Config) -> Config:
    """The configuration with the last part of the path of the data; names of data sets of the hub are kept."""
    path = Path(config.data_path)
    if not config.data_path or (config.kind("data") == "huggingface" and not (path.is_absolute() or path.exists())):
        return config
    return config.changed(data={"path": path.absolute().name})
