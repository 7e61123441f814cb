"""Instructions of pickles, written by hand, and pickles that attack whoever reads them."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def mapping(**items):
    """Instructions that build a dict whose values are given as instructions."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def whole(instructions, protocol=4):
    return b"\x80" + bytes([protocol]) + instructions + b"."


def call(path, protocol):
    """Instructions that call a function by its name: GLOBAL in protocol 2, STACK_GLOBAL in 4."""
    parts = [part.encode() for part in path.split(" ")]
    if protocol == 2:
        named = b"c" + b"".join(part + b"\n" for part in parts)
    else:
        named = b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts) + b"\x93"
    return named + text("touch ran") + b"\x85R"


def doubled(start, times):
    """Instructions for a pair of a pair of ..., each level referring twice to the next."""
    return start + b"q\x01" + b"h\x01\x86q\x01" * times


def nested(times):
    return b"]" * times + b"a" * (times - 1)


DANGEROUS_NAMES = [
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
    "numpy core.multiarray._reconstruct",
    "numpy.core.multiarray fromfile",
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
    "stablefield.data.pickles unpickle",
    "stablefield.interop.edm read",
    "stablefield.interop.edm.allowlist Object",
    # protocol 4 reaches attributes through dots within the name
    "numpy dtype.__reduce__",
    "_codecs encode.__self__",
    "collections OrderedDict.__init__.__globals__",
    "torch.nn.modules.container ModuleDict.__reduce_ex__",
    "torch FloatStorage.from_file",
    "torch_utils persistence._reconstruct_persistent_obj",
    "dnnlib.util EasyDict.__class__",
]

REFUSED_INSTRUCTIONS = [
    ("INST", b"(X\x01\x00\x00\x00xios\nsystem\n"),
    ("OBJ", b"(cnumpy\ndtype\no"),
    ("EXT1", b"\x82\xf0)R"),
    ("EXT2", b"\x83\xf0\x00)R"),
    ("EXT4", b"\x84\xf0\x00\x00\x00)R"),
    ("NEWOBJ_EX", b"cnumpy\ndtype\n)}\x92"),
    ("NEXT_BUFFER", b"\x97"),
    ("READONLY_BUFFER", b"\x98"),
    ("BYTEARRAY8", b"\x96\x01\x00\x00\x00\x00\x00\x00\x00x"),
    ("PERSID", b"Pos.system\n"),
    ("LONG4", b"\x8b\x01\x00\x00\x00\x01"),
    ("LONG4", b"\x8b\xff\xff\xff\x7f"),
    ("INT", b"I1\n"),
    ("STRING", b"S'os'\n"),
    ("FROZENSET", b"(\x91"),
    ("POP", b"NN0"),
    ("DUP", b"N2"),
    ("0xff", b"\xff"),
]

MISUSES = [  # of what is allowed, or of what could be
    b"cnumpy\ndtype\n)\x81",  # a function is not a class
    b"cnumpy\ndtype\n}b",  # names have no state,
    b"]}b",  # nor have lists
    b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85RN\x85b",
    b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R",
    b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x88\x88\x88\x88tR",
    b"c_codecs\nencode\n" + text("x") + text("zip") + b"\x86R",
    b"NN\x85R",  # only names can be called
    b"X\x02\x00\x00\x00os)R",
    b"}N)R",
    b"]N\x85R",
    b"Na",  # only lists are appended to
    b"}Na",
    b"N(Ne",
    b"K\x01K\x02\x93",  # only strings are names
    b"(" + text("storage") + b"tQ",  # a plain pickle has no persistent ids
    b"}))s",  # keys must be strings or small integers
    b"}J\xff\xff\xff\xffNs",
    b"}\x8a\x09" + bytes(8) + b"\x01Ns",
    b"}G?\xf0\x00\x00\x00\x00\x00\x00Ns",
    b"}(Nu",
    b"NN",  # two values
    b"(N",
    b"e",  # none
    b"\x86",
    b"h\x07",
    b"X\x01\x00\x00\x00\xff",
]

BOMBS = {
    "memo index": (whole(b"Nr\xff\xff\xff\xff"), "NoneType"),
    "byte string": (whole(b"\x8e" + b"\xff" * 7 + b"\x7f"), "ends early"),
    "string of Python 2": (whole(b"T\xff\xff\xff\x7f"), "ends early"),
    "text": (whole(b"X\xff\xff\xff\xff"), "ends early"),
    "long text": (whole(b"\x8d" + b"\xff" * 8), "exceeds"),
    "frame": (whole(b"\x95" + b"\xff" * 8 + b"N"), "NoneType"),
    "line": (b"c" + b"x" * 1_000_000, "not allowed"),
    "deep key": (whole(b"})" + b"\x85" * 50_000 + b"Ns"), "dictionary key"),
    "doubled key": (whole(b"}" + doubled(b")", 60) + b"Ns"), "dictionary key"),
    "doubled element of a set": (whole(b"\x8f(" + doubled(b")", 60) + b"\x90"), "list"),
    "bytes many times": (
        whole(
            b"](c_codecs\nencode\nq\x00" + text("a" * 500_000) + text("latin1") + b"\x86q\x01R" + b"h\x00h\x01R" * 999
        ),
        "expand",
    ),
    "objects": (whole(b"(" + b"}" * 2**18 + b"l"), "parts"),
}


def fuzz(tmp_path, seed, rounds, *files):
    """Numbers of random changes of files that are read and that are refused (see `pickle_fuzz.py`)."""
    pytest.importorskip("resource")  # limits on memory and alarms exist on Unix only
    script = Path(__file__).with_name("pickle_fuzz.py")
    command = [sys.executable, str(script), str(seed), str(rounds), str(tmp_path), *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)
