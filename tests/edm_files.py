"""Checkpoints in the file formats that EDM and STF publish, for the tests.

A published file of a small network consists mostly of its weights, which are in `state.safetensors` too. So
`data/edm/*/*.hollow.xz` holds the files without them: a line of JSON with the position of each tensor, and the pickle
with zeros in their place. `snapshot` and `training_state` put the two together again.

`save` writes networks made by the tests in every format, with the real `pickle.dump` and `torch.save`.
"""

import io
import json
import lzma
import pickle
import sys
import types
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data" / "edm"
CONFIGURATIONS = ["ddpmpp-edm", "ddpmpp-vp", "ncsnpp-edm-cond", "ncsnpp-ve"]
FORMATS = ["pickle3", "pickle4", "pickle5", "zip", "legacy"]


def weights(configuration):
    return load_file(DATA / configuration / "state.safetensors")


def _hollow(configuration, name):
    head, _, body = lzma.decompress((DATA / configuration / name).read_bytes()).partition(b"\n")
    return json.loads(head), body


def snapshot(configuration):
    """The bytes of the published `network-snapshot-000000.pkl`."""
    offsets, pickled = _hollow(configuration, "network-snapshot-000000.hollow.xz")
    filled = bytearray(pickled)
    for key, tensor in weights(configuration).items():
        octets = tensor.numpy().tobytes()
        filled[offsets[key] : offsets[key] + len(octets)] = octets
    return bytes(filled)


def training_state(configuration):
    """The published `training-state-000012.pt`, except for zeros in `net` and in the optimiser's averages."""
    where, pickled = _hollow(configuration, "training-state-000012.hollow.xz")
    records = {f"data/{key}": bytes(size) for key, size in where["sizes"].items()}
    for key, tensor in weights(configuration).items():
        records[f"data/{where['weights'][key]}"] = tensor.numpy().tobytes()
    return zipped({"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **records})


def zipped(records, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, octets in records.items():
            archive.writestr(f"training-state/{name}", octets)
    return file.getvalue()


def unzipped(octets):
    with zipfile.ZipFile(io.BytesIO(octets)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a checkpoint called the function that runs its source")


class EasyDict(dict):
    pass


@contextmanager
def edm_modules():
    """EDM's modules as far as pickle needs them: it writes a name only if it can import the object of that name."""
    homes = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    modules = {name: types.ModuleType(name) for home in homes for name in (home, home.partition(".")[0])}
    for home, thing in homes.items():
        thing.__module__ = home
        setattr(modules[home], thing.__name__, thing)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def persistent(class_name, base=torch.nn.Module, source="raise RuntimeError('never to be run')", **arguments):
    """An instance that is pickled as EDM's classes are: with the class name, its source code, and its `__dict__`."""

    def reduce(self):
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name}
        return _reconstruct_persistent_obj, ({**meta, "state": self.__dict__},)

    thing = type(class_name, (base,), {"__reduce__": reduce})()
    thing._init_args, thing._init_kwargs = (), arguments
    return thing


class NotAModule:
    """Base class of the losses, which are not modules."""


def network(source="raise RuntimeError('never to be run')", precond="EDMPrecond", **arguments):
    """A network with a layer of every kind, with EDM's structure; it cannot be evaluated."""

    def draw(*size, dtype=torch.float32):
        return torch.randn(*size, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(0)
    linear, conv = persistent("Linear", source=source), persistent("Conv2d", source=source)
    linear.weight = torch.nn.Parameter(draw(4, 3).mT)  # not contiguous
    linear.bias = torch.nn.Parameter(draw(6)[2:5])  # a part of its storage
    linear.skip_scale = np.sqrt(0.5)
    conv.register_parameter("weight", torch.nn.Parameter(draw(2, 3, 1, 1, dtype=torch.bfloat16)))
    conv.register_parameter("bias", None)
    conv.register_buffer("resample_filter", draw(1, 1, 2, 2, dtype=torch.float16))
    unet = persistent("SongUNet", source=source)
    unet.map_layer0, unet.map_label = linear, None
    unet.enc = torch.nn.ModuleDict({"16x16_conv": conv})
    named = {"img_resolution": 16, "img_channels": 3, "channel_mult": [1, 2], "sigma_max": float("inf")}
    net = persistent(precond, source=source, **(named | arguments))
    net.model = unet
    net.register_buffer("u", draw(5, dtype=torch.float64))
    net.register_buffer("count", torch.tensor(7))
    net.register_buffer("none", torch.zeros(0, 3))
    return net.requires_grad_(False)


def contents(kind="network-snapshot", **replaced):
    """The object that a published file is a pickle of."""
    ema = replaced.pop("ema", None) or network()
    if kind == "network-snapshot":
        parts = {
            "loss_fn": persistent("EDMLoss", NotAModule, sigma_data=np.float64(0.5)),
            "augment_pipe": persistent("AugmentPipe", NotAModule, p=0.12),
            "dataset_kwargs": EasyDict(path="x.zip", resolution=np.int64(16)),
        }
    else:
        parameters = [torch.nn.Parameter(torch.ones(3))]
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        parameters[0].sum().backward()
        optimizer.step()
        net = network().apply(lambda module: [p.add_(1) for p in module.parameters(recurse=False)])
        parts = {"net": net, "optimizer_state": optimizer.state_dict(), "step": 12345}
    return {"ema": ema, **parts, **replaced}


def save(data, file_format):
    """The bytes of `data` in one of `FORMATS`."""
    file = io.BytesIO()
    with edm_modules():
        if file_format.startswith("pickle"):
            pickle.dump(data, file, protocol=int(file_format[-1]))
        else:
            torch.save(data, file, _use_new_zipfile_serialization=file_format == "zip")
    return file.getvalue()
