"""An interpreter for the part of pickle that checkpoints need; it can only make plain values. Imports no torch.

Python's own unpickler would do with a guarded ``find_class``, but reserves what a few bytes ask for (a memo of 2**32
places, bytes of 2**40) and dies of a stack overflow when a tuple nested a million times is hashed. Here every length is
checked against what is left of the data, and a name is looked up, never imported. Protocols 2 to 5.
"""

import struct
from collections.abc import Callable
from typing import Any

from megapatch.models.stand_ins import Damaged, Maker, Opaque, Record, is_key

Find = Callable[[str, str], Any]  # (module, name) -> what the pickle may do with it: a str, a class of Record, a Maker
_LONGEST_INT_BYTES = 512
_STOP = ord(".")
_LONG = struct.Struct("<I")


class Machine:
    """One pickle, run once."""

    def __init__(self, data: bytes, find: Find, persistent: Callable[[Any], Any] | None) -> None:
        self.data, self.find, self.persistent = data, find, persistent
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value; Damaged, or IndexError, KeyError, struct.error and the like when there is none."""
        data, steps = self.data, _STEPS
        while (code := data[self.at]) != _STOP:
            self.at += 1
            steps[code](self)
        return self.stack[-1]

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self.at + count
        if end > len(self.data):
            raise Damaged(f"byte {self.at}: {count} bytes announced, {len(self.data) - self.at} there")
        found = self.data[self.at : end]
        self.at = end
        return found

    def line(self) -> str:
        """The text up to the end of the line."""
        end = self.data.index(b"\n", self.at)
        return self.take(end + 1 - self.at)[:-1].decode()

    def unmark(self) -> list[Any]:
        """What lies above the last mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found


def _push(value: Any) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(value)


def _new(kind: type) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(kind())


def _number(form: str) -> Callable[[Machine], None]:
    shape = struct.Struct(form)

    def step(m: Machine) -> None:
        m.stack.append(shape.unpack_from(m.data, m.at)[0])
        m.at += shape.size

    return step


def _byte(m: Machine) -> None:
    m.stack.append(m.data[m.at])
    m.at += 1


def _sized(form: str, convert: Callable[[bytes], Any]) -> Callable[[Machine], None]:
    """A value with its length in bytes before it."""
    shape = struct.Struct(form)

    def step(m: Machine) -> None:
        start = m.at + shape.size
        m.at = end = start + shape.unpack_from(m.data, m.at)[0]
        if end > len(m.data):
            raise Damaged(f"byte {start}: {end - start} bytes announced, {len(m.data) - start} there")
        m.stack.append(convert(m.data[start:end]))

    return step


def _integer(data: bytes) -> int:
    if len(data) > _LONGEST_INT_BYTES:
        raise Damaged(f"an integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _get_short(m: Machine) -> None:
    m.stack.append(m.memo[m.data[m.at]])
    m.at += 1


def _get_long(m: Machine) -> None:
    m.stack.append(m.memo[_LONG.unpack_from(m.data, m.at)[0]])
    m.at += 4


def _put(form: str) -> Callable[[Machine], None]:
    shape = struct.Struct(form)

    def step(m: Machine) -> None:
        m.memo[shape.unpack_from(m.data, m.at)[0]] = m.stack[-1]
        m.at += shape.size

    return step


def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _skip(count: int) -> Callable[[Machine], None]:
    """PROTO and FRAME: their arguments say nothing that is needed here."""

    def step(m: Machine) -> None:
        m.take(count)

    return step


def _mark(m: Machine) -> None:
    m.marks.append(len(m.stack))


def _tuple(m: Machine) -> None:
    m.stack.append(tuple(m.unmark()))


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def step(m: Machine) -> None:
        if len(m.stack) < count:
            raise Damaged("too few values for a tuple")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return step


def _fill(m: Machine, items: list[Any]) -> None:
    """Add items to the list or set below them."""
    target = m.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise Damaged(f"items for a {type(target).__name__}")


def _fill_set(m: Machine) -> None:
    items, target = m.unmark(), m.stack[-1]
    if type(target) is not set or not all(map(is_key, items)):
        raise Damaged("items of a set that cannot be")
    target.update(items)


def _frozen(m: Machine) -> None:
    items = m.unmark()
    if not all(map(is_key, items)):
        raise Damaged("items of a set that cannot be")
    m.stack.append(Record(tuple(items)))


def _fill_dict(m: Machine, items: list[Any]) -> None:
    target, keys = m.stack[-1], items[::2]
    if isinstance(target, Opaque):
        return
    if not isinstance(target, dict) or len(items) % 2 or not all(map(is_key, keys)):
        raise Damaged(f"keys of a {type(target).__name__} that cannot be")
    target.update(zip(keys, items[1::2], strict=True))


def _global(m: Machine) -> None:
    module, name = m.line(), m.line()
    m.stack.append(m.find(module, name))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if type(module) is not str or type(name) is not str:
        raise Damaged("a name that is no text")
    m.stack.append(m.find(module, name))


def _reduce(m: Machine) -> None:
    args, stack = m.stack.pop(), m.stack
    stand_in = stack[-1]
    if type(args) is not tuple:
        raise Damaged("arguments that are no tuple")
    if type(stand_in) is type and issubclass(stand_in, Record):
        stack[-1] = stand_in.of(args)
    elif type(stand_in) is Maker:
        stack[-1] = stand_in.make(args)
    else:
        raise Damaged(f"a call of a {type(stand_in).__name__}")


def _new_object_with_names(m: Machine) -> None:
    m.stack.pop()  # arguments by name; no class here reads any
    _reduce(m)


def _build(m: Machine) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if isinstance(target, Record):
        target.set_state(state)
    elif not isinstance(target, dict):  # an OrderedDict of parameters has attributes of its own; none is needed
        raise Damaged(f"a state for a {type(target).__name__}")


def _persistent(m: Machine) -> None:
    if m.persistent is None:
        raise Damaged("it refers to outside data")
    m.stack.append(m.persistent(m.stack.pop()))


def _unknown(m: Machine) -> None:
    raise Damaged(f"byte {m.at - 1}: an instruction {m.data[m.at - 1 : m.at]!r} that no checkpoint needs")


_CODES: dict[bytes, Callable[[Machine], None]] = {
    b"\x80": _skip(1),
    b"\x95": _skip(8),
    b"(": _mark,
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"J": _number("<i"),
    b"K": _byte,
    b"M": _number("<H"),
    b"G": _number(">d"),
    b"\x8a": _sized("<B", _integer),
    b"\x8b": _sized("<I", _integer),
    b"B": _sized("<I", bytes),
    b"C": _sized("<B", bytes),
    b"\x8e": _sized("<Q", bytes),
    b"\x96": _sized("<Q", bytes),
    b"X": _sized("<I", bytes.decode),
    b"\x8c": _sized("<B", bytes.decode),
    b"\x8d": _sized("<Q", bytes.decode),
    b")": _push(()),
    b"t": _tuple,
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"]": _new(list),
    b"a": lambda m: _fill(m, [m.stack.pop()]),
    b"e": lambda m: _fill(m, m.unmark()),
    b"}": _new(dict),
    b"s": lambda m: _fill_dict(m, [m.stack.pop(-2), m.stack.pop()]),
    b"u": lambda m: _fill_dict(m, m.unmark()),
    b"\x8f": _new(set),
    b"\x90": _fill_set,
    b"\x91": _frozen,
    b"h": _get_short,
    b"j": _get_long,
    b"q": _put("<B"),
    b"r": _put("<I"),
    b"\x94": _memoize,
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"\x81": _reduce,
    b"\x92": _new_object_with_names,
    b"b": _build,
    b"Q": _persistent,
}
_STEPS = [_CODES.get(bytes([code]), _unknown) for code in range(256)]
