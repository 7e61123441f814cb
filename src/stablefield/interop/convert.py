"""Conversion of EDM's and STF's checkpoints to ours, and of our weights to EDM's names.

The names of weights agree except for a prefix: EDM's `model.enc...` is `network.enc...` in a `Preconditioned`. The rest
translates the arguments of the network, the preconditioning and the noise distribution into our configuration.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stablefield.checkpoint import Checkpoint, write_tensors
from stablefield.config import Config, ConfigError, resolve
from stablefield.data.pickles import RefusedError
from stablefield.interop.edm import EDMCheckpoint

# EDM's names of the arguments of its networks, and ours; None for those that do not matter to the weights
SONG_ARGUMENTS: dict[str, str | None] = {
    "augment_dim": "augment_dim",
    "model_channels": "model_channels",
    "channel_mult": "channel_mult",
    "channel_mult_emb": "channel_mult_emb",
    "num_blocks": "num_blocks",
    "attn_resolutions": "attn_resolutions",
    "dropout": "dropout",
    "label_dropout": None,
    "embedding_type": "embedding",
    "channel_mult_noise": "channel_mult_noise",
    "encoder_type": "encoder",
    "decoder_type": "decoder",
    "resample_filter": "resample_filter",
}
ADM_ARGUMENTS = {key: SONG_ARGUMENTS[key] for key in list(SONG_ARGUMENTS)[:8]}
NETWORKS = {"SongUNet": ("ddpmpp", SONG_ARGUMENTS), "DhariwalUNet": ("adm", ADM_ARGUMENTS)}

# for each of EDM's preconditioners: our kind, the names of its arguments, and the kinds of `times` and `weight` that
# EDM trains it with
PRECONDITIONERS: dict[str, tuple[str, dict[str, str | None], str, str]] = {
    "EDMPrecond": ("edm", {"sigma_data": "sigma_data", "sigma_min": None, "sigma_max": None}, "lognormal", "edm"),
    "VPPrecond": (
        "vp",
        {"beta_d": "beta_d", "beta_min": "beta_min", "M": "steps", "epsilon_t": "t_min"},
        "vp",
        "snr",
    ),
    "VEPrecond": ("ve", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}, "loguniform", "snr"),
    "iDDPMPrecond": ("iddpm", {"C_1": None, "C_2": None, "M": None}, "loguniform", "snr"),
}
COMMON = {"model_type", "img_resolution", "img_channels", "label_dim", "use_fp16"}


def from_edm(checkpoint: EDMCheckpoint) -> Checkpoint:
    """A published checkpoint as one of ours, with the weights of the moving average only.

    Args:
        checkpoint: the checkpoint as `edm.read` returns it.

    Raises:
        RefusedError: an argument or a class is unknown, or this package has no counterpart for it.
    """
    arguments = dict(checkpoint.arguments)
    # the default of `model_type` in EDM's constructors
    usual = "DhariwalUNet" if checkpoint.precond in ("EDMPrecond", "iDDPMPrecond") else "SongUNet"
    model_type = arguments.get("model_type", usual)
    kind, network_names = NETWORKS[_known("model_type", model_type, NETWORKS)]
    precond = _known("preconditioner", checkpoint.precond, PRECONDITIONERS)
    preconditioning, preconditioning_names, times, weight = PRECONDITIONERS[precond]
    if unknown := arguments.keys() - COMMON - network_names.keys() - preconditioning_names.keys():
        raise RefusedError(f"the network has the unknown arguments {', '.join(sorted(unknown))}")
    side, channels = int(arguments["img_resolution"]), int(arguments["img_channels"])
    network = {"kind": kind, "channel_mult": [1, 2, 2, 2], **_renamed(arguments, network_names)}
    if kind == "adm" and "channel_mult" not in arguments:
        del network["channel_mult"]  # the default of our ADM is EDM's
    section: dict[str, Any] = {"kind": preconditioning, **_renamed(arguments, preconditioning_names)}
    state = dict(checkpoint.state)
    if preconditioning == "iddpm":
        section["table"] = state.pop("u").double().tolist()
        network["out_channels"] = 2 * channels
    raw = {
        "data": {"kind": "unknown"},
        "network": network,
        "preconditioning": section,
        "times": {"kind": times},
        "weight": {"kind": weight},
    }
    try:
        config = resolve(raw)
    except ConfigError as error:
        raise RefusedError(str(error)) from None
    tensors = {f"average.network.{_stem(name)}": value for name, value in state.items()}
    description = {
        "config": config.sections,
        "shape": [channels, side, side],
        "num_classes": int(arguments.get("label_dim", 0)),
        "num_levels": 256,
        "values": "image" if channels in (1, 3) else "float",
    }
    return Checkpoint(tensors, description, 0)


def to_edm(checkpoint: Checkpoint, path: Path) -> None:
    """Write the averaged weights of a run under EDM's names, as safetensors with the configuration in the metadata.

    Args:
        checkpoint: a checkpoint of this package.
        path: file to write.

    Raises:
        ValueError: EDM does not have this network or this process, or the file has no averaged weights.
    """
    config = Config(checkpoint.sections)
    names = {"ddpmpp": "SongUNet", "ncsnpp": "SongUNet", "adm": "DhariwalUNet"}
    kind = config.kind("network")
    if kind not in names:
        raise ValueError(f"EDM has no network {kind!r}; only {', '.join(names)} can be written with its names")
    if (process := config.kind("process")) != "ve":
        raise ValueError(
            f"EDM's networks denoise x + noise (process ve); this one was trained with process {process!r}"
        )
    prefix = "average.network."
    state = {
        f"model.{name.removeprefix(prefix)}": t for name, t in checkpoint.tensors.items() if name.startswith(prefix)
    }
    if not state:
        raise ValueError("there are no averaged weights in this file; convert the run that it was exported from")
    described: dict[str, Any] = {"model_type": names[kind]}
    described |= {name: config.sections[name] for name in ("network", "preconditioning")}
    described |= {"shape": checkpoint.config["shape"], "label_dim": checkpoint.config["num_classes"]}
    write_tensors(path, state, {"config": json.dumps(described)})


def _known(option: str, name: Any, names: Mapping[str, Any]) -> str:
    if name not in names:
        raise RefusedError(f"unknown {option} {name!r}; known are {', '.join(names)}")
    return str(name)


def _renamed(arguments: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    return {new: arguments[old] for old, new in names.items() if new is not None and old in arguments}


def _stem(name: str) -> str:
    stem = name.removeprefix("model.")
    if stem == name:
        raise RefusedError(f"the network has the parameter {name!r} outside of its model")
    return stem
