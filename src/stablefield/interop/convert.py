"""EDM's and STF's checkpoints as ours, and ours with EDM's names.

The names of weights agree but for a prefix: what EDM calls `model.enc...` is `network.enc...` in a `Preconditioned`.
The rest is telling in our words what the file says of its network, its scalings and the noise it was trained with.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stablefield.checkpoint import Checkpoint, replacing
from stablefield.config import ConfigError, resolve
from stablefield.interop.edm import EDMCheckpoint, RefusedCheckpoint

# what EDM calls the arguments of its networks, and what they are called here; None: known, and of no use for weights
SONG: dict[str, str | None] = {
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
ADM = {key: SONG[key] for key in list(SONG)[:8]}
NETWORKS = {"SongUNet": ("ddpmpp", SONG), "DhariwalUNet": ("adm", ADM)}

# each preconditioner: scaling, the names of its numbers, and the noise and weight it was trained with
PRECONDITIONERS: dict[str, tuple[str, dict[str, str | None], str, str]] = {
    "EDMPrecond": ("edm", {"sigma_data": "sigma_data", "sigma_min": None, "sigma_max": None}, "lognormal", "edm"),
    "VPPrecond": (
        "vp",
        {"beta_d": "beta_d", "beta_min": "beta_min", "M": "steps", "epsilon_t": "t_min"},
        "vp",
        "noise",
    ),
    "VEPrecond": ("ve", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}, "loguniform", "noise"),
    "iDDPMPrecond": ("iddpm", {"C_1": None, "C_2": None, "M": None}, "loguniform", "noise"),
}
COMMON = {"model_type", "img_resolution", "img_channels", "label_dim", "use_fp16"}


def from_edm(found: EDMCheckpoint) -> Checkpoint:
    """A published checkpoint as one of ours, with the average's weights only.

    Raises:
        RefusedCheckpoint: an argument that is not known, or that this package has no counterpart for.
    """
    told = dict(found.arguments)
    kind, of_network = NETWORKS[_known("model_type", told.get("model_type", _default_network(found)), NETWORKS)]
    scaling, of_scaling, times, weight = PRECONDITIONERS[_known("precond", found.precond, PRECONDITIONERS)]
    if unknown := told.keys() - COMMON - of_network.keys() - of_scaling.keys():
        raise RefusedCheckpoint(
            f"the network was made with {', '.join(sorted(unknown))}, which nothing here answers to"
        )
    side, channels = int(told["img_resolution"]), int(told["img_channels"])
    network = {"kind": kind, "channel_mult": [1, 2, 2, 2], **_renamed(told, of_network)}
    if kind == "adm" and "channel_mult" not in told:
        del network["channel_mult"]  # there its default is EDM's
    scalings: dict[str, Any] = {"kind": scaling, **_renamed(told, of_scaling)}
    state = dict(found.state)
    if scaling == "iddpm":
        scalings["table"] = state.pop("u").double().tolist()
        network["out_channels"] = 2 * channels
    raw = {
        "data": {"kind": "unnamed"},
        "network": network,
        "scaling": scalings,
        "times": {"kind": times},
        "weight": {"kind": weight},
    }
    try:
        config = resolve(raw)
    except ConfigError as error:
        raise RefusedCheckpoint(str(error)) from None
    tensors = {f"average.network.{_stem(name)}": value for name, value in state.items()}
    described = {
        "config": config.sections,
        "shape": [channels, side, side],
        "classes": int(told.get("label_dim", 0)),
        "levels": 256,
        "values": "image" if channels in (1, 3) else "float",
    }
    return Checkpoint(tensors, described, 0)


def to_edm(found: Checkpoint, path: Path) -> None:
    """The average's weights of a run under EDM's names, as safetensors with what they belong to in the metadata.

    Raises:
        ValueError: a network or a process that EDM does not know.
    """
    sections = found.config["config"]
    names = {"ddpmpp": "SongUNet", "ncsnpp": "SongUNet", "adm": "DhariwalUNet"}
    kind = sections["network"]["kind"]
    if kind not in names:
        raise ValueError(f"EDM has no network like {kind!r}; {', '.join(names)} can be written with its names")
    if (process := sections["process"]["kind"]) != "ve":
        raise ValueError(f"EDM's networks are asked about x + noise (process ve); this one was trained for {process!r}")
    prefix = "average.network."
    state = {f"model.{name.removeprefix(prefix)}": t for name, t in found.tensors.items() if name.startswith(prefix)}
    said = {"model_type": names[kind], "network": sections["network"], "scaling": sections["scaling"]}
    said |= {"shape": found.config["shape"], "label_dim": found.config["classes"]}
    with replacing(path) as beside:
        save_file({name: t.contiguous() for name, t in state.items()}, beside, {"config": json.dumps(said)})


def _default_network(found: EDMCheckpoint) -> str:
    # EDM's constructors differ in what they build when nothing is said
    return "DhariwalUNet" if found.precond in ("EDMPrecond", "iDDPMPrecond") else "SongUNet"


def _known(what: str, name: Any, names: Mapping[str, Any]) -> str:
    if name not in names:
        raise RefusedCheckpoint(f"{what} is {name!r}, which is none of {', '.join(names)}")
    return str(name)


def _renamed(told: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    return {new: told[old] for old, new in names.items() if new is not None and old in told}


def _stem(name: str) -> str:
    stem = name.removeprefix("model.")
    if stem == name:
        raise RefusedCheckpoint(f"the network holds {name!r} beside its model")
    return stem
