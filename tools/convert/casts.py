"""Numbers of one dtype made those of another, in numpy: torch takes seconds and 0.2 GB to import."""

from functools import cache
from typing import TYPE_CHECKING

from megapatch.models.torch_save import ITEM_BYTES

if TYPE_CHECKING:
    from numpy import floating, ndarray


def float32(value: float) -> "floating":
    """A number as float32, so that arrays of these stay such."""
    import numpy as np

    return np.float32(value)


def stored(raw: "ndarray", dtype: str) -> "ndarray":
    """Bytes [rows, columns * item] -> the same bits [rows, columns], as unsigned integers of the dtype's width."""
    return raw.view(f"u{ITEM_BYTES[dtype]}")


def to_float32(bits: "ndarray", dtype: str) -> "ndarray":
    """Stored numbers of a dtype as float32, exactly; a new array, or a view where they are float32 already."""
    import numpy as np

    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return _float8()[dtype].take(bits)


def from_float32(values: "ndarray", dtype: str) -> "ndarray":
    """float32 numbers rounded to a dtype, to even as torch and the IEEE do, as stored bits."""
    import numpy as np

    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        return _half(values)
    assert dtype == "bfloat16", f"no cast to {dtype}"
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    made = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():  # stays one: the carry could make it infinite or zero
        made[nan] = (bits[nan] >> 16) | 0x40
    return made


def _half(values: "ndarray") -> "ndarray":
    """float32 numbers as the bits of float16; numpy's own is slow for numbers that leave its range (measured: 30x)."""
    import numpy as np

    bits = values.view(np.uint32)
    size = bits & 0x7FFFFFFF
    normal = (size + 0xC8000FFF + (size >> 13 & 1)) >> 13  # the exponent less 112, modulo 2**32, and half a unit
    with np.errstate(invalid="ignore"):
        small = (size.view(np.float32) + np.float32(0.5)).view(np.uint32) - 0x3F000000  # units of 2**-24, as near 0.5
    made = np.where(size < 0x38800000, small, normal)
    made[size >= 0x47800000] = 0x7C00  # infinite
    made[size > 0x7F800000] = 0x7E00
    made |= bits >> 16 & 0x8000
    return made.astype(np.uint16)


def cast(bits: "ndarray", read: str, write: str) -> "ndarray":
    """Stored numbers of dtype ``read`` -> those of dtype ``write``; the same array where they are one."""
    if read == write:
        return bits
    if read == "float32" or (read, write) == ("bfloat16", "float32"):
        return from_float32(to_float32(bits, read), write)
    return _table(read, write).take(bits)


@cache
def _table(read: str, write: str) -> "ndarray":
    """What each of the numbers of a dtype of 8 or 16 bits becomes."""
    import numpy as np

    codes = np.arange(256 ** ITEM_BYTES[read], dtype=f"u{ITEM_BYTES[read]}")
    return from_float32(to_float32(codes, read), write)


@cache
def _float8() -> dict[str, "ndarray"]:
    """The 256 values of each 8-bit float."""
    import numpy as np

    half = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)  # e5m2 is the upper half of it
    small = [*(_e4m3fn(code) for code in range(127)), float("nan")]
    return {"float8_e5m2": half, "float8_e4m3fn": np.array(small + [-x for x in small], np.float32)}


def _e4m3fn(code: int) -> float:
    """The value of 7 bits: 4 of exponent (bias 7), 3 of mantissa."""
    exponent, mantissa = divmod(code, 8)
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
