"""Allow-list of every name that an EDM or STF checkpoint may contain, and the data that stands for it.

A file says `torch._utils._rebuild_tensor_v2(storage, 0, (64, 16), (16, 1), ...)`; here that becomes a `TensorView`,
whose claims about bytes are checked and kept for later. No entry of the tables imports, constructs or calls anything
but what is defined in this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch

__all__ = [
    "ALL_NAMES",
    "CLASSES",
    "FUNCTIONS",
    "LAYERS",
    "LOAD_FROM_BYTES",
    "LOSSES",
    "NETWORKS",
    "PRECONDITIONERS",
    "STORAGE_TYPES",
    "Dtype",
    "EDMCheckpointError",
    "Name",
    "Object",
    "Storage",
    "TensorView",
    "expect",
    "not_allowed",
    "printable",
]

T = TypeVar("T")

PRECONDITIONERS = frozenset({"VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond"})
NETWORKS = frozenset({"SongUNet", "DhariwalUNet"})
LAYERS = frozenset({"Linear", "Conv2d", "GroupNorm", "UNetBlock", "PositionalEmbedding", "FourierEmbedding"})
LOSSES = frozenset({"VPLoss", "VELoss", "EDMLoss", "AugmentPipe"})


class EDMCheckpointError(ValueError):
    """The file is damaged or contains something that no EDM or STF checkpoint contains; nothing of it was run."""


def printable(text: str) -> str:
    """Text from the file, made safe to print: without line breaks and terminal codes, at most 160 characters.

    Args:
        text: any text, chosen by whoever wrote the file.
    """
    return ascii(text)[1:-1][:160]


def not_allowed(name: str) -> EDMCheckpointError:
    """The error for a name that is not on the allow-list.

    Args:
        name: the name as the file gives it, with dots.
    """
    return EDMCheckpointError(f"`{printable(name)}` is not allowed in an EDM or STF checkpoint")


def expect(value: object, kind: type[T]) -> T:
    """The value, if it has exactly this type (not a subclass).

    Args:
        value: any data from the file.
        kind: the type that it must have.

    Raises:
        EDMCheckpointError: it has another type. Only the type is printed, because the value may be huge.
    """
    if type(value) is not kind:
        raise EDMCheckpointError(f"found a {type(value).__name__} where a {kind.__name__} is expected")
    return value


@dataclass(frozen=True)
class Name:
    """A global that a pickle refers to: the name of a class or function, which is never imported.

    Attributes:
        path: module and name, separated by a space.
    """

    path: str

    def __str__(self) -> str:
        return self.path.replace(" ", ".")


@dataclass(eq=False)
class Object:
    """An instance of a class, reduced to the name of its class and its `__dict__`.

    Attributes:
        kind: name of the class.
        state: the instance's `__dict__`; None until the file sets it.
    """

    kind: str
    state: dict[Any, Any] | None = None


@dataclass(eq=False)
class Storage:
    """Numbers of one type; torch's formats store their bytes after the pickle that refers to them.

    Attributes:
        dtype: type of the numbers.
        count: how many there are.
        data: their bytes, empty until `fill`.
    """

    dtype: torch.dtype
    count: int
    data: memoryview = field(default=memoryview(b""))

    def fill(self, data: memoryview) -> None:
        """Set the bytes of the storage.

        Args:
            data: `count` numbers as bytes.

        Raises:
            EDMCheckpointError: there are more or fewer bytes.
        """
        if len(data) != self.count * self.dtype.itemsize:
            raise EDMCheckpointError(f"found {len(data)} bytes for {printable(str(self.count))} of {self.dtype}")
        self.data = data


@dataclass(frozen=True, eq=False)
class TensorView:
    """Position of a tensor's elements in a storage, counted in elements.

    Attributes:
        storage: where the elements are.
        offset: index of the first element.
        size: shape of the tensor.
        stride: distance of neighbours along each dimension.
    """

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.size)

    @property
    def extent(self) -> int:
        """Number of elements of the storage from the first to the last that is used."""
        last = sum((n - 1) * stride for n, stride in zip(self.size, self.stride, strict=True))
        return last + 1 if self.numel else 0


@dataclass(eq=False)
class Dtype:
    """A numeric type of numpy.

    Attributes:
        code: kind and size in bytes, as "f8".
        order: byte order, as numpy writes it.
    """

    code: str
    order: str = "="


# ---- results of the functions that a file may call


def _persistent_object(meta: object) -> Object:
    record = expect(meta, dict)  # its "module_src" is the source code, which is never read
    name = expect(record["class_name"], str)
    if record["type"] != "class" or name not in PRECONDITIONERS | NETWORKS | LAYERS | LOSSES:
        raise not_allowed(name)
    return Object(name, expect(record["state"], dict))


def _tensor_view(
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
        raise EDMCheckpointError("a tensor has offset, sizes or strides that are negative, not integers, or too many")
    # An expanded tensor (stride 0) would be larger than its bytes in the file, and an empty one could have sizes that
    # torch cannot represent.
    beyond = offset + view.extent > view.storage.count or view.numel > view.storage.count
    if beyond or math.prod(max(n, 1) for n in view.size) > 2**40:
        raise EDMCheckpointError("a tensor extends beyond its storage")
    return view


def _parameter(data: object, requires_grad: object, backward_hooks: object) -> TensorView:
    return expect(data, TensorView)


def _set_as_list(values: object) -> list[Any]:
    # No set is ever needed, so that its list is enough; a set would cost a copy at each reference to the list.
    return expect(values, list)


def _dtype(code: object, align: object = False, copy: object = False) -> Dtype:
    name = expect(code, str)
    if name not in {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}:
        raise not_allowed(f"numpy.dtype({name})")
    return Dtype(name)


def _scalar(kind: object, data: object) -> bool | int | float:
    number = np.dtype(expect(kind, Dtype).order + expect(kind, Dtype).code)
    if len(expect(data, bytes)) != number.itemsize:
        raise EDMCheckpointError(f"a numpy scalar is not {number.itemsize} bytes long")
    return cast("bool | int | float", np.frombuffer(expect(data, bytes), number)[0].item())


def _encode(text: object, encoding: object) -> bytes:
    # Protocol 2 writes bytes as text. Only numpy's scalars need that here, and longer texts would cost a copy at each
    # reference.
    if encoding != "latin1" or len(expect(text, str)) > 16:
        raise EDMCheckpointError("`_codecs.encode` is allowed for the bytes of a number only")
    return expect(text, str).encode("latin1")


STORAGE_TYPES = {  # in persistent ids only
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

CLASSES: dict[str, Callable[[], object]] = {  # what name.__new__(name) yields
    "dnnlib.util EasyDict": dict,
    "torch.nn.modules.container ModuleDict": lambda: Object("ModuleDict"),
    "torch.nn.modules.container ModuleList": lambda: Object("ModuleList"),
    "torch.nn.modules.container Sequential": lambda: Object("Sequential"),
}

LOAD_FROM_BYTES = "torch.storage _load_from_bytes"  # an archive within the pickle, which containers.py reads

FUNCTIONS: dict[str, Callable[..., object]] = {  # what name(*arguments) yields
    "torch_utils.persistence _reconstruct_persistent_obj": _persistent_object,
    "torch._utils _rebuild_tensor_v2": _tensor_view,
    "torch._utils _rebuild_parameter": _parameter,
    "collections OrderedDict": lambda: {},
    "__builtin__ set": _set_as_list,
    "builtins set": _set_as_list,
    "numpy dtype": _dtype,
    "numpy.core.multiarray scalar": _scalar,  # numpy 1
    "numpy._core.multiarray scalar": _scalar,  # numpy 2
    "_codecs encode": _encode,
}

ALL_NAMES = frozenset({LOAD_FROM_BYTES, *STORAGE_TYPES, *CLASSES, *FUNCTIONS})
