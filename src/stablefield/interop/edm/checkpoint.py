"""From the data of a file to a checkpoint: weights of the moving average, and the arguments that build the network.

The data may refer to the same part many times, or contain itself. Everything that is kept is copied by one `_Copier`,
which limits the total size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from stablefield.data.pickles import RefusedError, expect, not_allowed, refusing
from stablefield.interop.edm.allowlist import PRECONDITIONERS, Object, TensorView
from stablefield.interop.edm.containers import read_file


@dataclass(frozen=True)
class EDMCheckpoint:
    """Contents of an EDM or STF checkpoint, as plain data.

    Attributes:
        kind: which of the two kinds of file it is.
        precond: class name of the preconditioner, one of `PRECONDITIONERS`.
        arguments: constructor arguments of the preconditioner (`model_type`, `img_resolution`, ...), as after a round
            trip through JSON.
        state: parameters and buffers of the exponential moving average under EDM's names (`model.enc...`), on the CPU,
            contiguous and independent of the file.
        loss: class name and constructor arguments of the loss (`{"class_name": "EDMLoss"}`), if present.
        augment: class name and constructor arguments of the augmentation, if present.
        dataset_kwargs: arguments with which the training set was opened, if present.
        step: step of the training state, if present.
        optimizer_state: `state_dict` of the optimiser (training states only). It belongs to the network that was being
            trained, which is one step ahead of the average in `state`.
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
    """Read `network-snapshot-*.pkl` or `training-state-*.pt` as published by EDM and STF, without unpickling.

    Args:
        path: the file: a pickle (protocol 2 or later), or either of `torch.save`'s formats.

    Returns:
        The weights of the moving average, and the arguments that build the network.

    Raises:
        RefusedError: the file is damaged, or contains a name that is not on the allow-list (a ValueError).
        OSError: the file cannot be opened.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022)
        Stable Target Field for Reduced Variance Score Estimation in Diffusion Models (Xu et al., 2023)
    """
    path = Path(path)
    with refusing(path.name):
        return _checkpoint(expect(read_file(path), dict), _Copier(path.stat().st_size))


def _checkpoint(data: dict[str, Any], copier: _Copier) -> EDMCheckpoint:
    if "ema" not in data:
        raise RefusedError(
            "there is no moving average (`ema`); read the network-snapshot-*.pkl of the same run instead"
        )
    network = expect(data["ema"], Object)
    if network.kind not in PRECONDITIONERS:
        raise RefusedError(f"`ema` is a {network.kind}, not one of {', '.join(sorted(PRECONDITIONERS))}")
    optimizer, step = data.get("optimizer_state"), data.get("step")
    return EDMCheckpoint(
        kind="network-snapshot" if optimizer is None else "training-state",
        precond=network.kind,
        arguments=copier.arguments(network),
        state=dict(copier.state(network)),
        loss=copier.class_and_arguments(data.get("loss_fn")),
        augment=copier.class_and_arguments(data.get("augment_pipe")),
        dataset_kwargs=copier.json(data.get("dataset_kwargs") or {}) or None,
        step=None if step is None else expect(step, int),
        optimizer_state=None if optimizer is None else copier.plain(expect(optimizer, dict)),
    )


@dataclass
class _Copier:
    """Copies data out of a file within a size budget, so that a small file cannot expand to a large one."""

    budget: int  # bytes that may still be copied; a number or a character counts as one byte

    def charge(self, octets: int) -> None:
        """Subtract from the budget."""
        self.budget -= octets
        if self.budget < 0:
            raise RefusedError("the data expand to more than the size of the file")

    def tensor(self, view: TensorView) -> Shaped[Tensor, " *size"]:
        """A contiguous copy of a tensor."""
        dtype, extent = view.storage.dtype, view.extent
        self.charge(1 + max(extent, view.numel) * dtype.itemsize)
        if extent == 0:
            return torch.empty(view.size, dtype=dtype)
        octets = np.frombuffer(view.storage.data, np.uint8)[view.offset * dtype.itemsize :]
        elements = torch.tensor(octets[: extent * dtype.itemsize]).view(dtype)
        return elements.as_strided(view.size, view.stride).contiguous()

    def state(self, module: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as in `Module.state_dict`."""
        fields = expect(expect(module, Object).state, dict)
        for part in ("_parameters", "_buffers", "_modules"):
            for name, value in expect(fields[part], dict).items():
                if not re.fullmatch(r"\w{1,100}", expect(name, str), re.ASCII):
                    raise not_allowed(name)
                self.charge(len(prefix) + len(name))
                if part == "_modules" and value is not None:
                    yield from self.state(value, f"{prefix}{name}.")
                elif value is not None:
                    yield prefix + name, self.tensor(expect(value, TensorView))

    def plain(self, value: object) -> Any:
        """A copy of containers, strings, numbers and tensors; anything else is refused."""
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
                raise not_allowed(value.kind if isinstance(value, Object) else type(value).__name__)

    def json(self, value: object) -> dict[str, Any]:
        """A dictionary as after a round trip through JSON: tuples become lists, and a tensor is a TypeError."""
        return expect(json.loads(json.dumps(self.plain(value))), dict)

    def arguments(self, instance: Object) -> dict[str, Any]:
        """Constructor arguments by name; the first four are the same for all preconditioners."""
        fields = expect(instance.state, dict)
        positional, keyword = expect(fields["_init_args"], tuple), expect(fields["_init_kwargs"], dict)
        names = ("img_resolution", "img_channels", "label_dim", "use_fp16")
        if len(positional) > (len(names) if instance.kind in PRECONDITIONERS else 0):
            raise RefusedError(f"a {instance.kind} has {len(positional)} positional arguments, whose names are unknown")
        return self.json(dict(zip(names, positional, strict=False)) | keyword)

    def class_and_arguments(self, instance: object) -> dict[str, Any] | None:
        """Class name and constructor arguments, or None if there is no such object."""
        if instance is None:
            return None
        return {"class_name": expect(instance, Object).kind, **self.arguments(expect(instance, Object))}
