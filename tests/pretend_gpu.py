"""A GPU that is not there, to test the rules of one on any machine.

A tensor "on cuda" is a CPU tensor whose storage is listed. So values, control flow, autograd and optimisers are real,
and `x.device` is cuda:0. `PretendGPU` records what a GPU would refuse (`mistakes`): operations on tensors of both
devices, generators of the wrong device, NumPy arrays of its tensors, and int8 products in layouts or shapes that
cuBLASLt does not take. It also records what makes the host wait (`waits`), with the line of the package that asked:
item, bool, tolist, nonzero, boolean indices, unique, copies to the CPU, and copies to the GPU that are not
non_blocking from pinned memory. And it counts operations (`operations`), multiplications in float64 (`float64`), and
bytes copied from the CPU by type (`copied`). Normalisations have the layout and, under autocast, the type of CUDA's.

`gpu()` is a pretended GPU, or the GPU of this machine with `pytest --gpu`.
"""

import contextlib
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import torch.amp.autocast_mode
import torch.cuda.amp.common
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
DATA_SHAPED = {"nonzero", "_unique2", "masked_select", "unique_consecutive", "unique_dim", "bincount"}
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
FLOAT32 = {"group_norm", "layer_norm"}  # what autocast computes in float32 on a GPU, but not on a CPU
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv"}


class Listed:
    """The storages of some tensors, for as long as these live."""

    def __init__(self) -> None:
        self.storages: dict[int, StorageWeakRef] = {}

    def add(self, x: Tensor) -> Tensor:
        if x.layout is torch.strided:
            storage = x.untyped_storage()
            self.storages[storage._cdata] = StorageWeakRef(storage)
        return x

    def remove(self, x: Tensor) -> Tensor:
        self.storages.pop(x.untyped_storage()._cdata, None)
        return x

    def __contains__(self, x: Tensor) -> bool:
        if x.layout is not torch.strided:
            return False
        try:
            key = x.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return False
        if (storage := self.storages.get(key)) is None:
            return False
        if storage.expired():
            del self.storages[key]
            return False
        return True


ON_GPU, PINNED = Listed(), Listed()
GPU_GENERATORS: dict[int, torch.Generator] = {}


def is_cuda(device: Any) -> bool:
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


def asking_line() -> str:
    """The innermost line of the package, or else of a test."""
    frame, outside = sys._getframe(1), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/stablefield/" in name and "/tests/" not in name:
            return f"{name.rpartition('/stablefield/')[2]}:{frame.f_lineno}"
        if outside == "?" and "/torch/" not in name and "pretend_gpu" not in name:
            outside = f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return outside


class Operations(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, gpu: "PretendGPU") -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[-1]
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x in ON_GPU for x in tensors]
        self.gpu.operations[name] += 1
        if any(there) or self.gpu.wanted:
            self._judge(name, args, kwargs, tensors, there)
            if name == "_int_mm":
                args = (args[0].contiguous(), args[1])
        out = func(*args, **kwargs)
        if name == "native_group_norm" and any(there):  # CUDA's kernel knows one layout
            out = (out[0].contiguous(), *out[1:])
        writes = any(each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments)
        if (any(there) or self.gpu.wanted) and name not in READS and not (writes and there and not there[0]):
            for x in pytree.tree_leaves(out):
                if isinstance(x, Tensor):
                    ON_GPU.add(x)
        return out

    def _judge(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], there: list[bool]) -> None:
        gpu = self.gpu
        if name in INDEXING:
            self._judge_index(name, args)
        elif name == "copy_":
            self._judge_copy(args, kwargs, there)
        elif any(there) and any(x.ndim > 0 and not on for x, on in zip(tensors, there, strict=True)):
            each = (f"{tuple(x.shape)} {'GPU' if on else 'CPU'}" for x, on in zip(tensors, there, strict=True))
            gpu.mistake(f"{name} of {', '.join(each)}")
        if (name in READS or name in DATA_SHAPED) and any(there):
            gpu.wait("item, bool or equal" if name in READS else name)
        if name == "_int_mm":
            self._judge_int8(*args)
        if name in PRODUCTS and tensors[-1].dtype == torch.float64:
            left, right = tensors[-2:]
            gpu.float64[asking_line()] += left.numel() * (right.shape[-1] if right.ndim > 1 else 1)

    def _judge_index(self, name: str, args: Any) -> None:
        x, indices = args[0], args[1]
        for index in (index for index in indices if index is not None):
            if index in ON_GPU and x not in ON_GPU:
                self.gpu.mistake(f"{name} of a CPU tensor by an index on the GPU")
            elif x in ON_GPU and index not in ON_GPU:
                self.gpu.wait("index on the CPU into a tensor on the GPU")
            elif x in ON_GPU and index.dtype in (torch.bool, torch.uint8):
                self.gpu.wait("boolean index")
        if len(args) > 2 and (args[2] in ON_GPU) != (x in ON_GPU) and args[2].ndim:
            self.gpu.mistake(f"{name} of values on the other device")

    def _judge_copy(self, args: Any, kwargs: Any, there: list[bool]) -> None:
        if there[0] == there[1]:
            return
        target, source = args[:2]
        if there[0]:
            self.gpu.copied[source.dtype] += source.nbytes
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        host = source if there[0] else target
        if not (non_blocking and host in PINNED and source.dtype == target.dtype):
            self.gpu.wait(f"copy_ to the {'GPU' if there[0] else 'CPU'}")

    def _judge_int8(self, left: Tensor, right: Tensor) -> None:
        (rows, inner), columns = left.shape, right.shape[1]
        if rows <= 16 or inner % 8 or columns % 8:
            self.gpu.mistake(f"_int_mm of {tuple(left.shape)} x {tuple(right.shape)}")
        if not left.is_contiguous() or not right.T.is_contiguous():
            self.gpu.mistake("_int_mm whose left factor is not row-major or whose right factor is not column-major")


class PretendGPU(TorchFunctionMode):
    """Context in which a GPU seems to exist; see `mistakes` and `waits` afterwards.

    Args:
        capability: its compute capability.
        memory: its memory in bytes.

    Attributes:
        rounding: the largest error of its results: none.
    """

    rounding = 0.0

    def __init__(self, capability: tuple[int, int] = (9, 0), memory: int = 80 * 2**30) -> None:
        super().__init__()
        self.capability, self.memory, self.wanted = capability, memory, False
        self.below = Operations(self)
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        self.waits: Counter[tuple[str, str]] = Counter()
        self.mistakes: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[str] = Counter()
        self.float64: Counter[str] = Counter()
        self.copied: Counter[torch.dtype] = Counter()

    def wait(self, what: str) -> None:
        self.waits[what, asking_line()] += 1

    def mistake(self, what: str) -> None:
        self.mistakes[what, asking_line()] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__" and x is not None:
            found = {"device": CUDA if x in ON_GPU else None, "is_cuda": x in ON_GPU, "is_cpu": x not in ON_GPU}
            attribute = found.get(getattr(getattr(func, "__self__", None), "__name__", ""))
            return func(*args, **kwargs) if attribute is None else attribute
        if x is not None and name in ("to", "cpu", "cuda", "type_as"):
            return self._to(name, x, args[1:], kwargs)
        if x is not None and name in ("pin_memory", "is_pinned"):
            if name == "is_pinned":
                return x in PINNED
            if x in ON_GPU:
                self.mistake("pin_memory of a tensor on the GPU")
            with torch._C.DisableTorchFunction():
                return x if x in PINNED else PINNED.add(x.clone(memory_format=torch.preserve_format))
        if x is not None and x in ON_GPU and name == "numpy":
            self.mistake("numpy() of a tensor on the GPU")
        if x is not None and x in ON_GPU and name == "tolist":
            self.wait("tolist")
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if name in FLOAT32 and x is not None and x in ON_GPU and torch.is_autocast_enabled("cpu"):
            args = tuple(each.float() if isinstance(each, Tensor) else each for each in args)
        self._judge_generator(name, args, kwargs)
        if kwargs.pop("pin_memory", False):
            return PINNED.add(func(*args, **kwargs))
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "meta":
            return self._make(func, name, x, args, kwargs)
        return func(*args, **kwargs)

    def _judge_generator(self, name: str, args: Any, kwargs: Any) -> None:
        if (generator := kwargs.get("generator")) is None:
            return
        if kwargs.get("device") is not None:
            there = is_cuda(kwargs["device"])
        else:
            there = any(isinstance(each, Tensor) and each in ON_GPU for each in args)
        if there != (id(generator) in GPU_GENERATORS):
            self.mistake(f"{name} with a generator of the other device")

    def _make(self, func: Any, name: str, x: Tensor | None, args: Any, kwargs: Any) -> Any:
        """A call that names the device of its result."""
        there = is_cuda(kwargs["device"])
        kwargs["device"] = "cpu"
        if name in ("as_tensor", "asarray") and x is not None:
            return self._moved(x, there, kwargs.get("dtype"), {})
        if name in ("tensor", "as_tensor", "asarray"):
            out = func(*args, **kwargs)
            if there:
                self.wait("copy to the GPU, of Python numbers")
                ON_GPU.add(out)
            return out
        before, self.wanted = self.wanted, there
        try:
            out = func(*args, **kwargs)
        finally:
            self.wanted = before
        if isinstance(out, Tensor):
            (ON_GPU.add if there else ON_GPU.remove)(out)
        return out

    def _to(self, name: str, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        if name in ("cpu", "cuda"):
            device, args = name, ()
        for each in args:
            if isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, Tensor):
                device, dtype = (CUDA if each in ON_GPU else "cpu"), each.dtype
            elif isinstance(each, str | torch.device):
                device = each
        return self._moved(x, x in ON_GPU if device is None else is_cuda(device), dtype, kwargs)

    def _moved(self, x: Tensor, there: bool, dtype: torch.dtype | None, kwargs: Any) -> Tensor:
        here, dtype, non_blocking = x in ON_GPU, dtype or x.dtype, kwargs.pop("non_blocking", False)
        if here != there and not (there and non_blocking and x in PINNED and dtype == x.dtype):
            self.wait(f"copy to the {'GPU' if there else 'CPU'}")
        if there and not here:
            self.copied[dtype] += x.numel() * dtype.itemsize
        with torch._C.DisableTorchFunction():
            y = x.to(dtype, **kwargs)
            if here != there and y.untyped_storage()._cdata == x.untyped_storage()._cdata:
                y = y.clone(memory_format=torch.preserve_format)
        return y if here == there == False else (ON_GPU.add if there else ON_GPU.remove)(y)  # noqa: E712

    def __enter__(self) -> "PretendGPU":
        self.stack = contextlib.ExitStack()

        def patch(owner: Any, name: str, value: Any) -> None:
            self.stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        real, fork_rng, autocast = torch.Generator, torch.random.fork_rng, torch.amp.autocast_mode.autocast.__init__

        class Meta(type):
            def __call__(cls, device: Any = "cpu") -> torch.Generator:
                generator = real("cpu")
                if is_cuda(device):
                    GPU_GENERATORS[id(generator)] = generator
                return generator

            def __instancecheck__(cls, x: Any) -> bool:
                return isinstance(x, real)

            def __or__(cls, other: Any) -> Any:
                return real | other

            __ror__ = __or__

        def on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        patch(torch, "Generator", Meta("Generator", (), {}))
        patch(torch.cuda, "is_available", lambda: True)
        patch(torch.cuda, "get_device_capability", lambda device=None: self.capability)
        properties = SimpleNamespace(total_memory=self.memory, name="pretended", major=self.capability[0])
        patch(torch.cuda, "get_device_properties", lambda device=None: properties)
        patch(torch.cuda, "max_memory_allocated", lambda device=None: 0)
        patch(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
        patch(torch.cuda, "_lazy_init", lambda: None)
        patch(torch.cuda, "is_current_stream_capturing", lambda: False)  # a CUDA build without a driver would raise
        patch(torch.random, "fork_rng", lambda devices=None, *args, **kwargs: fork_rng([], *args, **kwargs))
        patch(torch.amp.autocast_mode.autocast, "__init__", on_cpu)
        group = torch._C._group_tensors_by_device_and_dtype

        def by_device(lists: Any, with_indices: bool = False) -> Any:
            return {
                ((CUDA if found[0][0][0] in ON_GPU else device), dtype): found
                for (device, dtype), found in group(lists, with_indices).items()
            }

        patch(torch._C, "_group_tensors_by_device_and_dtype", by_device)
        patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        self.stack.enter_context(self.below)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.stack.__exit__(*error)


class RealGPU(contextlib.AbstractContextManager["RealGPU"]):
    """The GPU of this machine, which raises errors where the pretended one lists mistakes; it counts no waits.

    Attributes:
        rounding: the largest error, relative and absolute, of results in float32 whose sums have another order.
        mistakes: always empty.
    """

    rounding = 2e-4
    chosen = False  # by `pytest --gpu`

    def __init__(self) -> None:
        self.mistakes: Counter[tuple[str, str]] = Counter()

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()


def gpu() -> PretendGPU | RealGPU:
    """A pretended GPU, or the GPU of this machine with `pytest --gpu`."""
    return RealGPU() if RealGPU.chosen else PretendGPU()
