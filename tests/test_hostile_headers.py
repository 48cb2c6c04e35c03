"""2,000 damaged safetensors headers: what is accepted, the safetensors library accepts too, with equal tensors."""

import copy
import json
import random
import struct
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors

from megapatch.models import hf_files
from megapatch.models.cli import UserError
from megapatch.models.torch_save import ITEM_BYTES

COUNT = 2000
NUMBERS = [0, 1, 2, 3, 4, 8, 24, -1, -(2**63), 2**31, 2**32, 2**61, 2**62, 2**63, 2**64 - 1, 2**64, 2**70, 10**40]
ODD = [2.0, 1e300, float("nan"), float("inf"), True, False, None, "2", "", [], [2], {}, {"0": 2}, [[2]]]
DTYPES = [*hf_files.SAFETENSORS_DTYPES, "F31", "f32", "F32 ", "", "BF16\0", None, 3, [], ["F32"], {"F32": 1}]


def good(chance: random.Random) -> tuple[dict[str, Any], bytes]:
    """A header that is right, and its data."""
    names = chance.sample(["a", "b.weight", "ü", "x y", 'q"q', "", "\u2028", "nul\0"], chance.randrange(1, 5))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if chance.random() < 0.5 else {}
    at = 0
    for name in names:
        dtype = chance.choice(list(hf_files.SAFETENSORS_DTYPES))
        shape = [chance.choice([0, 1, 2, 3]) for _ in range(chance.randrange(4))]
        end = at + prod(shape) * ITEM_BYTES[hf_files.SAFETENSORS_DTYPES[dtype]]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return header, chance.randbytes(at)


def entry(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return header[chance.choice([name for name in header if name != "__metadata__"])]


def change_dtype(header: dict[str, Any], chance: random.Random) -> None:
    entry(header, chance)["dtype"] = chance.choice(DTYPES)


def change_shape(header: dict[str, Any], chance: random.Random) -> None:
    shape = entry(header, chance)["shape"]
    value = chance.choice([*NUMBERS, *ODD])
    if shape and chance.random() < 0.5:
        shape[chance.randrange(len(shape))] = value
    else:
        shape.insert(chance.randrange(len(shape) + 1), value)


def other_shape(header: dict[str, Any], chance: random.Random) -> None:
    entry(header, chance)["shape"] = chance.choice([*ODD, [0, 2**63, 4], [2**63, 4, 0], [0, 2**64], [], [1] * 70, 6])


def change_offset(header: dict[str, Any], chance: random.Random) -> None:
    entry(header, chance)["data_offsets"][chance.randrange(2)] = chance.choice([*NUMBERS, *ODD])


def other_offsets(header: dict[str, Any], chance: random.Random) -> None:
    entry(header, chance)["data_offsets"] = chance.choice([*ODD, [0], [0, 0, 0], [8, 0], {"a": 0, "b": 0}, "00"])


def shift(header: dict[str, Any], chance: random.Random) -> None:
    said = entry(header, chance)
    by = chance.choice([-1, 1, 4])
    said["data_offsets"] = [said["data_offsets"][0] + by, said["data_offsets"][1] + by]


def more_keys(header: dict[str, Any], chance: random.Random) -> None:
    entry(header, chance)[chance.choice(["extra", "Dtype", "data_offset"])] = chance.choice([*NUMBERS, *ODD])


def fewer_keys(header: dict[str, Any], chance: random.Random) -> None:
    del entry(header, chance)[chance.choice(["dtype", "shape", "data_offsets"])]


def no_entry(header: dict[str, Any], chance: random.Random) -> None:
    header[chance.choice([*header, "new"])] = chance.choice([*NUMBERS, *ODD])


def twin(header: dict[str, Any], chance: random.Random) -> None:
    header["twin"] = copy.deepcopy(entry(header, chance))


def notes(header: dict[str, Any], chance: random.Random) -> None:
    header["__metadata__"] = chance.choice(
        [*ODD, {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}, {"a": "b"}, 7]
    )


def forget(header: dict[str, Any], chance: random.Random) -> None:
    del header[chance.choice(list(header))]


IN_HEADER = [
    change_dtype,
    change_shape,
    other_shape,
    change_offset,
    other_offsets,
    shift,
    more_keys,
    fewer_keys,
    no_entry,
    twin,
    notes,
    forget,
]
IN_TEXT: list[Callable[[bytes, random.Random], bytes]] = [
    lambda text, chance: b"\xef\xbb\xbf" + text,
    lambda text, chance: text.decode().encode(chance.choice(["utf-16", "utf-16-le", "utf-32", "latin1"]), "replace"),
    lambda text, chance: (
        text + chance.choice([b" ", b"\n", b"\0", b"x", b"{}", b",", b"\t\r\n ", b"\x0b", b"\xc2\xa0"])
    ),
    lambda text, chance: chance.choice([b" ", b"\n", b"[", b"\0"]) + text,
    lambda text, chance: text.replace(b":0", chance.choice([b":-0", b":00", b":0.0", b":0e0", b":+0", b":0x0"]), 1),
    lambda text, chance: text.replace(b"[0", chance.choice([b"[-0", b"[00", b"[0.0", b"[0e0", b"[NaN", b"[ 0"]), 1),
    lambda text, chance: text.replace(b'"', b"'"),
    lambda text, chance: text[:-1] + b", " + text[1:],
    lambda text, chance: text[:-1] + b',"deep":' + b"[" * chance.choice([10, 200, 5000]) + b"]}",
    lambda text, chance: text[:-1] + b',"deep":' + b'{"a":' * 200_000,
    lambda text, chance: text.replace(b'"dtype":', b'"dtype":"F32","dtype":', 1),
    lambda text, chance: text.replace(b'{"', b'{"\\ud800', 1),
    lambda text, chance: text.replace(b'{"', b'{"\xed\xa0\x80', 1),
    lambda text, chance: text.replace(b'{"', b'{"\xff', 1),
    lambda text, chance: text.replace(b'{"', b'{"\n', 1),
    lambda text, chance: text.replace(b"}", b"/**/}", 1),
    lambda text, chance: text.replace(b"}", b",}", 1),
    lambda text, chance: b"",
    lambda text, chance: json.dumps([json.loads(text)]).encode(),
    lambda text, chance: changed(text, chance),
]


def changed(text: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, left out or put in."""
    data = bytearray(text)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(data))
        data[at : at + chance.randrange(3)] = bytes(chance.choices(b'0123456789"{}[]:,. -eEF\\untrl\x00\xff', k=1))
    return bytes(data)


def generated(number: int) -> bytes:
    """File number ``number``: a right one, changed somewhere."""
    chance = random.Random(number)
    header, data = good(chance)
    kind = number % 4
    if kind < 2:
        for _ in range(chance.randrange(1, 3)):
            try:
                chance.choice(IN_HEADER)(header, chance)
            except (KeyError, IndexError, TypeError, AttributeError):
                pass  # the change before left nothing to change
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=chance.random() < 0.5).encode("utf-8", "replace")
    if kind == 2:
        text = chance.choice(IN_TEXT)(text, chance)
    length = len(text)
    if kind == 3 and chance.random() < 0.7:
        length = chance.choice([0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1, 100_000_001])
        data = chance.choice([data, data[:-1], data + b"x", data * 2, b""])
    return struct.pack("<Q", length) + text + data


def ours(path: Path, data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What hf_files reads in the file; None: refused, in one line that names the file."""
    path.write_bytes(data)
    try:
        found = hf_files.read_header(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 1000
        return None
    return {t.name: (t.dtype, t.shape, data[t.offset : t.offset + t.size]) for t in found}


def the_library_s(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the safetensors library reads in it; None: refused."""
    try:
        found = safetensors.deserialize(data)
    except Exception as error:
        assert "safetensor" in f"{type(error)} {error}".lower(), error
        return None
    return {
        name: (hf_files.SAFETENSORS_DTYPES.get(said["dtype"], said["dtype"]), tuple(said["shape"]), bytes(said["data"]))
        for name, said in found
    }


def test_none_of_2000_generated_headers_is_accepted_wrongly(tmp_path):
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for number in range(COUNT):
        data = generated(number)
        mine, expected = ours(tmp_path / "model.safetensors", data), the_library_s(data)
        outcomes[mine is not None, expected is not None] += 1
        assert mine is None or mine == expected, number
        if mine is not None:  # a reading of our own: every byte after the header belongs to one tensor
            assert sum(len(part) for *_, part in mine.values()) == len(data) - 8 - struct.unpack("<Q", data[:8])[0]
    print({f"ours {a}, library {b}": n for (a, b), n in outcomes.items()})
    assert outcomes[True, False] == 0
    assert min(outcomes[True, True], outcomes[False, False]) > COUNT // 20  # both kinds are among them


def test_right_files_are_all_accepted(tmp_path):
    for number in range(200):
        header, data = good(random.Random(number))
        text = json.dumps(header, separators=(",", ":")).encode()
        file = struct.pack("<Q", len(text)) + text + data
        assert ours(tmp_path / "model.safetensors", file) == the_library_s(file) is not None


@pytest.mark.parametrize(
    "said",
    [
        '{"a":{"dtype":"F32","shape":{},"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[-0,2],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[0,99999999999999999999],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}',
        '{"__metadata__":{"a":1},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '\ufeff{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_what_python_s_json_takes_and_the_library_does_not_is_refused(said, tmp_path):
    text = said.encode()
    file = struct.pack("<Q", len(text)) + text + b"\0" * (0 if "[0,0]" in said else 4)
    assert the_library_s(file) is None
    assert ours(tmp_path / "model.safetensors", file) is None
