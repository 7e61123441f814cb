"""EDM's and STF's checkpoints are read as plain data, anything else is refused, and no code of the file is run."""

import copy
import io
import json
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import edm_files
import pytest
import torch
from pickle_attacks import DANGEROUS_NAMES, call, doubled, fuzz, mapping, nested, text, whole
from safetensors.torch import load_file

from stablefield.data.pickles import RefusedError
from stablefield.interop import edm
from stablefield.interop.edm import checkpoint as checkpoint_module

FIXTURES = Path(os.environ.get("STABLEFIELD_FIXTURES", "nowhere")) / "edm"
PUBLISHED = sorted(FIXTURES.glob("*/*.p[kt]*"))

pytestmark = pytest.mark.usefixtures("unchecked")  # hostile files must be caught by the reader's own checks


@pytest.fixture
def read(tmp_path):
    """Function that reads bytes as a checkpoint."""

    def read(octets):
        path = tmp_path / "file.pkl"
        path.write_bytes(octets)
        return edm.read(path)

    return read


@pytest.fixture
def refused(read, tmp_path, monkeypatch):
    """Function that asserts that bytes are refused with a name, and that nothing is imported or run (`touch ran`)."""
    monkeypatch.chdir(tmp_path)

    def refused(octets, *names):
        modules = set(sys.modules)
        with pytest.raises(RefusedError) as error:
            read(octets)
        assert "file.pkl" in str(error.value)
        assert all(name in str(error.value) for name in names), error.value
        # zipfile imports the encoding of old archives
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


# ---- contents of the published files


@pytest.mark.parametrize("configuration", edm_files.CONFIGURATIONS)
def test_a_published_snapshot_gives_its_exact_weights_and_arguments(read, configuration):
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


@pytest.mark.skipif(not PUBLISHED, reason="STABLEFIELD_FIXTURES does not name a folder of published files")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_published_files_themselves_are_read(path):
    checkpoint = edm.read(path)
    config = json.loads((path.parent / "config.json").read_text())
    assert (checkpoint.precond, checkpoint.arguments) == (config["precond"], config["kwargs"])
    if (weights := path.parent / "state.safetensors").exists():
        assert_same(checkpoint.state, load_file(weights))
    if path.parent.name in edm_files.CONFIGURATIONS and path.suffix == ".pkl":
        assert path.read_bytes() == edm_files.snapshot(path.parent.name)


@pytest.mark.parametrize("file_format", edm_files.FORMATS)
@pytest.mark.parametrize("kind", ["network-snapshot", "training-state"])
def test_both_kinds_of_file_are_read_in_every_format(read, kind, file_format):
    data = edm_files.contents(kind)
    checkpoint = read(edm_files.save(data, file_format))
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


@pytest.mark.parametrize("file_format", ["pickle3", "legacy"])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_are_read_under_both_of_their_names(read, file_format, module):
    octets = edm_files.save(edm_files.contents(), file_format)
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        octets = octets.replace(b"c" + name + b"\nscalar\n", b"c" + module.encode() + b"\nscalar\n")
    assert f"c{module}\nscalar".encode() in octets
    assert read(octets).loss == {"class_name": "EDMLoss", "sigma_data": 0.5}


def test_a_file_with_only_the_moving_average_is_a_snapshot(read):
    checkpoint = read(edm_files.save({"ema": edm_files.network()}, "pickle4"))
    assert checkpoint.kind == "network-snapshot"
    assert checkpoint.loss is checkpoint.augment is checkpoint.dataset_kwargs is None


def test_positional_arguments_get_their_names(read):
    net = edm_files.network()
    net._init_args, net._init_kwargs = (16, 3), {"label_dim": 4}
    checkpoint = read(edm_files.save({"ema": net}, "pickle4"))
    assert checkpoint.arguments == {"img_resolution": 16, "img_channels": 3, "label_dim": 4}


def test_the_weights_are_independent_of_the_file_and_writable(tmp_path):
    path = tmp_path / "network-snapshot-000000.pkl"
    path.write_bytes(edm_files.save(edm_files.contents(), "pickle4"))
    state = edm.read(path).state
    before = path.read_bytes()
    path.unlink()
    assert_same(state, edm_files.network().state_dict())
    state["u"].zero_()
    path.write_bytes(before)
    assert_same(edm.read(path).state, edm_files.network().state_dict())


# ---- no code runs


@pytest.mark.parametrize("file_format", edm_files.FORMATS)
def test_the_source_code_in_a_file_is_never_run(read, tmp_path, file_format):
    source = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    net = edm_files.network(source=source)
    assert_same(read(edm_files.save({"ema": net}, file_format)).state, net.state_dict())
    assert not (tmp_path / "ran").exists()


def test_names_that_python_treats_specially_are_only_keys(read):
    net = edm_files.network()
    for name in ("__setstate__", "__class__", "__dict__", "__del__", "state_dict", "kind"):
        net.__dict__[name] = "os.system"
    assert_same(read(edm_files.save({"ema": net}, "pickle4")).state, edm_files.network().state_dict())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("path", DANGEROUS_NAMES)
def test_a_name_that_is_not_allowed_is_refused_anywhere_in_a_file(refused, path, protocol):
    calls, named = call(path, protocol), path.replace(" ", ".")
    refused(whole(calls, protocol), named)
    refused(whole(mapping(dataset_kwargs=calls), protocol), named)
    refused(whole(persistent("EDMPrecond", mapping(_modules=calls)), protocol), named)
    refused(edm_files.zipped({"data.pkl": whole(calls, protocol), "version": b"3\n"}), named)
    refused(legacy(whole(calls, protocol)), named)
    refused(whole(archived(legacy(whole(calls, protocol)))), named)


def persistent(class_name, state, kind="class"):
    meta = mapping(type=text(kind), module_src=text("raise"), class_name=text(class_name), state=state)
    return b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + meta + b"\x85R"


def legacy(data, keys=(), storages=b"", little_endian=True, version=1001):
    """One pickle in torch's legacy format."""
    head = (0x1950A86A20F9469CFC6C, version, {"protocol_version": version, "little_endian": little_endian})
    return b"".join(pickle.dumps(part, 2) for part in head) + data + pickle.dumps(list(keys), 2) + storages


def archived(octets):
    """Instructions that load an archive within a pickle."""
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(octets)) + octets + b"\x85R"


def reference(key="0", count=4, storage="FloatStorage", view=b"N"):
    """Instructions that refer to a storage."""
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


BARE = legacy(whole(reference(), 2), ["0"], numbers())


def tensor(offset=0, size=(4,), stride=(1,), storage=None):
    """Instructions that rebuild a tensor from a storage of four numbers."""
    arguments = b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, size, stride))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage or archived(BARE))
        + arguments
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def module(class_name="EDMPrecond", parameters=b"}", modules=b"}", buffers=b"}", kwargs=b"}"):
    state = mapping(_parameters=parameters, _buffers=buffers, _modules=modules, _init_args=b")", _init_kwargs=kwargs)
    return persistent(class_name, state)


def test_the_building_blocks_of_these_tests_make_a_readable_checkpoint(read):
    octets = whole(mapping(ema=module(parameters=mapping(weight=tensor(1, (3,)))), extra=b"N"))
    assert_same(read(octets).state, {"weight": torch.zeros(3)})


@pytest.mark.parametrize(
    "octets",
    [
        b"ctorch\nFloatStorage\n)R",  # a storage type cannot be called
        b"cdnnlib.util\nEasyDict\n)R",  # a class only by NEWOBJ
        b"ctorch.nn.modules.container\nModuleDict\n)R",
        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n)\x81",  # and a function not by NEWOBJ
        b"cdnnlib.util\nEasyDict\nN\x85\x81",
        b"cdnnlib.util\nEasyDict\n)\x81}b",  # only objects have a state,
        b"ctorch\nFloatStorage\n}b",  # not names,
        b"ctorch.nn.modules.container\nModuleDict\n)\x81}b}b",  # which is set once,
        b"ctorch.nn.modules.container\nModuleDict\n)\x81N}\x86b",  # and without slots
        b"(" + text("storage") + b"tQ",  # a plain pickle has no references to storages
        reference(),
        b"ccollections\nOrderedDict\n]\x85R",
    ],
)
def test_an_allowed_name_can_only_be_used_as_checkpoints_use_it(refused, octets):
    refused(whole(mapping(ema=module(), extra=octets)))


@pytest.mark.parametrize("class_name", ["Discriminator", "SongUNet.__init__", "os.system", "EDMPrecond\n"])
def test_an_unknown_persistent_class_is_refused_with_its_name(refused, class_name):
    refused(whole(mapping(ema=module(), extra=persistent(class_name, b"}"))), class_name.strip())


def test_a_persistent_object_that_is_not_a_class_is_refused(refused):
    refused(whole(mapping(ema=module(), extra=persistent("EDMPrecond", b"}", kind="function"))))


def test_error_messages_contain_no_control_characters_of_the_file(read):
    with pytest.raises(RefusedError) as error:
        read(whole(persistent("\x1b[2J\nall is well", b"}")))
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
def test_data_without_the_structure_of_a_checkpoint_is_refused(refused, data, name):
    refused(whole(data), name)


# ---- archives and tensors


@pytest.mark.parametrize(
    ("archive", "name"),
    [
        (legacy(whole(b"cposix\nsystem\n" + text("touch ran") + b"\x85R", 2)), "posix.system"),
        (legacy(whole(b"(" + reference("0") + reference("1") + b"t", 2), "01", numbers() * 2), "tuple"),
        (legacy(whole(mapping(x=reference()), 2), "0", numbers()), "dict"),
        (legacy(whole(reference(), 2), "01", numbers() * 2), "refers to 1 storages, but 2"),
        (legacy(whole(reference(), 2), "", b""), "refers to 1 storages, but 0"),
        (legacy(whole(reference(), 2), "0", numbers() + b"x"), "more than one storage"),
        (legacy(whole(reference(), 2), "0", numbers()[:-1]), "ends early"),
        (legacy(whole(reference(), 2), "0", numbers(3)), "12 bytes for 4"),
        (legacy(whole(reference(), 2), "0", struct.pack("<q", -1)), "ends early"),
        (legacy(whole(reference(count=-4), 2), "0", numbers()), "not allowed here"),
        (legacy(whole(reference(view=b")"), 2), "0", numbers()), "persistent id"),
        (legacy(whole(reference(storage="UntypedStorage"), 2), "0", numbers()), "torch.UntypedStorage"),
        (legacy(whole(tensor(), 2)), "torch._utils._rebuild_tensor_v2"),
        (legacy(whole(archived(BARE), 2)), "torch.storage._load_from_bytes"),
        (legacy(whole(b"N", 2)), "NoneType"),
        (legacy(whole(reference(), 2), "0", numbers(), little_endian=False), "big-endian"),
        (legacy(whole(reference(), 2), "0", numbers(), version=1), "version"),
        (edm_files.zipped({"data.pkl": whole(reference())}), "instruction"),
        (b"", "ends early"),
    ],
)
def test_an_embedded_archive_must_hold_exactly_one_storage(refused, archive, name):
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
def test_a_tensor_beyond_its_storage_is_refused(refused, offset, size, stride):
    refused(whole(mapping(ema=module(), extra=tensor(offset, size, stride))), "a tensor ")


@pytest.mark.parametrize(("size", "stride"), [((4,), (1, 1)), ((4,), ()), ([4], (1,)), (4, (1,)), ("4", (1,))])
def test_a_tensor_must_have_as_many_sizes_as_strides(refused, size, stride):
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
def test_a_zip_file_must_hold_only_the_records_of_torch(refused, change, name):
    records = edm_files.unzipped(edm_files.save(edm_files.contents(), "zip"))
    refused(edm_files.zipped(records | change), name)


def test_a_zip_file_with_missing_or_duplicate_records_is_refused(refused):
    records = edm_files.unzipped(edm_files.save(edm_files.contents(), "zip"))
    for name in ("data.pkl", "data/0"):
        refused(edm_files.zipped({key: value for key, value in records.items() if key != name}), name)
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("x/data.pkl", b"N.")
        archive.writestr("x/data.pkx", b"N.")
    refused(file.getvalue().replace(b"data.pkx", b"data.pkl"), "two records")


@pytest.mark.parametrize("file_format", edm_files.FORMATS)
def test_a_file_with_bytes_after_its_end_is_refused(refused, file_format):
    octets = edm_files.save(edm_files.contents(), file_format)
    if file_format != "zip":  # a ZIP file may end with a comment
        refused(octets + b"\x00", "1 bytes follow the end")


@pytest.mark.parametrize("file_format", edm_files.FORMATS)
def test_a_truncated_file_is_refused_at_every_length(refused, file_format):
    octets = edm_files.save(edm_files.contents(), file_format)
    for end in [*range(0, len(octets), max(1, len(octets) // 60)), len(octets) - 1]:
        refused(octets[:end])


@pytest.mark.parametrize(("size", "start"), [(0, 100), (0, -1), (2**16, 0), (2**16, 2**16), (2**31, 2**31)])
def test_a_zip_file_with_a_wrong_directory_offset_is_refused(refused, size, start):
    octets = bytearray(edm_files.zipped(edm_files.unzipped(edm_files.save(edm_files.contents(), "zip"))))
    written = struct.unpack("<II", octets[-10:-2])
    octets[-10:-2] = struct.pack("<II", written[0] + size, written[1] + start)
    refused(bytes(octets))


def test_a_missing_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        edm.read(tmp_path / "network-snapshot-000000.pkl")


# ---- small files need little memory


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
MILLION = legacy(whole(reference(count=250_000), 2), "0", numbers(250_000))
CHECKPOINT_BOMBS = {
    "billion laughs": (whole(mapping(ema=module(kwargs=mapping(x=doubled(b"]", 60))))), "expand"),
    "long words": (whole(mapping(ema=module(kwargs=mapping(x=doubled(text("a" * 500_000), 10))))), "expand"),
    "long keys": (
        whole(mapping(ema=module(kwargs=mapping(x=doubled(b"}" + text("a" * 500_000) + b"Ns", 10))))),
        "expand",
    ),
    "deep nest": (whole(mapping(ema=module(kwargs=mapping(x=nested(20_000))))), "RecursionError"),
    "deep optimiser": (
        whole(mapping(ema=module(), optimizer_state=mapping(x=nested(20_000)))),
        "RecursionError",
    ),
    "module in itself": (
        whole(mapping(ema=module(modules=b"}q\x01" + text("a") + holder(b"h\x01") + b"s"))),
        "expand",
    ),
    "modules in pairs": (
        whole(
            mapping(
                pairs=b"(" + holder(b"}") + holder(PAIR) * 60 + b"t",
                ema=module(modules=mapping(a=b"h\x01")),
            )
        ),
        "expand",
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
        "expand",
    ),
    "compressed": (edm_files.zipped({"data.pkl": bytes(50_000_000)}, zipfile.ZIP_DEFLATED), "compressed"),
    "compressed a little": (
        edm_files.zipped({"data.pkl": os.urandom(999)}, zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "overlapping": (overlapping(1000), "overlapping"),
}


@pytest.mark.parametrize(("octets", "name"), CHECKPOINT_BOMBS.values(), ids=CHECKPOINT_BOMBS)
def test_a_small_file_that_would_expand_is_refused_with_little_memory(refused, octets, name):
    tracemalloc.start()
    try:
        refused(octets, name)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(octets) + 50_000_000
    finally:
        tracemalloc.stop()


def test_an_archive_that_is_referred_to_many_times_is_read_once(read, monkeypatch):
    reads, _read_embedded_storage = [], checkpoint_module._read_embedded_storage
    monkeypatch.setattr(
        checkpoint_module, "_read_embedded_storage", lambda data: reads.append(1) or _read_embedded_storage(data)
    )
    calls = b"ctorch.storage\n_load_from_bytes\nq\x01B" + struct.pack("<I", len(BARE)) + BARE + b"\x85q\x02R"
    octets = whole(mapping(ema=module(), extra=b"](" + calls + b"h\x01h\x02R" * 1000 + b"e"))
    assert read(octets).state == {}
    assert len(reads) == 1


# ---- random changes


def test_a_mutated_file_is_read_or_refused_without_side_effects(tmp_path):
    files = []
    for file_format in ("pickle4", "zip", "legacy"):
        files.append(tmp_path / file_format)
        files[-1].write_bytes(edm_files.save(edm_files.contents(), file_format))
    outcome = fuzz(tmp_path, 0, 300, *files)
    assert outcome["read"] > 50
    assert outcome["refused"] > 300


@pytest.mark.slow
def test_a_mutated_published_file_is_read_or_refused_without_side_effects(tmp_path):
    files = []
    for configuration in edm_files.CONFIGURATIONS:
        files.append(tmp_path / configuration)
        files[-1].write_bytes(edm_files.snapshot(configuration))
    files.append(tmp_path / "training-state")
    files[-1].write_bytes(edm_files.training_state("ddpmpp-edm"))
    outcome = fuzz(tmp_path, 1, 150, *files)
    assert outcome["read"] > 20
    assert outcome["refused"] > 500
