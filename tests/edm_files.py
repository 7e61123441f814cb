"""Checkpoints in the forms that EDM and STF publish, for the tests.

The published form of a small network is mostly its weights, and these lie in `state.safetensors` too. So
`data/edm/*/*.hollow.xz` keeps the files without them: a line of JSON that says where each tensor belongs, and
the pickle with zeros in their place. `snapshot` and `training_state` put the two together again.

`save` writes networks of the test's own in every form, by way of the real `pickle.dump` and `torch.save`.
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
FORMS = ["pickle3", "pickle4", "pickle5", "zip", "older"]


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
    """The published `training-state-000012.pt`, but for zeros in `net` and in the optimiser's averages."""
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
    """EDM's modules as far as pickle looks at them: it writes a name only if it finds the thing there."""
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
    """An instance that pickles as EDM's classes do: what it is called, its source, its `__dict__`."""

    def reduce(self):
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name}
        return _reconstruct_persistent_obj, ({**meta, "state": self.__dict__},)

    thing = type(class_name, (base,), {"__reduce__": reduce})()
    thing._init_args, thing._init_kwargs = (), arguments
    return thing


class Plain:
    """Base of the losses, which are no modules."""


def network(source="raise RuntimeError('never to be run')", precond="EDMPrecond", **arguments):
    """A little of everything that networks consist of, in EDM's arrangement; not meant to be evaluated."""

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
    """What a published file is a pickle of."""
    ema = replaced.pop("ema", None) or network()
    if kind == "network-snapshot":
        parts = {
            "loss_fn": persistent("EDMLoss", Plain, sigma_data=np.float64(0.5)),
            "augment_pipe": persistent("AugmentPipe", Plain, p=0.12),
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


def save(data, form):
    """The bytes of `data`, in one of `FORMS`."""
    file = io.BytesIO()
    with edm_modules():
        if form.startswith("pickle"):
            pickle.dump(data, file, protocol=int(form[-1]))
        else:
            torch.save(data, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()
