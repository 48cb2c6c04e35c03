"""Pickles read without running anything, and written without importing what they name. Imports no torch.

A torch_dist checkpoint describes itself in pickles, and a pickle may name any function to call. Here every name is
looked up in ALLOWED: a passive stand-in comes back, nothing is imported, and another name is a UserError.
"""

import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from megapatch.models.cli import UserError
from megapatch.models.pickle_machine import Machine
from megapatch.models.stand_ins import (
    ALLOWED,
    DTYPES,
    STORAGES,
    BytesFile,
    Index,
    Opaque,
    Record,
    Storage,
    StoredTensor,
)

__all__ = ["ALLOWED", "DTYPES", "STORAGES", "BytesFile", "Index", "Record", "Storage", "StoredTensor", "dump", "load"]
_MODULES, _CLASS = ("megatron", "transformer_engine"), re.compile(r"[A-Z]\w*")
_ARGS = "args"  # where Megatron-LM keeps the options of a run


def load(
    data: bytes,
    where: str,
    persistent: Callable[[Any], Any] | None = None,
    foreign: set[str] | None = None,
    *,
    whole: bool = False,
) -> Any:
    """The value of a pickle, made of plain values and stand-ins; ``where`` names the file in errors (UserError).

    With a set ``foreign``, classes of Megatron's that are not known here are accepted in the options of a run, the
    top level's "args": each becomes an Opaque, and its name is added to the set. ``whole``: nothing may follow.
    """
    unknown: set[str] = set()

    def find(module: str, name: str) -> Any:
        stand_in = ALLOWED.get((module, name))
        if stand_in is not None:
            return stand_in
        if foreign is not None and module.partition(".")[0] in _MODULES and _CLASS.fullmatch(name):
            unknown.add(f"{module}.{name}")
            return type("Opaque", (Opaque,), {"name": f"{module}.{name}"})
        raise _named(where, f"{module}.{name}")

    try:
        machine = Machine(data, find, persistent)
        value = machine.run()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way; none of them runs anything
        raise UserError(f"{where}: not a readable pickle ({_said(error)}); the file is damaged") from error
    if whole and machine.at + 1 != len(data):
        raise UserError(f"{where}: more follows a pickle in a module's state; do not load this checkpoint")
    if unknown and foreign is not None:
        if found := _opaque_outside_args(value):
            raise _named(where, found)
        foreign |= unknown
    return value


def _named(where: str, name: str) -> UserError:
    shown = name if name.isprintable() and len(name) <= 200 else ascii(name[:200])
    return UserError(
        f"{where}: the pickle names {shown}, which no checkpoint needs; nothing was run; do not load this checkpoint"
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {ascii(str(error))[1:-1][:200]}"


def _opaque_outside_args(value: Any) -> str | None:
    """The name of an unknown class that lies elsewhere than in the options of a run."""
    items = value.items() if isinstance(value, dict) else [(None, value)]
    left, seen = [item for key, item in items if key != _ARGS], set()
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Opaque) or (isinstance(item, type) and issubclass(item, Opaque)):
            return item.name
        if isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            left += item
        elif isinstance(item, Record):
            left += vars(item).values()
    return None


@dataclass(frozen=True)
class Global:
    """A module's attribute, written by name."""

    module: str
    name: str

    def __call__(self, *args: Any) -> "Call":
        return Call(self, args)


@dataclass(frozen=True)
class Call:
    """What a Global gives for arguments, to be called by the reader; ``state``: attributes to set then."""

    function: Global
    args: tuple[Any, ...]
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Persistent:
    """A reference that the reader resolves."""

    value: Any


_InPython: Any = pickle._Pickler  # type: ignore[attr-defined]  # its dispatch table can be extended


class _Writer(_InPython):
    dispatch: ClassVar[dict[type, Any]] = dict(_InPython.dispatch)

    def save_global_name(self, value: Global) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self.memoize(value)

    def save_call(self, value: Call) -> None:
        self.save(value.function)
        self.save(value.args)
        self.write(pickle.REDUCE)
        if value.state is not None:
            self.save(value.state)
            self.write(pickle.BUILD)

    def persistent_id(self, value: Any) -> Any:
        return value.value if isinstance(value, Persistent) else None

    dispatch[Global] = save_global_name
    dispatch[Call] = save_call


def dump(value: Any) -> bytes:
    """The pickle (protocol 2, which torch's weights_only reader understands) of plain values and Calls."""
    file = io.BytesIO()
    _Writer(file, 2).dump(value)
    return file.getvalue()
