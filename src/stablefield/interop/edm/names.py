"""Every name that an EDM or STF checkpoint may contain, and the data that stands for it.

A file says `torch._utils._rebuild_tensor_v2(storage, 0, (64, 16), (16, 1), ...)`; here that is a
`TensorView`, a claim about bytes that is checked and then kept for later. No entry of the tables imports,
constructs or calls anything but what is written in this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch

T = TypeVar("T")

PRECONDITIONERS = frozenset({"VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond"})
NETWORKS = frozenset({"SongUNet", "DhariwalUNet"})
LAYERS = frozenset({"Linear", "Conv2d", "GroupNorm", "UNetBlock", "PositionalEmbedding", "FourierEmbedding"})
LOSSES = frozenset({"VPLoss", "VELoss", "EDMLoss", "AugmentPipe"})


class RefusedCheckpoint(ValueError):
    """The file holds something that no EDM or STF checkpoint holds, or is damaged. Nothing of it was run."""


def printable(text: str) -> str:
    """The file chose this text: no line breaks, no terminal codes, no novels."""
    return ascii(text)[1:-1][:160]


def refusal(name: str) -> RefusedCheckpoint:
    return RefusedCheckpoint(f"refuses `{printable(name)}`, which no EDM or STF checkpoint contains")


def expect(value: object, kind: type[T]) -> T:
    """`value`, if it is of exactly this type. Says no more of another value than its type: it may be huge."""
    if type(value) is not kind:
        raise RefusedCheckpoint(f"has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


@dataclass(frozen=True)
class Name:
    """A name in the file, as pickle writes it: "module name"."""

    path: str

    def __str__(self) -> str:
        return self.path.replace(" ", ".")


@dataclass(eq=False)
class Object:
    """An instance of a class called `kind`: its `__dict__`, and nothing of its class."""

    kind: str
    state: dict[Any, Any] | None = None


@dataclass(eq=False)
class Storage:
    """`count` numbers. In torch's formats their bytes follow later than their mention."""

    dtype: torch.dtype
    count: int
    data: memoryview = field(default=memoryview(b""))

    def fill(self, data: memoryview) -> None:
        if len(data) != self.count * self.dtype.itemsize:
            raise RefusedCheckpoint(f"has {len(data)} bytes for {printable(str(self.count))} of {self.dtype}")
        self.data = data


@dataclass(frozen=True, eq=False)
class TensorView:
    """Where in a storage a tensor's elements are, in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def extent(self) -> int:
        """From the first element to behind the last."""
        last = sum((n - 1) * stride for n, stride in zip(self.size, self.stride, strict=True))
        return last + 1 if self.numel else 0


@dataclass(eq=False)
class Dtype:
    """One of numpy's types of numbers."""

    code: str
    order: str = "="


def persistent_object(meta: object) -> Object:
    record = expect(meta, dict)  # its "module_src" is the source code; it stays where it is
    name = expect(record["class_name"], str)
    if record["type"] != "class" or name not in PRECONDITIONERS | NETWORKS | LAYERS | LOSSES:
        raise refusal(name)
    return Object(name, expect(record["state"], dict))


def tensor_view(
    storage: object,
    offset: int,
    size: object,
    stride: object,
    requires_grad: object,
    backward_hooks: object,
    metadata: object = None,
) -> TensorView:
    view = TensorView(expect(storage, Storage), offset, expect(size, tuple), expect(stride, tuple))
    numbers = (offset, *view.size, *view.stride)
    if len(numbers) > 1 + 2 * 8 or not all(type(n) is int and n >= 0 for n in numbers):
        raise RefusedCheckpoint("has a tensor whose offset, sizes or strides are negative, no integers, or too many")
    # An expanded tensor (stride 0) would be larger than what the file has for it, and an empty one could have
    # sizes that torch cannot count.
    beyond = offset + view.extent > view.storage.count or view.numel > view.storage.count
    if beyond or math.prod(max(n, 1) for n in view.size) > 2**40:
        raise RefusedCheckpoint("has a tensor that reaches beyond its storage")
    return view


def parameter(data: object, requires_grad: object, backward_hooks: object) -> TensorView:
    return expect(data, TensorView)


def members(values: object) -> list[Any]:
    # no set is ever wanted, so that its list will do; a set would cost a copy at each mention of the list
    return expect(values, list)


def dtype(code: object, align: object = False, copy: object = False) -> Dtype:
    name = expect(code, str)
    if name not in {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}:
        raise refusal(f"numpy.dtype({name})")
    return Dtype(name)


def scalar(kind: object, data: object) -> bool | int | float:
    number = np.dtype(expect(kind, Dtype).order + expect(kind, Dtype).code)
    if len(expect(data, bytes)) != number.itemsize:
        raise RefusedCheckpoint(f"has a numpy scalar that is not {number.itemsize} bytes long")
    return cast("bool | int | float", np.frombuffer(expect(data, bytes), number)[0].item())


def encode(text: object, encoding: object) -> bytes:
    # Protocol 2 spells bytes as text. Only numpy's scalars have any here, and longer ones would cost a copy
    # at each mention.
    if encoding != "latin1" or len(expect(text, str)) > 16:
        raise RefusedCheckpoint("refuses `_codecs.encode` of anything but the bytes of a number")
    return expect(text, str).encode("latin1")


STORAGES = {  # persistent ids only
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}

INSTANCES: dict[str, Callable[[], object]] = {  # name.__new__(name)
    "dnnlib.util EasyDict": dict,
    "torch.nn.modules.container ModuleDict": lambda: Object("ModuleDict"),
    "torch.nn.modules.container ModuleList": lambda: Object("ModuleList"),
    "torch.nn.modules.container Sequential": lambda: Object("Sequential"),
}

LOAD_FROM_BYTES = "torch.storage _load_from_bytes"  # an archive within the pickle: forms.py reads it

RESULTS: dict[str, Callable[..., object]] = {  # name(*arguments)
    "torch_utils.persistence _reconstruct_persistent_obj": persistent_object,
    "torch._utils _rebuild_tensor_v2": tensor_view,
    "torch._utils _rebuild_parameter": parameter,
    "collections OrderedDict": lambda: {},
    "__builtin__ set": members,
    "builtins set": members,
    "numpy dtype": dtype,
    "numpy.core.multiarray scalar": scalar,  # numpy 1
    "numpy._core.multiarray scalar": scalar,  # numpy 2
    "_codecs encode": encode,
}

ALL = frozenset({LOAD_FROM_BYTES, *STORAGES, *INSTANCES, *RESULTS})
