"""Reader of pickles from other people, which imports nothing and calls nothing that a pickle names.

A pickle is a program for a small stack machine, and some of its instructions call any function that the file names.
Here a name becomes a record of that name, if it is in a table; "calling" it calls our function in the table, which
yields plain data; and any other instruction or name is refused with its name.

    GLOBAL, STACK_GLOBAL  push a record of the name, if the table has it
    REDUCE, NEWOBJ        push what our function of that name returns
    BUILD                 give a state to one of our records; no other object is touched
    BINPERSID             push what the format's own hook returns, if it has one

All else is done by `pickle._Unpickler`, the unpickler of the standard library that is written in Python, with a shorter
table of instructions. The one in C could not be limited: it hashes keys of dictionaries and allocates its memo before
a subclass is asked, so that nested tuples and large numbers in a file exhaust the stack, the time or the memory.

Time and memory are linear in the length of the file, and the number of objects is limited.
"""

import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import override

from stablefield.files import printable

T = TypeVar("T")

# errors of damaged pickles and archives; RuntimeError includes too deep a recursion
DAMAGE: tuple[type[Exception], ...] = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
DAMAGE += (RuntimeError, EOFError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile)
MOST_READS = 2**22  # of one stream; each object needs one at least


class RefusedError(ValueError):
    """The file is damaged or contains something that files of its kind do not contain; nothing of it was run."""


@contextmanager
def refusing(name: object) -> Iterator[None]:
    """Context in which the errors that damaged files cause become a `RefusedError` with the name of the file.

    Args:
        name: name of the file.

    Raises:
        RefusedError: the file is refused or damaged.
    """
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"{printable(name, 2000)} is refused: {error}") from None
    except DAMAGE as error:
        raise RefusedError(f"{printable(name, 2000)} is damaged: {type(error).__name__}: {printable(error)}") from None


def not_allowed(name: str) -> RefusedError:
    """The error for a name that is in no table.

    Args:
        name: the name as the file gives it, with dots.
    """
    return RefusedError(f"`{printable(name)}` is not allowed in such a file")


def expect(value: object, kind: type[T]) -> T:
    """The value, if it has exactly this type (not a subclass).

    Args:
        value: any data from the file.
        kind: the type that it must have.

    Raises:
        RefusedError: it has another type. Only the type is shown, because the value may be huge.
    """
    if type(value) is not kind:
        raise RefusedError(f"found a {type(value).__name__} where a {kind.__name__} is expected")
    return value


@dataclass(frozen=True)
class Name:
    """The name of a class or function, which is never imported.

    Attributes:
        path: module and name, separated by a space.
    """

    path: str

    @override
    def __str__(self) -> str:
        return self.path.replace(" ", ".")


@dataclass(frozen=True)
class Instances:
    """Entry of a table for a class whose instances are made without arguments.

    Attributes:
        make: returns what stands for a new instance.
    """

    make: Callable[[], object]


class Record:
    """Data to which a pickle may give a state."""

    def set_state(self, state: object) -> None:
        """Check the state and keep what is needed of it.

        Args:
            state: any data from the file.

        Raises:
            RefusedError: the state has another form.
        """
        raise RefusedError(f"the state of a {type(self).__name__} cannot be a {type(state).__name__}")


Table = Mapping[str, Callable[..., object] | Instances | None]


class Stream:
    """Sequential reader of bytes, which never allocates more than there are, whatever lengths the file claims.

    Args:
        buffer: all bytes of the file.
    """

    def __init__(self, buffer: bytes | memoryview) -> None:
        self.buffer = memoryview(buffer)
        self.position = self.reads = 0

    @property
    def remaining(self) -> int:
        """Bytes that have not been read."""
        return len(self.buffer) - self.position

    def take(self, n: int) -> memoryview:
        """The next n bytes, without a copy.

        Args:
            n: number of bytes.

        Raises:
            RefusedError: fewer bytes are left.
        """
        if n > self.remaining:
            raise RefusedError(f"the file ends early: {printable(n)} bytes are missing, {self.remaining} are left")
        self.position += n
        return self.buffer[self.position - n : self.position]

    def read(self, n: int) -> bytes:
        """A copy of the next n bytes.

        Args:
            n: number of bytes.

        Raises:
            RefusedError: fewer bytes are left, or there were too many reads.
        """
        self.reads += 1
        if self.reads > MOST_READS:
            raise RefusedError(f"a pickle has more than {MOST_READS:,} parts")
        return bytes(self.take(n))

    def readline(self) -> bytes:
        """The next line, or its first 256 bytes: lines hold names, which are short."""
        line, newline, _ = bytes(self.buffer[self.position : self.position + 256]).partition(b"\n")
        return self.read(len(line + newline))


def unpickle(stream: Stream, table: Table, persistent: Callable[[object], object] | None = None) -> object:
    """Read one pickle.

    Args:
        stream: bytes of the pickle, left at the byte after it.
        table: what the names stand for, by module and name with a space between them: a function of ours, `Instances`,
            or None for a name that may only be mentioned.
        persistent: returns what a persistent id stands for; None if the format has none.

    Returns:
        The value of the pickle: None, bool, int, float, str, bytes, tuple, list (sets too, since hashing could take
        exponential time), dict with keys that are strings, bytes or integers, and results of the table and the hook.

    Raises:
        RefusedError: the pickle is damaged or has what is not allowed. Damaged pickles raise other errors too (see
            `refusing`).
    """
    return _Unpickler(stream, table, persistent).load()


class _Instructions(dict[int, Callable[[Any], None]]):
    """Functions by the byte of their instruction."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        name = next((known.name for known in pickletools.opcodes if ord(known.code) == code), f"{code:#x}")
        raise RefusedError(f"the pickle instruction {name} is not allowed")


_PLAIN = (
    *("PROTO", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("SHORT_BINSTRING", "BINSTRING", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("MARK", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
    *("GLOBAL", "STACK_GLOBAL", "BINPERSID"),
)


class _Unpickler(pickle._Unpickler):
    """The unpickler of the standard library, without the instructions that call or change anything."""

    stack: list[Any]
    metastack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: Stream, table: Table, persistent: Callable[[object], object] | None) -> None:
        super().__init__(stream, encoding="bytes")
        self.stream, self.table, self.persistent = stream, table, persistent
        self.copied = 0

    @override
    def load(self) -> object:
        value = super().load()
        if self.stack or self.metastack:
            raise RefusedError("a pickle ends with more than one value")
        return value

    @override
    def find_class(self, module: str, name: str) -> Name:
        if (path := f"{module} {name}") not in self.table:
            raise not_allowed(f"{module}.{name}")
        return Name(path)

    @override
    def persistent_load(self, pid: object) -> object:
        if self.persistent is None:
            raise RefusedError("the pickle instruction BINPERSID is not allowed here")
        return self.persistent(pid)

    def load_frame(self) -> None:
        self.stream.read(8)  # the length of what follows in one block, which is of no use here

    def load_newobj(self) -> None:
        arguments, name = self.stack.pop(), expect(self.stack.pop(), Name)
        if not isinstance(instances := self.table[name.path], Instances) or arguments != ():
            raise not_allowed(f"{name}.__new__")
        self.stack.append(instances.make())

    def load_reduce(self) -> None:
        arguments, name = expect(self.stack.pop(), tuple), expect(self.stack.pop(), Name)
        if isinstance(function := self.table[name.path], Instances) or function is None:
            raise not_allowed(f"{name}()")
        self.stack.append(value := function(*arguments))
        self.copied += len(value) if isinstance(value, bytes) else 0
        if self.copied > len(self.stream.buffer):
            raise RefusedError("a pickle repeats bytes until they expand to more than its size")

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(record := self.stack[-1], Record):
            raise RefusedError(f"a {type(record).__name__} has no state")
        record.set_state(state)

    def load_setitem(self) -> None:
        self._update([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = expect(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # other keys could exhaust the stack (nested tuples) or the time (colliding integers)
            if type(key) not in (str, bytes) and not (type(key) is int and 0 <= key < 2**32):
                raise RefusedError(f"a dictionary key is a {type(key).__name__}, not a string or a small integer")
            target[key] = value

    dispatch = _Instructions(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _PLAIN}
        | {
            pickle.EMPTY_SET[0]: pickle._Unpickler.dispatch[pickle.EMPTY_LIST[0]],
            pickle.ADDITEMS[0]: pickle._Unpickler.dispatch[pickle.APPENDS[0]],
            pickle.FRAME[0]: load_frame,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.REDUCE[0]: load_reduce,
            pickle.BUILD[0]: load_build,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
        }
    )


# ---- names that both EDM's checkpoints and CIFAR's files contain


@dataclass(eq=False)
class Dtype(Record):
    """A numeric type of numpy.

    Attributes:
        code: kind and size in bytes, as "f8".
        order: byte order, as numpy writes it.
    """

    code: str
    order: str = "="

    @override
    def set_state(self, state: object) -> None:
        match state:
            case (3, "<" | ">" | "|" | "=" as order, *_):
                self.order = order
            case (3, b"|", *_):  # Python 2
                self.order = "|"
            case _:
                super().set_state(state)


def _dtype(code: object, align: object = False, copy: object = False) -> Dtype:
    name = code.decode("latin1") if type(code) is bytes else expect(code, str)
    if name not in {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}:
        raise not_allowed(f"numpy.dtype({name})")
    return Dtype(name)


def _encode(text: object, encoding: object) -> bytes:
    # as Python 3 writes bytes in protocol 2
    if encoding != "latin1":
        raise RefusedError("`_codecs.encode` is allowed with the encoding latin1 only")
    return expect(text, str).encode("latin1")


NUMPY: Table = {"numpy dtype": _dtype, "_codecs encode": _encode}
