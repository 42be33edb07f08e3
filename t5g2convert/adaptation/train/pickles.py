"""Pickles as data: what one would make, without making it.

Python's own reader calls what a pickle names, makes room for lengths and memo numbers before it sees whether there is
anything behind them, and hashes keys that may take for ever. This one knows the few instructions that torch's pickles
of tables and tensors are made of; an object is its class's name, the arguments and the state, and a dict is its pairs.
Memory and time are bounded by the pickle's length.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple


class Name(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str


@dataclass(slots=True, eq=False)
class Pairs:
    """A dict: its keys and values in order."""

    items: list[tuple[Any, Any]]


@dataclass(slots=True, eq=False)
class Made:
    """What would come of a call.

    Attributes:
        of: What is called.
        arguments: What it is given.
        state: What the result is given then; None for nothing.
    """

    of: Any
    arguments: Any
    state: Any = None

    def fields(self, name: Name) -> Mapping[str, Any]:
        """The attributes of an object of a class.

        Raises:
            ValueError: It is of another class, or its state is none of attributes.
        """
        if self.of != name or not isinstance(self.state, Pairs):
            raise ValueError(f"found {_shown(self.of)}, expected {name.name}")
        if not all(isinstance(key, str) for key, _ in self.state.items):
            raise ValueError(f"the attributes of {name.name} have no names")
        return dict(self.state.items)


class Stored(NamedTuple):
    """An object that is kept elsewhere, and how it is called there."""

    key: Any


class _Mark:
    """Where the values of a tuple, a list or a dict begin."""


_MARK: Final = _Mark()


def read_pickle(data: bytes, allowed: Callable[[Name], bool]) -> Any:
    """Read a pickle.

    Args:
        data: All of it; what is behind its end is left alone.
        allowed: Whether a class or function may be named.

    Raises:
        ValueError: It is not a pickle, is cut, names what is not allowed, or is made of other instructions.
    """
    try:
        return _Machine(data, allowed).run()
    except (IndexError, struct.error, UnicodeDecodeError):
        raise ValueError("it is damaged or cut") from None


class _Machine:
    def __init__(self, data: bytes, allowed: Callable[[Name], bool]) -> None:
        self._data, self._at, self._allowed = data, 0, allowed
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value."""
        while (code := self._take(1)) != pickle.STOP:
            action = _ACTIONS.get(code)
            if action is None:
                raise ValueError(f"it has the instruction {code!r}, which describes no tensor")
            action(self)
        return self._pop()

    def _take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) != count:
            raise IndexError
        self._at += count
        return piece

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise IndexError
        return value

    def _values(self) -> list[Any]:
        """All from the last mark on."""
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise IndexError
        values = self._stack[place + 1 :]
        del self._stack[place:]
        return values

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def skip(self, count: int) -> None:
        self._take(count)

    def integer(self, form: str) -> None:
        self.push(self._number(form))

    def long(self) -> None:
        self.push(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def double(self) -> None:
        self.push(struct.unpack(">d", self._take(8))[0])

    def text(self, form: str) -> None:
        self.push(self._take(self._number(form)).decode())

    def tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def tuple_to_mark(self) -> None:
        self.push(tuple(self._values()))

    def append(self) -> None:
        value = self._pop()
        self._last(list).append(value)

    def extend(self) -> None:
        values = self._values()
        self._last(list).extend(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._last(Pairs).items.append((key, value))

    def set_items(self) -> None:
        values = self._values()
        self._last(Pairs).items.extend(zip(values[::2], values[1::2], strict=True))

    def _last(self, kind: type[Any]) -> Any:
        found = self._stack[-1]
        if not isinstance(found, kind):
            raise ValueError(f"it fills a {type(found).__name__}")
        return found

    def put(self, form: str | None) -> None:
        self._memo[len(self._memo) if form is None else self._number(form)] = self._stack[-1]

    def get(self, form: str) -> None:
        number = self._number(form)
        if number not in self._memo:
            raise IndexError
        self.push(self._memo[number])

    def name_in_line(self) -> None:
        lines = []
        for _ in range(2):
            end = self._data.index(b"\n", self._at)
            lines.append(self._take(end - self._at).decode())
            self._take(1)
        self._name(*lines)

    def name_on_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("it names something that is not text")
        found = Name(module, name)
        if not self._allowed(found):
            raise ValueError(f"it names {_shown(found)}, which describes no tensor")
        self.push(found)

    def call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is not a function")
        self.push(Made(function, arguments))

    def build(self) -> None:
        state = self._pop()
        made = self._last(Made)
        # What has slots gives two states, of which the first is that of a dict.
        slots = state[1] if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], Pairs) else state
        made.state = slots

    def stored(self) -> None:
        self.push(Stored(self._pop()))


def _shown(name: Any) -> str:
    """A name in an error."""
    return f"{name.module}.{name.name}"[:200] if isinstance(name, Name) else type(name).__name__


_ACTIONS: Final[Mapping[bytes, Callable[[_Machine], None]]] = {
    pickle.PROTO: lambda machine: machine.skip(1),
    pickle.FRAME: lambda machine: machine.skip(8),
    pickle.MARK: lambda machine: machine.push(_MARK),
    pickle.NONE: lambda machine: machine.push(None),
    pickle.NEWTRUE: lambda machine: machine.push(True),
    pickle.NEWFALSE: lambda machine: machine.push(False),
    pickle.BININT: lambda machine: machine.integer("<i"),
    pickle.BININT1: lambda machine: machine.integer("<B"),
    pickle.BININT2: lambda machine: machine.integer("<H"),
    pickle.LONG1: _Machine.long,
    pickle.BINFLOAT: _Machine.double,
    pickle.BINUNICODE: lambda machine: machine.text("<I"),
    pickle.SHORT_BINUNICODE: lambda machine: machine.text("<B"),
    pickle.EMPTY_TUPLE: lambda machine: machine.push(()),
    pickle.TUPLE1: lambda machine: machine.tuple_of(1),
    pickle.TUPLE2: lambda machine: machine.tuple_of(2),
    pickle.TUPLE3: lambda machine: machine.tuple_of(3),
    pickle.TUPLE: _Machine.tuple_to_mark,
    pickle.EMPTY_LIST: lambda machine: machine.push([]),
    pickle.APPEND: _Machine.append,
    pickle.APPENDS: _Machine.extend,
    pickle.EMPTY_DICT: lambda machine: machine.push(Pairs([])),
    pickle.SETITEM: _Machine.set_item,
    pickle.SETITEMS: _Machine.set_items,
    pickle.MEMOIZE: lambda machine: machine.put(None),
    pickle.BINPUT: lambda machine: machine.put("<B"),
    pickle.LONG_BINPUT: lambda machine: machine.put("<I"),
    pickle.BINGET: lambda machine: machine.get("<B"),
    pickle.LONG_BINGET: lambda machine: machine.get("<I"),
    pickle.GLOBAL: _Machine.name_in_line,
    pickle.STACK_GLOBAL: _Machine.name_on_stack,
    pickle.NEWOBJ: _Machine.call,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: _Machine.stored,
}
