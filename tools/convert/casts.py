"""Numbers of one dtype made those of another, in numpy: torch takes seconds and 0.2 GB to import."""

from functools import cache
from typing import TYPE_CHECKING

from megapatch.models.torch_save import ITEM_BYTES

if TYPE_CHECKING:
    from numpy import ndarray


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
        with np.errstate(over="ignore"):  # too large is infinite, as in torch
            return values.astype(np.float16).view(np.uint16)
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


def cast(bits: "ndarray", read: str, write: str) -> "ndarray":
    """Stored numbers of dtype ``read`` -> those of dtype ``write``; the same array where they are one."""
    return bits if read == write else from_float32(to_float32(bits, read), write)


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
