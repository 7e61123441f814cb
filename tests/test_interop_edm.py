"""EDM's and STF's files are read as data: all that belongs in them, and nothing else, and none of it runs."""

import copy
import copyreg
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import edm_files
import pytest
import torch
from safetensors.torch import load_file

from stablefield.interop import edm
from stablefield.interop.edm import forms

FIXTURES = Path(os.environ.get("STABLEFIELD_FIXTURES", "nowhere")) / "edm"
PUBLISHED = sorted(FIXTURES.glob("*/*.p[kt]*"))

pytestmark = pytest.mark.usefixtures("unchecked")  # what a hostile file tries must meet our own checks


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a checkpoint."""

    def read(octets):
        path = tmp_path / "file.pkl"
        path.write_bytes(octets)
        return edm.read(path)

    return read


@pytest.fixture
def refused(read, tmp_path, monkeypatch):
    """Asserts that bytes are refused by name, and that nothing of them was imported or run (`touch ran`)."""
    monkeypatch.chdir(tmp_path)

    def refused(octets, *names):
        modules = set(sys.modules)
        with pytest.raises(edm.RefusedCheckpoint) as error:
            read(octets)
        assert "file.pkl" in str(error.value)
        assert all(name in str(error.value) for name in names), error.value
        # zipfile brings the encoding of old archives
        assert set(sys.modules) - modules <= {"encodings.cp437"}
        assert not (tmp_path / "ran").exists()

    return refused


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype
        assert state[key].is_contiguous()
        assert not state[key].requires_grad
        assert torch.equal(state[key], tensor), key


# --- What belongs in the files is read ---


@pytest.mark.parametrize("configuration", edm_files.CONFIGURATIONS)
def test_a_published_snapshot_gives_the_very_weights_and_arguments(read, configuration):
    checkpoint = read(edm_files.snapshot(configuration))
    config = json.loads((edm_files.DATA / configuration / "config.json").read_text())
    assert checkpoint.kind == "network-snapshot"
    assert (checkpoint.precond, checkpoint.arguments) == (config["precond"], config["kwargs"])
    assert_same(checkpoint.state, edm_files.weights(configuration))
    assert checkpoint.loss["class_name"] == config["precond"].replace("Precond", "Loss")
    assert checkpoint.dataset_kwargs["resolution"] == 16
    assert checkpoint.step is checkpoint.optimizer_state is None


@pytest.mark.parametrize("configuration", ["ddpmpp-edm", "ncsnpp-edm-cond"])
def test_a_published_training_state_gives_the_weights_of_the_moving_average(read, configuration):
    checkpoint = read(edm_files.training_state(configuration))
    config = json.loads((edm_files.DATA / configuration / "config.json").read_text())
    assert (checkpoint.kind, checkpoint.step) == ("training-state", 12345)
    assert (checkpoint.precond, checkpoint.arguments) == (config["precond"], config["kwargs"])
    assert_same(checkpoint.state, edm_files.weights(configuration))
    assert checkpoint.optimizer_state["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.skipif(not PUBLISHED, reason="STABLEFIELD_FIXTURES names no folder of published files")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_published_files_themselves_are_read(path):
    checkpoint = edm.read(path)
    config = json.loads((path.parent / "config.json").read_text())
    assert (checkpoint.precond, checkpoint.arguments) == (config["precond"], config["kwargs"])
    if (weights := path.parent / "state.safetensors").exists():
        assert_same(checkpoint.state, load_file(weights))
    if path.parent.name in edm_files.CONFIGURATIONS and path.suffix == ".pkl":
        assert path.read_bytes() == edm_files.snapshot(path.parent.name)


@pytest.mark.parametrize("form", edm_files.FORMS)
@pytest.mark.parametrize("kind", ["network-snapshot", "training-state"])
def test_either_file_is_read_in_every_form(read, kind, form):
    data = edm_files.contents(kind)
    checkpoint = read(edm_files.save(data, form))
    assert (checkpoint.kind, checkpoint.precond) == (kind, "EDMPrecond")
    assert checkpoint.arguments == data["ema"]._init_kwargs
    assert_same(checkpoint.state, data["ema"].state_dict())
    if kind == "network-snapshot":
        assert checkpoint.loss == {"class_name": "EDMLoss", "sigma_data": 0.5}
        assert checkpoint.augment == {"class_name": "AugmentPipe", "p": 0.12}
        assert checkpoint.dataset_kwargs == {"path": "x.zip", "resolution": 16}
    else:
        assert checkpoint.step == 12345
        torch.optim.Adam([torch.nn.Parameter(torch.ones(3))]).load_state_dict(checkpoint.optimizer_state)
        assert torch.allclose(checkpoint.optimizer_state["state"][0]["exp_avg"], torch.full((3,), 0.1))


@pytest.mark.parametrize("form", ["pickle3", "older"])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_are_read_under_either_of_their_names(read, form, module):
    octets = edm_files.save(edm_files.contents(), form)
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        octets = octets.replace(b"c" + name + b"\nscalar\n", b"c" + module.encode() + b"\nscalar\n")
    assert f"c{module}\nscalar".encode() in octets
    assert read(octets).loss == {"class_name": "EDMLoss", "sigma_data": 0.5}


def test_a_file_of_nothing_but_the_moving_average_is_a_snapshot(read):
    checkpoint = read(edm_files.save({"ema": edm_files.network()}, "pickle4"))
    assert checkpoint.kind == "network-snapshot"
    assert checkpoint.loss is checkpoint.augment is checkpoint.dataset_kwargs is None


def test_arguments_given_by_position_get_their_names(read):
    net = edm_files.network()
    net._init_args, net._init_kwargs = (16, 3), {"label_dim": 4}
    checkpoint = read(edm_files.save({"ema": net}, "pickle4"))
    assert checkpoint.arguments == {"img_resolution": 16, "img_channels": 3, "label_dim": 4}


def test_the_weights_outlive_the_file_and_can_be_written_to(tmp_path):
    path = tmp_path / "network-snapshot-000000.pkl"
    path.write_bytes(edm_files.save(edm_files.contents(), "pickle4"))
    state = edm.read(path).state
    before = path.read_bytes()
    path.unlink()
    assert_same(state, edm_files.network().state_dict())
    state["u"].zero_()
    path.write_bytes(before)
    assert_same(edm.read(path).state, edm_files.network().state_dict())


# --- Nothing is run ---


@pytest.mark.parametrize("form", edm_files.FORMS)
def test_the_source_in_a_file_is_never_run(read, tmp_path, form):
    source = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    net = edm_files.network(source=source)
    assert_same(read(edm_files.save({"ema": net}, form)).state, net.state_dict())
    assert not (tmp_path / "ran").exists()


def test_names_that_python_treats_specially_are_mere_keys(read):
    net = edm_files.network()
    for name in ("__setstate__", "__class__", "__dict__", "__del__", "state_dict", "kind"):
        net.__dict__[name] = "os.system"
    assert_same(read(edm_files.save({"ema": net}, "pickle4")).state, edm_files.network().state_dict())


def call(path, protocol):
    """The instructions that call anything by its name: GLOBAL in protocol 2, STACK_GLOBAL in 4."""
    parts = [part.encode() for part in path.split(" ")]
    if protocol == 2:
        named = b"c" + b"".join(part + b"\n" for part in parts)
    else:
        named = b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts) + b"\x93"
    return named + text("touch ran") + b"\x85R"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def mapping(**items):
    """The instructions that build a dict of instructions."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def whole(instructions, protocol=4):
    return b"\x80" + bytes([protocol]) + instructions + b"."


REACHING = [
    "os system",
    "posix system",
    "nt system",
    "subprocess Popen",
    "builtins eval",
    "builtins exec",
    "builtins getattr",
    "builtins __import__",
    "__builtin__ eval",
    "importlib import_module",
    "runpy run_path",
    "pydoc locate",
    "operator attrgetter",
    "functools partial",
    "types FunctionType",
    "copyreg _reconstructor",
    "pickle loads",
    "_pickle loads",
    "marshal loads",
    "numpy load",
    "numpy.core.multiarray _reconstruct",
    "torch load",
    "torch.hub load",
    "torch.jit load",
    "torch.serialization _load",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_device_tensor_from_numpy",
    "torch UntypedStorage",
    "torch.storage UntypedStorage",
    "torch.nn.modules.linear Linear",
    "torch_utils.persistence persistent_class",
    "dnnlib.util open_url",
    "dnnlib.util call_func_by_name",
    "stablefield.interop.edm read",
    "stablefield.interop.edm.names Object",
    # a dot within the name is how protocol 4 reaches into what it has found
    "collections OrderedDict.__init__.__globals__",
    "torch.nn.modules.container ModuleDict.__reduce_ex__",
    "torch FloatStorage.from_file",
    "torch_utils persistence._reconstruct_persistent_obj",
    "dnnlib.util EasyDict.__class__",
]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("path", REACHING)
def test_a_name_that_no_checkpoint_contains_is_refused_by_name_wherever_it_stands(refused, path, protocol):
    calls, named = call(path, protocol), path.replace(" ", ".")
    refused(whole(calls, protocol), named)
    refused(whole(mapping(dataset_kwargs=calls), protocol), named)
    refused(whole(envelope("EDMPrecond", mapping(_modules=calls)), protocol), named)
    refused(edm_files.zipped({"data.pkl": whole(calls, protocol), "version": b"3\n"}), named)
    refused(older(whole(calls, protocol)), named)
    refused(whole(archived(older(whole(calls, protocol)))), named)


def envelope(class_name, state, kind="class"):
    meta = mapping(type=text(kind), module_src=text("raise"), class_name=text(class_name), state=state)
    return b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + meta + b"\x85R"


def older(data, keys=(), storages=b"", little_endian=True, version=1001):
    """torch's older format around one pickle."""
    head = (0x1950A86A20F9469CFC6C, version, {"protocol_version": version, "little_endian": little_endian})
    return b"".join(pickle.dumps(part, 2) for part in head) + data + pickle.dumps(list(keys), 2) + storages


def archived(octets):
    """The instructions that load an archive within a pickle."""
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(octets)) + octets + b"\x85R"


def mention(key="0", count=4, storage="FloatStorage", view=b"N"):
    """The instructions that mention a storage."""
    return (
        b"("
        + text("storage")
        + f"ctorch\n{storage}\n".encode()
        + text(key)
        + text("cpu")
        + (b"J" + struct.pack("<i", count) + view + b"tQ")
    )


def numbers(count=4):
    return struct.pack("<q", count) + bytes(4 * count)


BARE = older(whole(mention(), 2), ["0"], numbers())


def tensor(offset=0, size=(4,), stride=(1,), storage=None):
    """The instructions that rebuild a tensor over a storage of four numbers."""
    arguments = b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, size, stride))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage or archived(BARE))
        + arguments
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def module(class_name="EDMPrecond", parameters=b"}", modules=b"}", buffers=b"}", kwargs=b"}"):
    state = mapping(_parameters=parameters, _buffers=buffers, _modules=modules, _init_args=b")", _init_kwargs=kwargs)
    return envelope(class_name, state)


def test_the_pieces_of_these_tests_make_a_checkpoint_that_is_read(read):
    octets = whole(mapping(ema=module(parameters=mapping(weight=tensor(1, (3,)))), extra=b"N"))
    assert_same(read(octets).state, {"weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("instruction", "octets"),
    [
        ("INST", b"(X\x01\x00\x00\x00xios\nsystem\n"),
        ("OBJ", b"(ctorch\nFloatStorage\no"),
        ("EXT1", b"\x82\xf0)R"),
        ("EXT2", b"\x83\xf0\x00)R"),
        ("EXT4", b"\x84\xf0\x00\x00\x00)R"),
        ("NEWOBJ_EX", b"cdnnlib.util\nEasyDict\n)}\x92"),
        ("NEXT_BUFFER", b"\x97"),
        ("READONLY_BUFFER", b"\x98"),
        ("BYTEARRAY8", b"\x96\x01\x00\x00\x00\x00\x00\x00\x00x"),
        ("PERSID", b"Pos.system\n"),
        ("LONG4", b"\x8b\x01\x00\x00\x00\x01"),
        ("STRING", b"S'os'\n"),
        ("POP", b"NN0"),
        ("DUP", b"N2"),
    ],
)
def test_an_instruction_that_no_checkpoint_needs_is_refused_by_name(refused, instruction, octets):
    refused(whole(octets), instruction)


def test_the_extension_registry_is_not_consulted(refused):
    copyreg.add_extension("posix", "system", 240)
    try:
        refused(whole(b"\x82\xf0" + text("touch ran") + b"\x85R"), "EXT1")
    finally:
        copyreg.remove_extension("posix", "system", 240)


@pytest.mark.parametrize(
    "octets",
    [
        b"ctorch\nFloatStorage\n)R",  # a storage type is not called
        b"cdnnlib.util\nEasyDict\n)R",  # nor a class, except by NEWOBJ
        b"ctorch.nn.modules.container\nModuleDict\n)R",
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n)\x81",  # nor a function by it
        b"cdnnlib.util\nEasyDict\nN\x85\x81",
        b"cdnnlib.util\nEasyDict\n)\x81}b",  # state is for objects,
        b"ctorch\nFloatStorage\n}b",  # not for names,
        b"ctorch.nn.modules.container\nModuleDict\n)\x81}b}b",  # and set once,
        b"ctorch.nn.modules.container\nModuleDict\n)\x81N}\x86b",  # and no slots
        b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85RN\x85b",
        b"NN\x85R",  # only names are called
        b"X\x02\x00\x00\x00os)R",
        b"}N)R",
        b"]N\x85R",
        b"K\x01K\x02\x93",  # only strings are names
        b"(" + text("storage") + b"tQ",  # a plain pickle mentions no storages
        mention(),
        b"}))s",  # keys are strings and small numbers
        b"}J\xff\xff\xff\xffNs",
        b"}G?\xf0\x00\x00\x00\x00\x00\x00Ns",
        b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R",
        b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x88\x88\x88\x88tR",
        b"c_codecs\nencode\n" + text("x" * 99) + text("latin1") + b"\x86R",
        b"c_codecs\nencode\n" + text("x") + text("zip") + b"\x86R",
        b"ccollections\nOrderedDict\n]\x85R",
    ],
)
def test_a_listed_name_does_only_what_checkpoints_do_with_it(refused, octets):
    refused(whole(mapping(ema=module(), extra=octets)))


@pytest.mark.parametrize("class_name", ["Discriminator", "SongUNet.__init__", "os.system", "EDMPrecond\n"])
def test_another_class_in_an_envelope_is_refused_by_name(refused, class_name):
    refused(whole(mapping(ema=module(), extra=envelope(class_name, b"}"))), class_name.strip())


def test_an_envelope_of_another_kind_than_a_class_is_refused(refused):
    refused(whole(mapping(ema=module(), extra=envelope("EDMPrecond", b"}", kind="function"))))


def test_a_message_repeats_no_control_characters_of_the_file(read):
    with pytest.raises(edm.RefusedCheckpoint) as error:
        read(whole(envelope("\x1b[2J\nall is well", b"}")))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"N", "NoneType"),
        (b"}", "ema"),
        (mapping(net=module()), "network-snapshot"),
        (mapping(ema=b"}"), "dict"),
        (mapping(ema=module("SongUNet")), "SongUNet"),
        (mapping(ema=module(parameters=mapping(weight=b"K\x01"))), "int"),
        (mapping(ema=module(modules=mapping(model=b"}"))), "dict"),
        (mapping(ema=module(modules=mapping(**{"model.x": module()}))), "model.x"),
        (mapping(ema=module(kwargs=mapping(x=tensor()))), "Tensor"),
        (mapping(ema=module(kwargs=mapping(x=module("Linear")))), "Linear"),
        (mapping(ema=module(), loss_fn=b"}"), "dict"),
        (mapping(ema=module(), step=text("1")), "str"),
    ],
)
def test_what_is_not_arranged_as_a_checkpoint_is_refused(refused, data, name):
    refused(whole(data), name)


# --- Archives and tensors are what they claim to be ---


@pytest.mark.parametrize(
    ("archive", "name"),
    [
        (older(whole(b"cposix\nsystem\n" + text("touch ran") + b"\x85R", 2)), "posix.system"),
        (older(whole(b"(" + mention("0") + mention("1") + b"t", 2), "01", numbers() * 2), "tuple"),
        (older(whole(mapping(x=mention()), 2), "0", numbers()), "dict"),
        (older(whole(mention(), 2), "01", numbers() * 2), "mentions 1 storages, and 2"),
        (older(whole(mention(), 2), "", b""), "mentions 1 storages, and 0"),
        (older(whole(mention(), 2), "0", numbers() + b"x"), "more than one storage"),
        (older(whole(mention(), 2), "0", numbers()[:-1]), "ends early"),
        (older(whole(mention(), 2), "0", numbers(3)), "12 bytes for 4"),
        (older(whole(mention(), 2), "0", struct.pack("<q", -1)), "ends early"),
        (older(whole(mention(count=-4), 2), "0", numbers()), "cannot be here"),
        (older(whole(mention(view=b")"), 2), "0", numbers()), "persistent id"),
        (older(whole(mention(storage="UntypedStorage"), 2), "0", numbers()), "torch.UntypedStorage"),
        (older(whole(tensor(), 2)), "torch._utils._rebuild_tensor_v2"),
        (older(whole(archived(BARE), 2)), "torch.storage._load_from_bytes"),
        (older(whole(b"N", 2)), "NoneType"),
        (older(whole(mention(), 2), "0", numbers(), little_endian=False), "big-endian"),
        (older(whole(mention(), 2), "0", numbers(), version=1), "version"),
        (edm_files.zipped({"data.pkl": whole(mention())}), "instruction"),
        (b"", "ends early"),
    ],
)
def test_an_archive_within_a_pickle_holds_one_storage_and_nothing_else(refused, archive, name):
    refused(whole(mapping(ema=module(parameters=mapping(weight=tensor(storage=archived(archive)))))), name)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (4,), (1,)),
        (4, (1,), (1,)),
        (-1, (4,), (1,)),
        (0, (-4,), (1,)),
        (3, (4,), (-1,)),
        (0, (2, 2), (3, 1)),
        (0, (2, 2), (2, 2**62)),
        (0, (2**40,), (0,)),  # expanded to 4 TiB
        (0, (5,), (0,)),
        (0, (0, 2**62, 2**62), (1, 1, 1)),
        (2**63, (0,), (1,)),
        (0, (1,) * 9, (1,) * 9),
        (0.0, (4,), (1,)),
        (0, (True,), (1,)),
        (0, (2**300,), (1,)),
    ],
)
def test_a_tensor_stays_within_its_storage(refused, offset, size, stride):
    refused(whole(mapping(ema=module(), extra=tensor(offset, size, stride))), "has a tensor")


@pytest.mark.parametrize(("size", "stride"), [((4,), (1, 1)), ((4,), ()), ([4], (1,)), (4, (1,)), ("4", (1,))])
def test_a_tensor_has_as_many_sizes_as_strides(refused, size, stride):
    refused(whole(mapping(ema=module(), extra=tensor(0, size, stride))))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"code/__torch__.py": b"import os"}, "code/__torch__.py"),
        ({"constants.pkl": b"N."}, "constants.pkl"),
        ({"data/../../x": b""}, "data/../../x"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data/0": b""}, "0 bytes for"),
        ({"data.pkl": b""}, "ends early"),
    ],
)
def test_a_zip_holds_torchs_records_and_nothing_else(refused, change, name):
    records = edm_files.unzipped(edm_files.save(edm_files.contents(), "zip"))
    refused(edm_files.zipped(records | change), name)


def test_a_zip_lacking_records_or_having_some_twice_is_refused(refused):
    records = edm_files.unzipped(edm_files.save(edm_files.contents(), "zip"))
    for name in ("data.pkl", "data/0"):
        refused(edm_files.zipped({key: value for key, value in records.items() if key != name}), name)
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("x/data.pkl", b"N.")
        archive.writestr("x/data.pkx", b"N.")
    refused(file.getvalue().replace(b"data.pkx", b"data.pkl"), "two records")


@pytest.mark.parametrize("form", edm_files.FORMS)
def test_a_file_with_something_behind_its_end_is_refused(refused, form):
    octets = edm_files.save(edm_files.contents(), form)
    if form != "zip":  # whose end is looked for, and may carry a comment
        refused(octets + b"\x00", "1 bytes behind its end")


@pytest.mark.parametrize("form", edm_files.FORMS)
def test_a_truncated_file_is_refused_wherever_it_ends(refused, form):
    octets = edm_files.save(edm_files.contents(), form)
    for end in [*range(0, len(octets), max(1, len(octets) // 60)), len(octets) - 1]:
        refused(octets[:end])


@pytest.mark.parametrize(("size", "start"), [(0, 100), (0, -1), (2**16, 0), (2**16, 2**16), (2**31, 2**31)])
def test_a_zip_whose_directory_is_elsewhere_than_it_says_is_refused(refused, size, start):
    octets = bytearray(edm_files.zipped(edm_files.unzipped(edm_files.save(edm_files.contents(), "zip"))))
    said = struct.unpack("<II", octets[-10:-2])
    octets[-10:-2] = struct.pack("<II", said[0] + size, said[1] + start)
    refused(bytes(octets))


def test_a_file_that_is_not_there_is_no_refused_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        edm.read(tmp_path / "network-snapshot-000000.pkl")


# --- A small file stays small ---


def doubled(start, times):
    """The instructions for a pair of a pair of ..., each level mentioned twice."""
    return start + b"q\x01" + b"h\x01\x86q\x01" * times


def nested(times):
    return b"]" * times + b"a" * (times - 1)


def holder(modules):
    state = mapping(_parameters=b"}", _buffers=b"}", _modules=modules)
    return b"ctorch.nn.modules.container\nModuleDict\n)\x81" + state + b"bq\x01"


def overlapping(times):
    """A zip whose directory lists one record under many names."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("x/data.pkl", b"N." * 1000)
        for i in range(times):
            again = copy.copy(archive.filelist[0])
            again.filename = f"x/data/{i}"
            archive.filelist.append(again)
    return file.getvalue()


PAIR = mapping(a=b"h\x01", b=b"h\x01")
MILLION = older(whole(mention(count=250_000), 2), "0", numbers(250_000))
BOMBS = {
    "memo index": (whole(b"Nr\xff\xff\xff\xff"), "NoneType"),
    "byte string": (whole(b"\x8e" + b"\xff" * 7 + b"\x7f"), "damaged"),
    "text": (whole(b"X\xff\xff\xff\xff"), "damaged"),
    "frame": (whole(b"\x95" + b"\xff" * 8 + b"N"), "NoneType"),
    "integer": (whole(b"\x8b\xff\xff\xff\x7f"), "LONG4"),
    "billion laughs": (whole(mapping(ema=module(kwargs=mapping(x=doubled(b"]", 60))))), "unfolds"),
    "long words": (whole(mapping(ema=module(kwargs=mapping(x=doubled(text("a" * 500_000), 10))))), "unfolds"),
    "long keys": (
        whole(mapping(ema=module(kwargs=mapping(x=doubled(b"}" + text("a" * 500_000) + b"Ns", 10))))),
        "unfolds",
    ),
    "deep nest": (whole(mapping(ema=module(kwargs=mapping(x=nested(20_000))))), "RecursionError"),
    "deep key": (whole(b"})" + b"\x85" * 100_000 + b"Ns"), "dictionary key"),
    "deep optimiser": (
        whole(mapping(ema=module(), optimizer_state=mapping(x=nested(20_000)))),
        "RecursionError",
    ),
    "module in itself": (
        whole(mapping(ema=module(modules=b"}q\x01" + text("a") + holder(b"h\x01") + b"s"))),
        "unfolds",
    ),
    "modules in pairs": (
        whole(
            mapping(
                pairs=b"(" + holder(b"}") + holder(PAIR) * 60 + b"t",
                ema=module(modules=mapping(a=b"h\x01")),
            )
        ),
        "unfolds",
    ),
    "one storage many times": (
        whole(
            mapping(
                ema=module(
                    parameters=mapping(
                        w=tensor(0, (250_000,), storage=archived(MILLION)) + b"q\x05",
                        **{f"w{i}": b"h\x05" for i in range(1000)},
                    )
                )
            )
        ),
        "unfolds",
    ),
    "compressed": (edm_files.zipped({"data.pkl": bytes(50_000_000)}, zipfile.ZIP_DEFLATED), "compressed"),
    "compressed a little": (
        edm_files.zipped({"data.pkl": os.urandom(999)}, zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "overlapping": (overlapping(1000), "overlapping"),
}


@pytest.mark.parametrize(("octets", "name"), BOMBS.values(), ids=BOMBS)
def test_a_small_file_that_would_unfold_is_refused_in_little_memory(refused, octets, name):
    tracemalloc.start()
    try:
        refused(octets, name)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(octets) + 50_000_000
    finally:
        tracemalloc.stop()


def test_an_archive_mentioned_many_times_is_read_once(read, monkeypatch):
    reads, read_bare_storage = [], forms.read_bare_storage
    monkeypatch.setattr(forms, "read_bare_storage", lambda data: reads.append(1) or read_bare_storage(data))
    calls = b"ctorch.storage\n_load_from_bytes\nq\x01B" + struct.pack("<I", len(BARE)) + BARE + b"\x85q\x02R"
    octets = whole(mapping(ema=module(), extra=b"](" + calls + b"h\x01h\x02R" * 1000 + b"e"))
    assert read(octets).state == {}
    assert len(reads) == 1


# --- Whatever the bytes ---


def fuzz(tmp_path, seed, rounds, *files):
    pytest.importorskip("resource")  # limits on memory, and alarms, are for Unix
    script = Path(__file__).with_name("edm_fuzz.py")
    command = [sys.executable, str(script), str(seed), str(rounds), str(tmp_path), *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


def test_a_changed_file_is_read_or_refused_and_does_nothing_else(tmp_path):
    files = []
    for form in ("pickle4", "zip", "older"):
        files.append(tmp_path / form)
        files[-1].write_bytes(edm_files.save(edm_files.contents(), form))
    outcome = fuzz(tmp_path, 0, 300, *files)
    assert outcome["read"] > 50
    assert outcome["refused"] > 300


@pytest.mark.slow
def test_a_changed_published_file_is_read_or_refused_and_does_nothing_else(tmp_path):
    files = []
    for configuration in edm_files.CONFIGURATIONS:
        files.append(tmp_path / configuration)
        files[-1].write_bytes(edm_files.snapshot(configuration))
    files.append(tmp_path / "training-state")
    files[-1].write_bytes(edm_files.training_state("ddpmpp-edm"))
    outcome = fuzz(tmp_path, 1, 150, *files)
    assert outcome["read"] > 20
    assert outcome["refused"] > 500
