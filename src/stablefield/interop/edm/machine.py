"""A stack machine for pickles that has no call.

It follows the instructions that `pickletools` describes: push a number, gather a tuple, remember a value.
Those with which the file takes control of a real unpickler do no more here than

    GLOBAL, STACK_GLOBAL  push a record of the name, after finding it in the table
    NEWOBJ, REDUCE        look the record up in the table, and push the data it stands for
    BUILD                 keep a dictionary as an object's state, once; no method or attribute is touched
    BINPERSID             mention a storage, where the format has such mentions

and those not listed in `Machine.step`, such as the extension registry's, are refused by name, before so much
as their argument is read.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from typing import IO, Any, cast

from stablefield.interop.edm.names import (
    INSTANCES,
    LOAD_FROM_BYTES,
    RESULTS,
    STORAGES,
    Dtype,
    Name,
    Object,
    RefusedCheckpoint,
    Storage,
    expect,
    printable,
    refusal,
)


class Stream:
    """Bytes read in turn. Never allocates more than there are: a length in a file can be anything."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.buffer) - self.position

    def take(self, n: int) -> memoryview:
        if n > self.left:
            raise RefusedCheckpoint(f"ends early: {printable(str(n))} bytes should follow, {self.left} do")
        self.position += n
        return self.buffer[self.position - n : self.position]

    def read(self, n: int) -> bytes:
        return bytes(self.take(min(n, self.left)))

    def readline(self) -> bytes:
        # lines hold names, and names are short
        line, newline, _ = bytes(self.buffer[self.position : self.position + 256]).partition(b"\n")
        return self.read(len(line + newline))

    def tell(self) -> int:
        return self.position


INSTRUCTIONS = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}

EMPTY: dict[str, Callable[[], object]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,  # as `names.members`
}

LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    | {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
)


class Machine:
    """Follows one pickle and returns the data that it describes.

    Args:
        stream: Left just behind the pickle.
        names: The names that the pickle may contain.
        shelf: Collects the storages that the pickle mentions, by key; None where the format has no mentions.
        load: Reads an archive within the pickle.
    """

    def __init__(
        self,
        stream: Stream,
        names: Collection[str] = (),
        shelf: dict[str, Storage] | None = None,
        load: Callable[[bytes], object] | None = None,
    ) -> None:
        self.stream = stream
        self.names = names
        self.shelf = shelf
        self.load = load
        self.loaded: dict[int, tuple[bytes, object]] = {}
        self.memo: dict[int, Any] = {}
        self.stack: list[Any] = []
        self.aside: list[list[Any]] = []  # the stacks below each mark

    def run(self) -> object:
        while (code := self.stream.read(1)) != b".":  # STOP
            if code not in INSTRUCTIONS:
                raise RefusedCheckpoint(f"has no pickle instruction at byte {self.stream.position}, or ends early")
            self.step(INSTRUCTIONS[code])
        if len(self.stack) != 1 or self.aside:
            raise RefusedCheckpoint(f"has a pickle that ends with {len(self.stack)} values")
        return self.stack.pop()

    def argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        assert opcode.arg is not None
        return opcode.arg.reader(cast("IO[bytes]", self.stream))

    def step(self, opcode: pickletools.OpcodeInfo) -> None:
        match opcode.name:
            case name if name in LITERALS:
                self.push(self.argument(opcode))
            case name if name in CONSTANTS:
                self.push(CONSTANTS[name])
            case name if name in EMPTY:
                self.push(EMPTY[name]())
            case "BINGET" | "LONG_BINGET":
                self.push(self.memo[self.argument(opcode)])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[self.argument(opcode)] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "MARK":
                self.aside.append(self.stack)
                self.stack = []
            case "TUPLE":
                self.push(tuple(self.marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                self.push(tuple(self.pop(int(name[-1]))))
            case "APPEND":
                self.extend(self.pop(1))
            case "APPENDS" | "ADDITEMS":
                self.extend(self.marked())
            case "SETITEM":
                self.update(self.pop(2))
            case "SETITEMS":
                self.update(self.marked())
            case "GLOBAL":
                self.push(self.name(self.argument(opcode)))
            case "STACK_GLOBAL":
                self.push(self.name(" ".join(expect(part, str) for part in self.pop(2))))
            case "NEWOBJ":
                self.push(self.instance(*self.pop(2)))
            case "REDUCE":
                self.push(self.result(*self.pop(2)))
            case "BUILD":
                self.build(*self.pop(1))
            case "BINPERSID":
                self.push(self.mentioned(*self.pop(1)))
            case "PROTO" | "FRAME":
                self.argument(opcode)  # of no interest
            case name:
                raise RefusedCheckpoint(f"refuses the pickle instruction {name}")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self, n: int) -> list[Any]:
        if len(self.stack) < n:
            raise RefusedCheckpoint("has a pickle that takes values where none are left")
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def marked(self) -> list[Any]:
        values, self.stack = self.stack, self.aside.pop()
        return values

    def extend(self, values: list[Any]) -> None:
        expect(self.stack[-1], list).extend(values)

    def update(self, items: list[Any]) -> None:
        target = expect(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # other keys can be made to exhaust the stack (nested tuples) or the clock (colliding integers)
            if type(key) is not str and not (type(key) is int and 0 <= key < 2**32):
                raise RefusedCheckpoint(f"has a dictionary key that is a {type(key).__name__}")
            target[key] = value

    def name(self, path: str) -> Name:
        if path not in self.names:
            raise refusal(path.replace(" ", "."))
        return Name(path)

    def instance(self, name: object, arguments: object) -> object:
        path = expect(name, Name).path
        if path not in INSTANCES or arguments != ():
            raise refusal(f"{name}.__new__")
        return INSTANCES[path]()

    def result(self, name: object, arguments: object) -> object:
        path, values = expect(name, Name).path, expect(arguments, tuple)
        if path == LOAD_FROM_BYTES and self.load is not None:
            return self.archive(self.load, *values)
        if path not in RESULTS:
            raise refusal(f"{name}()")
        return RESULTS[path](*values)

    def archive(self, load: Callable[[bytes], object], data: object) -> object:
        """An archive is read once, however often it is mentioned: the work stays linear in the file."""
        octets = expect(data, bytes)
        if id(octets) not in self.loaded:
            self.loaded[id(octets)] = octets, load(octets)  # kept, lest their id be given to others
        return self.loaded[id(octets)][1]

    def build(self, state: object) -> None:
        match self.stack[-1], state:
            case Object(state=None) as target, dict():
                target.state = state
            case Dtype() as target, (3, "<" | ">" | "|" | "=" as order, *_):
                target.order = order
            case target, _:
                kinds = type(target).__name__, type(state).__name__
                raise RefusedCheckpoint("sets the state of a {} to a {}".format(*kinds))

    def mentioned(self, identity: object) -> object:
        """What a persistent id stands for: a storage, and in torch's older format also a class."""
        match identity:
            case ("module", Name() as name, *_) if self.shelf is not None:  # then its source, which is not looked at
                return name
            case ("storage", Name(path), str(key), str(), int(count)):
                return self.shelved(path, key, count)
            case ("storage", Name(path), str(key), str(), int(count), None):
                return self.shelved(path, key, count)
        raise RefusedCheckpoint("has a persistent id that is no storage")

    def shelved(self, path: str, key: str, count: int) -> Storage:
        if self.shelf is None or path not in STORAGES or count < 0:
            raise RefusedCheckpoint("has a persistent id of a storage that cannot be here")
        storage = self.shelf.setdefault(key, Storage(STORAGES[path], count))
        if (storage.dtype, storage.count) != (STORAGES[path], count):
            raise RefusedCheckpoint("has one storage of two types or sizes")
        return storage
