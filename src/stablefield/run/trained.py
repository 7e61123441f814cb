"""The denoiser of a run: opened from a checkpoint, from an export, or from the Hugging Face hub."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stablefield.build import build_denoiser, choose_device, place
from stablefield.checkpoint import FORMAT, Checkpoint, CheckpointError, read
from stablefield.config import Allowed, Config, ConfigError, resolve
from stablefield.data import Progress, silent
from stablefield.data.identity import fingerprint, refuse_other_data
from stablefield.denoise import Denoiser
from stablefield.extras import how_to_install
from stablefield.files import printable
from stablefield.pool import Pool, Values, values_of
from stablefield.run.folder import RunFolder, checkpoint_of, run_folder

_HUB = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)  # hf:OWNER/NAME, maybe with @REVISION
_MOST_VALUES = 2**28  # of one data point: an image of 9,459 x 9,459 pixels in color


def describe(config: Config, pool: Pool) -> dict[str, Any]:
    """The description in a checkpoint: the configuration, and what must be known of the data to sample.

    Args:
        config: configuration of the run.
        pool: the data that are trained on.
    """
    return {
        "config": config.sections,
        "shape": list(pool.shape),
        "num_classes": pool.num_classes,
        "num_levels": pool.num_levels,
        "values": pool.values,
    }


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A trained run, ready to sample from.

    Attributes:
        denoiser: the denoiser in evaluation mode.
        config: configuration of the run.
        shape: shape of one data point.
        num_levels: number of values of quantized data.
        values: "image" if samples are images, which are displayed and written as bytes, or "float" if they are numbers
            that are never clipped.
        images: number of images seen in training.
        checksum: checksum of the checkpoint, followed by the name of the weights if they are not the first average.
        path: the folder, checkpoint file or name of the hub that it was opened from.
        weights: name of the weights: "average", "average-HALFLIFE" or "model".
        data: fingerprint of the training data (see `data.identity`); "" if the checkpoint does not have it.
    """

    denoiser: Denoiser
    config: Config
    shape: tuple[int, ...]
    num_levels: int
    values: Values
    images: int
    checksum: str
    path: Path
    weights: str = "average"
    data: str = ""

    @property
    def folder(self) -> Path:
        """Folder of the run, for files that are made from it.

        Raises:
            ConfigError: the run was opened from the Hugging Face hub, whose cache is not a place for such files.
        """
        if _is_hub_name(self.path):
            raise ConfigError(f"{self.path} has no folder on this machine; choose one with --out")
        return run_folder(self.path)


def load(
    run: str | Path, *, weights: str | None = None, device: str = "auto", allow: Iterable[Allowed] = ()
) -> Denoiser:
    """The denoiser of a run, E[x | x_t], in evaluation mode.

    Args:
        run: folder of a run or of an export, a checkpoint file, or the name of a model of the Hugging Face hub:
            `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`.
        weights: "average" (the first moving average, for sampling), "average-HALFLIFE" (another one), "model" (the
            weights without averaging), or "best" (the average in the run's best checkpoint, if checkpoints are scored).
            By default "average", or the weights of an export, which has one set of them.
        device: "auto" for a GPU if there is one, or a name as torch has it.
        allow: classes outside this package that the network of the run may be, each as the class or as `module:Class`.
            No other name in a run is imported.

    Raises:
        CheckpointError: the checkpoint does not exist, is damaged, or is of another program or version.
        ConfigError: the checkpoint names a class that is not allowed, or its configuration is not valid.
        ValueError: the checkpoint has no such weights.
    """
    return open_run(run, weights=weights, device=device, allow=allow).denoiser


def open_run(
    run: str | Path, *, weights: str | None = None, device: str = "auto", allow: Iterable[Allowed] = ()
) -> TrainedRun:
    """A trained run with its denoiser, its configuration and what is known of its data.

    Args:
        run: folder of a run or of an export, a checkpoint file, or a name of the hub, as for `load`.
        weights: name of the weights, as for `load`.
        device: name of the device, as for `load`.
        allow: classes outside this package that the network may be, as for `load`.

    Raises:
        CheckpointError, ConfigError, ValueError: as for `load`.
    """
    path = _download(str(run)) if _is_hub_name(run) else Path(run)
    if weights == "best" and not RunFolder(path).best.exists():
        raise ValueError(f"{path} has no best checkpoint; runs keep one if data.holdout is set")
    file = RunFolder(path).best if weights == "best" else checkpoint_of(path)
    found = read(file)
    if file == RunFolder(path).exported:
        _refuse_other_config(file.with_name("config.json"), found)
    try:
        config = resolve(found.sections, allow=allow)
        shape, num_classes = found.config["shape"], found.config["num_classes"]
        num_levels, declared = found.config["num_levels"], found.config["values"]
        data = found.data
    except KeyError as error:
        raise CheckpointError(f"the description in {path} is incomplete: {error} is missing") from None
    numbers = [*shape, num_classes, num_levels] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number <= _MOST_VALUES for number in numbers) or not (
        1 <= len(shape) <= 8 and 1 <= math.prod(shape) <= _MOST_VALUES and num_levels >= 2 and isinstance(data, str)
    ):
        raise CheckpointError(f"the description in {path} has no valid shape, num_classes, num_levels or data")
    shape = tuple(shape)
    try:
        values = values_of(declared, True, shape)
    except ValueError as error:
        raise CheckpointError(f"the description in {path} does not fit its data: {error}") from None
    name, state = _select_weights(found, "average" if weights == "best" else weights)
    try:
        denoiser = build_denoiser(config, shape, num_classes, state)
        denoiser.load_state_dict(state)
    except (ConfigError, RuntimeError) as error:
        raise CheckpointError(f'the weights "{name}" in {path} do not fit its network: {error}') from None
    denoiser = place(denoiser, choose_device(device)).eval().requires_grad_(False)
    checksum = found.checksum if name == "average" else f"{found.checksum} {name}"
    return TrainedRun(denoiser, config, shape, num_levels, values, found.images, checksum, Path(run), name, data)


def as_json(checkpoint: Checkpoint) -> str:
    """The description of a checkpoint as JSON: the config.json of an export.

    Args:
        checkpoint: the checkpoint.
    """
    return json.dumps({"format": FORMAT, "images": checkpoint.images, **checkpoint.config}, indent=2) + "\n"


def _refuse_other_config(file: Path, checkpoint: Checkpoint) -> None:
    """Refuse an export whose config.json was changed: it is a copy, for readers and other programs."""
    try:
        same = json.loads(file.read_text(encoding="utf-8")) == json.loads(as_json(checkpoint))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        same = False
    if not same:
        raise CheckpointError(
            f"{file} is not the configuration that model.safetensors was exported with, which is stored in it; put it "
            "back, or remove config.json; settings of the sampler are changed with --set"
        )


def _select_weights(checkpoint: Checkpoint, name: str | None) -> tuple[str, dict[str, torch.Tensor]]:
    """One set of weights of a checkpoint, by default the first average or the only set, and its name."""
    prefixes = sorted({key.partition(".")[0] for key in checkpoint.tensors})
    names = [prefix for prefix in prefixes if prefix == "model" or prefix.startswith("average")]
    if name is None:
        name = names[0] if len(names) == 1 else "average"
    if name not in names:
        raise ValueError(f"there are no weights {name!r} in this checkpoint; choose one of {', '.join(names)}, or best")
    weights = {key.removeprefix(f"{name}."): t for key, t in checkpoint.tensors.items() if key.startswith(f"{name}.")}
    return name, weights


def training_data(trained: TrainedRun, progress: Progress = silent, *, way_out: str) -> Pool:
    """Load all data of a run again, those that were held out included.

    Args:
        trained: the run, as `open_run` returns it.
        progress: called with (done, total) while data are decoded.
        way_out: what the user can do if the data have changed, the end of the message.

    Raises:
        ConfigError: the data are no longer those of the run, or the run does not record which they were.
    """
    data: Pool = trained.config.make("data").load(progress)
    refuse_other_data(data, fingerprint(data), trained.data, way_out)
    return data


def _is_hub_name(run: str | Path) -> bool:
    return str(run).startswith("hf:")


def _download(name: str) -> Path:
    """Folder with the two files of an exported model that are read, from the cache of `huggingface_hub` or the hub.

    With the environment variable `HF_HUB_OFFLINE=1` only the cache is used.
    """
    if (parts := _HUB.fullmatch(name)) is None:
        raise CheckpointError(f"{name} is not the name of a model; write hf:OWNER/NAME, or hf:OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(how_to_install("a model of the Hugging Face hub", "hub")) from None
    try:
        folder = snapshot_download(parts[1], revision=parts[2], allow_patterns=["config.json", "model.safetensors"])
    except Exception as error:  # a network can fail in any way
        reason = printable(str(error).strip().partition("\n")[0] or repr(error))
        raise CheckpointError(f"{name} cannot be read from the Hugging Face hub or its cache: {reason}") from None
    return Path(folder)
