"""From the file's data to a checkpoint: the moving average's weights, and what it takes to build the network.

The data is still a tangle that the file drew: its parts may be mentioned often, or contain themselves. All
that is kept is copied out through one `Ledger`, which counts.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from stablefield.interop.edm.forms import read_file
from stablefield.interop.edm.names import (
    PRECONDITIONERS,
    Object,
    RefusedCheckpoint,
    TensorView,
    expect,
    printable,
    refusal,
)

# What malformed files make the disassembler, zipfile, torch and the table's functions raise.
DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,  # also zipfile's, of encrypted or unsupported records, and Python's, of endless nesting
    EOFError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class EDMCheckpoint:
    """What an EDM or STF checkpoint says, as data.

    Args:
        kind: Which of the two files it is.
        precond: Class name of the preconditioner, one of `PRECONDITIONERS`.
        arguments: What the preconditioner was constructed with (`model_type`, `img_resolution`, ...), as JSON
            would have it.
        state: Parameters and buffers of the exponential moving average under EDM's names (`model.enc...`),
            on the CPU, contiguous and independent of the file.
        loss: Class name and constructor arguments of the loss (`{"class_name": "EDMLoss"}`), where present.
        augment: The same of the augmentation, where present.
        dataset_kwargs: How the training set was opened, where present.
        step: The training state's step, where present.
        optimizer_state: The optimiser's `state_dict` (training states only). It belongs to the network that
            was being trained, which is one step past the average in `state`.
    """

    kind: Literal["network-snapshot", "training-state"]
    precond: str
    arguments: dict[str, Any]
    state: dict[str, Shaped[Tensor, " *shape"]]
    loss: dict[str, Any] | None = None
    augment: dict[str, Any] | None = None
    dataset_kwargs: dict[str, Any] | None = None
    step: int | None = None
    optimizer_state: dict[str, Any] | None = None


def read(path: str | os.PathLike[str]) -> EDMCheckpoint:
    """Reads `network-snapshot-*.pkl` or `training-state-*.pt` as published by EDM and STF.

    Args:
        path: The file: a pickle (protocol 2 or later), or either of `torch.save`'s formats.

    Returns:
        The moving average's weights, and what it takes to build the network.

    Raises:
        RefusedCheckpoint: If the file is damaged, or names anything that is not on the allow-list. It is a
            ValueError.
        OSError: If the file cannot be opened.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022)
        | Stable Target Field for Reduced Variance Score Estimation in Diffusion Models (Xu et al., 2023)
    """

    path = Path(path)
    try:
        return checkpoint(expect(read_file(path), dict), Ledger(path.stat().st_size))
    except RefusedCheckpoint as error:
        raise RefusedCheckpoint(f"{path.name}: {error}") from error
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {printable(str(error))}"
        raise RefusedCheckpoint(f"{path.name}: is damaged, or no EDM checkpoint ({reason})") from error


def checkpoint(data: dict[str, Any], ledger: Ledger) -> EDMCheckpoint:
    if "ema" not in data:
        raise RefusedCheckpoint("has no `ema`; read the network-snapshot-*.pkl that was written beside it")
    network = expect(data["ema"], Object)
    if network.kind not in PRECONDITIONERS:
        raise RefusedCheckpoint(f"has as `ema` a {network.kind}, and not one of {sorted(PRECONDITIONERS)}")
    optimizer, step = data.get("optimizer_state"), data.get("step")
    return EDMCheckpoint(
        kind="network-snapshot" if optimizer is None else "training-state",
        precond=network.kind,
        arguments=ledger.arguments(network),
        state=dict(ledger.state(network)),
        loss=ledger.part(data.get("loss_fn")),
        augment=ledger.part(data.get("augment_pipe")),
        dataset_kwargs=ledger.json(data.get("dataset_kwargs") or {}) or None,
        step=None if step is None else expect(step, int),
        optimizer_state=None if optimizer is None else ledger.plain(expect(optimizer, dict)),
    )


@dataclass
class Ledger:
    """Copies what is wanted, while it does not outweigh the file; a number or a letter weighs one byte."""

    left: int

    def charge(self, octets: int) -> None:
        self.left -= octets
        if self.left < 0:
            raise RefusedCheckpoint("unfolds to more than a file of its size can hold")

    def tensor(self, view: TensorView) -> Shaped[Tensor, " *size"]:
        dtype, extent = view.storage.dtype, view.extent
        self.charge(1 + max(extent, view.numel) * dtype.itemsize)
        if extent == 0:
            return torch.empty(view.size, dtype=dtype)
        octets = np.frombuffer(view.storage.data, np.uint8)[view.offset * dtype.itemsize :]
        elements = torch.tensor(octets[: extent * dtype.itemsize]).view(dtype)
        return elements.as_strided(view.size, view.stride).contiguous()

    def state(self, module: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """The names and tensors of `Module.state_dict`."""
        fields = expect(expect(module, Object).state, dict)
        for part in ("_parameters", "_buffers", "_modules"):
            for name, value in expect(fields[part], dict).items():
                if not re.fullmatch(r"\w{1,100}", expect(name, str), re.ASCII):
                    raise refusal(name)
                self.charge(len(prefix) + len(name))
                if part == "_modules" and value is not None:
                    yield from self.state(value, f"{prefix}{name}.")
                elif value is not None:
                    yield prefix + name, self.tensor(expect(value, TensorView))

    def plain(self, value: object) -> Any:
        """Containers, strings, numbers and tensors; anything else is refused."""
        self.charge(1 + len(value) if isinstance(value, str) else 1)
        match value:
            case dict():
                return {self.plain(key): self.plain(item) for key, item in value.items()}
            case list() | tuple():
                return type(value)(self.plain(item) for item in value)
            case TensorView():
                return self.tensor(value)
            case None | str() | int() | float():
                return value
            case _:
                raise refusal(value.kind if isinstance(value, Object) else type(value).__name__)

    def json(self, value: object) -> dict[str, Any]:
        """As it will be after a round through JSON: tuples become lists, and a tensor is a TypeError."""
        return expect(json.loads(json.dumps(self.plain(value))), dict)

    def arguments(self, thing: Object) -> dict[str, Any]:
        """What `thing` was constructed with. All preconditioners begin with the same four arguments."""
        fields = expect(thing.state, dict)
        unnamed, named = expect(fields["_init_args"], tuple), expect(fields["_init_kwargs"], dict)
        names = ("img_resolution", "img_channels", "label_dim", "use_fp16")
        if len(unnamed) > (len(names) if thing.kind in PRECONDITIONERS else 0):
            raise RefusedCheckpoint(f"constructs a {thing.kind} with {len(unnamed)} arguments that have no name")
        return self.json(dict(zip(names, unnamed, strict=False)) | named)

    def part(self, thing: object) -> dict[str, Any] | None:
        if thing is None:
            return None
        return {"class_name": expect(thing, Object).kind, **self.arguments(expect(thing, Object))}
