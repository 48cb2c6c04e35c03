"""One line of JSON: orjson answers first where it is installed, the standard library decides, and they agree.

Both take objects nested up to 1,024 deep, integers of 64 bits as int and longer ones as float, no NaN; of a key that
occurs twice the last value.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

fast_loads: Callable[[bytes], Any] | None
try:
    from orjson import loads as fast_loads
except ImportError:  # extra `data` is not installed
    fast_loads = None

_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    bytes: "bytes",
    type(None): "null",
}
_MAX_DEPTH = 1024  # orjson's own
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_LONGEST_INT = 20  # characters of the longest integer of 64 bits, with its sign


class BadRecord(ValueError):
    """Why a record is none, and at which of its bytes."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason, offset)
        self.reason, self.offset = reason, offset


def loads(line: bytes) -> Any:
    """The JSON value of a line by the standard library; what is none is a BadRecord with its byte."""
    text = utf8(line)
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(text) > _MAX_DEPTH:
        raise BadRecord(f"not JSON that can be read (nested more than {_MAX_DEPTH:,} deep)")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 2 * _MAX_DEPTH)  # the library's own limit depends on who calls
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON ({error.msg})", len(text[: error.pos].encode())) from None
    finally:
        sys.setrecursionlimit(limit)


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _integer(digits: str) -> int | float:
    if len(digits) <= _LONGEST_INT and -(1 << 63) <= (number := int(digits)) < 1 << 64:
        return number
    return float(digits)


def _refuse_constant(name: str) -> None:
    raise BadRecord(f"not JSON ({name} is not a JSON value)")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_integer)


def utf8(data: bytes) -> str:
    """Text from bytes; BadRecord at the first byte that is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte 0x{data[error.start]:02x}: {error.reason})", error.start) from None


def refuse_surrogates(value: Any) -> None:
    """BadRecord when a string in a value, or in what was made of it, has half a character that UTF-8 cannot hold."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"\\u{ord(value[error.start]):04x}"
            raise BadRecord(f"lone surrogate {found}, half of a character; UTF-8 cannot hold it") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            refuse_surrogates(key)
            refuse_surrogates(item)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_surrogates(item)
    elif hasattr(value, "__dict__"):
        refuse_surrogates(vars(value))


def kind_of(value: Any) -> str:
    """What a value is in JSON's words."""
    return _KINDS.get(type(value), type(value).__name__)
