"""Interpreter for pickles that cannot call anything.

It follows the instructions that `pickletools` describes: push a number, build a tuple, store a value in the memo. The
instructions with which a file takes control of a real unpickler do only this:

    GLOBAL, STACK_GLOBAL  push a record of the name, if it is on the allow-list
    NEWOBJ, REDUCE        look the record up in the allow-list, and push the data that stands for it
    BUILD                 keep a dictionary as an object's state, once; no method or attribute is touched
    BINPERSID             push a storage, where the format has references to storages

Instructions that are not listed in `Unpickler._step`, such as those of the extension registry, are refused with their
name before their argument is read.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from typing import IO, Any, cast

from stablefield.interop.edm.allowlist import (
    CLASSES,
    FUNCTIONS,
    LOAD_FROM_BYTES,
    STORAGE_TYPES,
    Dtype,
    EDMCheckpointError,
    Name,
    Object,
    Storage,
    expect,
    not_allowed,
    printable,
)

__all__ = ["Stream", "Unpickler"]


class Stream:
    """Sequential reader of bytes, which never allocates more than there are, whatever lengths the file claims.

    Args:
        buffer: all bytes of the file.
    """

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.position = 0

    @property
    def remaining(self) -> int:
        """Bytes that have not been read."""
        return len(self.buffer) - self.position

    def take(self, n: int) -> memoryview:
        """The next n bytes, without a copy.

        Args:
            n: number of bytes.

        Raises:
            EDMCheckpointError: fewer bytes are left.
        """
        if n > self.remaining:
            raise EDMCheckpointError(
                f"the file ends early: {printable(str(n))} bytes are missing, {self.remaining} are left"
            )
        self.position += n
        return self.buffer[self.position - n : self.position]

    def read(self, n: int) -> bytes:
        """The next n bytes, or fewer at the end (part of the interface of `pickletools`).

        Args:
            n: number of bytes.
        """
        return bytes(self.take(min(n, self.remaining)))

    def readline(self) -> bytes:
        """The next line, or its first 256 bytes: lines hold names, which are short."""
        line, newline, _ = bytes(self.buffer[self.position : self.position + 256]).partition(b"\n")
        return self.read(len(line + newline))

    def tell(self) -> int:
        """Position in the file, in bytes."""
        return self.position


INSTRUCTIONS = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}

EMPTY: dict[str, Callable[[], object]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,  # see `allowlist._set_as_list`
}

LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    | {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
)


class Unpickler:
    """Interpreter of one pickle, whose `run` returns the data that the pickle describes.

    Args:
        stream: bytes of the pickle; `run` leaves it at the byte after the pickle.
        names: names that the pickle may contain.
        storages: receives the storages that the pickle refers to, by key; None where the format has no such
            references.
        load_archive: reads an archive within the pickle; None where none is allowed.
    """

    def __init__(
        self,
        stream: Stream,
        names: Collection[str] = (),
        storages: dict[str, Storage] | None = None,
        load_archive: Callable[[bytes], object] | None = None,
    ) -> None:
        self.stream = stream
        self.names = names
        self.storages = storages
        self.load_archive = load_archive
        self.archives: dict[int, tuple[bytes, object]] = {}
        self.memo: dict[int, Any] = {}
        self.stack: list[Any] = []
        self.marked_stacks: list[list[Any]] = []  # the stack below each mark

    def run(self) -> object:
        """Interpret the pickle.

        Returns:
            Its value: plain data, `Object` and `TensorView`.

        Raises:
            EDMCheckpointError: an instruction or a name is not allowed, or the pickle is damaged. A damaged pickle may
                raise other errors too, see `checkpoint.DAMAGE`.
        """
        while (code := self.stream.read(1)) != b".":  # STOP
            if code not in INSTRUCTIONS:
                raise EDMCheckpointError(
                    f"there is no pickle instruction at byte {self.stream.position}, or the file ends early"
                )
            self._step(INSTRUCTIONS[code])
        if len(self.stack) != 1 or self.marked_stacks:
            raise EDMCheckpointError(f"a pickle ends with {len(self.stack)} values instead of one")
        return self.stack.pop()

    def _argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        assert opcode.arg is not None
        return opcode.arg.reader(cast("IO[bytes]", self.stream))

    def _step(self, opcode: pickletools.OpcodeInfo) -> None:
        match opcode.name:
            case name if name in LITERALS:
                self._push(self._argument(opcode))
            case name if name in CONSTANTS:
                self._push(CONSTANTS[name])
            case name if name in EMPTY:
                self._push(EMPTY[name]())
            case "BINGET" | "LONG_BINGET":
                self._push(self.memo[self._argument(opcode)])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[self._argument(opcode)] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "MARK":
                self.marked_stacks.append(self.stack)
                self.stack = []
            case "TUPLE":
                self._push(tuple(self._pop_marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                self._push(tuple(self._pop(int(name[-1]))))
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_marked())
            case "SETITEM":
                self._update(self._pop(2))
            case "SETITEMS":
                self._update(self._pop_marked())
            case "GLOBAL":
                self._push(self._name(self._argument(opcode)))
            case "STACK_GLOBAL":
                self._push(self._name(" ".join(expect(part, str) for part in self._pop(2))))
            case "NEWOBJ":
                self._push(self._instance(*self._pop(2)))
            case "REDUCE":
                self._push(self._call(*self._pop(2)))
            case "BUILD":
                self._build(*self._pop(1))
            case "BINPERSID":
                self._push(self._persistent(*self._pop(1)))
            case "PROTO" | "FRAME":
                self._argument(opcode)  # read and ignored
            case name:
                raise EDMCheckpointError(f"the pickle instruction {name} is not allowed")

    def _push(self, value: object) -> None:
        self.stack.append(value)

    def _pop(self, n: int) -> list[Any]:
        if len(self.stack) < n:
            raise EDMCheckpointError("a pickle takes values from an empty stack")
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def _pop_marked(self) -> list[Any]:
        values, self.stack = self.stack, self.marked_stacks.pop()
        return values

    def _extend(self, values: list[Any]) -> None:
        expect(self.stack[-1], list).extend(values)

    def _update(self, items: list[Any]) -> None:
        target = expect(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # other keys could exhaust the stack (nested tuples) or the time (colliding integers)
            if type(key) is not str and not (type(key) is int and 0 <= key < 2**32):
                raise EDMCheckpointError(f"a dictionary key is a {type(key).__name__}, not a string or a small integer")
            target[key] = value

    def _name(self, path: str) -> Name:
        if path not in self.names:
            raise not_allowed(path.replace(" ", "."))
        return Name(path)

    def _instance(self, name: object, arguments: object) -> object:
        path = expect(name, Name).path
        if path not in CLASSES or arguments != ():
            raise not_allowed(f"{name}.__new__")
        return CLASSES[path]()

    def _call(self, name: object, arguments: object) -> object:
        path, values = expect(name, Name).path, expect(arguments, tuple)
        if path == LOAD_FROM_BYTES and self.load_archive is not None:
            return self._archive(self.load_archive, *values)
        if path not in FUNCTIONS:
            raise not_allowed(f"{name}()")
        return FUNCTIONS[path](*values)

    def _archive(self, load_archive: Callable[[bytes], object], data: object) -> object:
        """Read an archive, once however often it is referred to, so that the work stays linear in the file."""
        octets = expect(data, bytes)
        if id(octets) not in self.archives:
            self.archives[id(octets)] = octets, load_archive(octets)  # keeping the bytes keeps their id unique
        return self.archives[id(octets)][1]

    def _build(self, state: object) -> None:
        match self.stack[-1], state:
            case Object(state=None) as target, dict():
                target.state = state
            case Dtype() as target, (3, "<" | ">" | "|" | "=" as order, *_):
                target.order = order
            case target, _:
                kinds = type(target).__name__, type(state).__name__
                raise EDMCheckpointError("the state of a {} cannot be a {}".format(*kinds))

    def _persistent(self, identity: object) -> object:
        """Storage that a persistent id stands for; in torch's legacy format also the name of a class."""
        match identity:
            case ("module", Name() as name, *_) if self.storages is not None:  # its source follows, and is ignored
                return name
            case ("storage", Name(path), str(key), str(), int(count)):
                return self._storage(path, key, count)
            case ("storage", Name(path), str(key), str(), int(count), None):
                return self._storage(path, key, count)
        raise EDMCheckpointError("a persistent id is not that of a storage")

    def _storage(self, path: str, key: str, count: int) -> Storage:
        if self.storages is None or path not in STORAGE_TYPES or count < 0:
            raise EDMCheckpointError("a persistent id is that of a storage that is not allowed here")
        storage = self.storages.setdefault(key, Storage(STORAGE_TYPES[path], count))
        if (storage.dtype, storage.count) != (STORAGE_TYPES[path], count):
            raise EDMCheckpointError("a storage is used with two types or sizes")
        return storage
