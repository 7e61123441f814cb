"""Allow-list of every name that an EDM or STF checkpoint may contain, and the data that stands for it.

A file says `torch._utils._rebuild_tensor_v2(storage, 0, (64, 16), (16, 1), ...)`; here that becomes a `TensorView`,
whose claims about bytes are checked and kept for later. No entry of the tables imports, constructs or calls anything
but what is defined in this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from typing_extensions import override

from stablefield.data.pickles import NUMPY, Dtype, Instances, Record, RefusedError, Table, expect, not_allowed
from stablefield.files import printable

PRECONDITIONERS = frozenset({"VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond"})
NETWORKS = frozenset({"SongUNet", "DhariwalUNet"})
LAYERS = frozenset({"Linear", "Conv2d", "GroupNorm", "UNetBlock", "PositionalEmbedding", "FourierEmbedding"})
LOSSES = frozenset({"VPLoss", "VELoss", "EDMLoss", "AugmentPipe"})


@dataclass(eq=False)
class Object(Record):
    """An instance of a class, reduced to the name of its class and its `__dict__`.

    Attributes:
        kind: name of the class.
        state: the instance's `__dict__`; None until the file sets it.
    """

    kind: str
    state: dict[Any, Any] | None = None

    @override
    def set_state(self, state: object) -> None:
        if self.state is not None or type(state) is not dict:
            super().set_state(state)
        self.state = cast("dict[Any, Any]", state)


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
            RefusedError: there are more or fewer bytes.
        """
        if len(data) != self.count * self.dtype.itemsize:
            raise RefusedError(f"found {len(data)} bytes for {printable(str(self.count))} of {self.dtype}")
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
        raise RefusedError("a tensor has offset, sizes or strides that are negative, not integers, or too many")
    # An expanded tensor (stride 0) would be larger than its bytes in the file, and an empty one could have sizes that
    # torch cannot represent.
    beyond = offset + view.extent > view.storage.count or view.numel > view.storage.count
    if beyond or math.prod(max(n, 1) for n in view.size) > 2**40:
        raise RefusedError("a tensor extends beyond its storage")
    return view


def _parameter(data: object, requires_grad: object, backward_hooks: object) -> TensorView:
    return expect(data, TensorView)


def _set_as_list(values: object) -> list[Any]:
    # No set is ever needed, so that its list is enough; a set would cost a copy at each reference to the list.
    return expect(values, list)


def _scalar(kind: object, data: object) -> bool | int | float:
    number = np.dtype(expect(kind, Dtype).order + expect(kind, Dtype).code)
    if len(expect(data, bytes)) != number.itemsize:
        raise RefusedError(f"a numpy scalar is not {number.itemsize} bytes long")
    return cast("bool | int | float", np.frombuffer(expect(data, bytes), number)[0].item())


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

ALLOWED: Table = {
    **NUMPY,
    **dict.fromkeys(STORAGE_TYPES),
    "dnnlib.util EasyDict": Instances(dict),
    "torch.nn.modules.container ModuleDict": Instances(lambda: Object("ModuleDict")),
    "torch.nn.modules.container ModuleList": Instances(lambda: Object("ModuleList")),
    "torch.nn.modules.container Sequential": Instances(lambda: Object("Sequential")),
    "torch_utils.persistence _reconstruct_persistent_obj": _persistent_object,
    "torch._utils _rebuild_tensor_v2": _tensor_view,
    "torch._utils _rebuild_parameter": _parameter,
    "collections OrderedDict": lambda: {},
    "__builtin__ set": _set_as_list,
    "builtins set": _set_as_list,
    "numpy.core.multiarray scalar": _scalar,  # numpy 1
    "numpy._core.multiarray scalar": _scalar,  # numpy 2
}
