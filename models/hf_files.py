"""Hugging Face model folders: safetensors headers read and written without the tensors; index.json; side files.

Imports no torch. Tensors are named by torch's dtypes; ``offset`` is a byte offset in the file.
"""

import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.commit import MANIFEST
from megapatch.models.links import refuse_outside
from megapatch.models.torch_save import ITEM_BYTES

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SAFETENSORS_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_HEADER_LIMIT_BYTES = 100_000_000  # as the safetensors library
_WEIGHTS = set(".safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .onnx .npz .ot .distcp".split())
_COUNTS = set(  # what config.json says of sizes, in all families
    "vocab_size hidden_size n_embd intermediate_size ffn_hidden_size n_inner moe_intermediate_size head_dim "
    "num_hidden_layers num_layers n_layer n_layers num_attention_heads n_head num_key_value_heads num_kv_heads "
    "num_experts num_local_experts n_routed_experts n_shared_experts num_experts_per_tok "
    "max_position_embeddings".split()
)
_LARGEST = 1 << 40
_MOST = dict.fromkeys("num_hidden_layers num_layers n_layer n_layers".split(), 4096)
_MOST |= dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 4096)
_NOTES = "__metadata__"
_TOO_MANY = 1 << 63
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Tensor:
    """A tensor and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """config.json of a Hugging Face folder."""
    refuse_outside(folder / name, folder)
    found = _json(folder / name)
    if not isinstance(found, dict):
        raise UserError(f"{folder / name}: a JSON {type(found).__name__}; expected an object")
    for key in _COUNTS & found.keys():
        count, most = found[key], _MOST.get(key, _LARGEST)
        if count is not None and (type(count) is not int or not 0 <= count <= most):
            raise UserError(f"{folder / name}: {key} is {str(count)[:40]!r}; expected a whole number up to {most}")
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors file or files; a folder that contradicts itself is a UserError."""
    weight_map = index(folder)
    if weight_map is None:
        path = folder / single(folder)
        refuse_outside(path, folder)
        return {t.name: t for t in read_header(path)}
    found: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: missing, but {INDEX} names it; get the model again")
        refuse_outside(folder / file, folder)
        for tensor in read_header(folder / file):
            if weight_map.get(tensor.name) != file:
                said = weight_map.get(tensor.name, "no file")
                raise UserError(f"{folder / file}: holds {tensor.name}, but {INDEX} gives {said} for it")
            found[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in found:
            raise UserError(f"{folder / INDEX}: names {name} in {file}, but that file does not hold it")
    return found


def index(folder: Path) -> dict[str, str] | None:
    """The weight map of a sharded folder, tensor name to name of a file in it; None when it has none."""
    path = folder / INDEX
    if not path.is_file():
        return None
    refuse_outside(path, folder)
    said = _json(path)
    weight_map = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: no weight_map; the file is damaged")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path}: {name} is said to be in {file!r}; expected a .safetensors file of this folder")
    return weight_map


def single(folder: Path) -> str:
    """The name of the safetensors file of a folder that has no index."""
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if found in ([SINGLE], []) or len(found) > 1:
        if SINGLE in found:
            return SINGLE
        raise UserError(
            f"{folder}: {'several .safetensors files and no ' + INDEX if found else 'no .safetensors file'}; "
            f"expected {SINGLE}, or {INDEX} and its files (save the model with save_pretrained)"
        )
    return found[0]


def read_header(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file, in the order of their bytes; a damaged file is a UserError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
        if not 0 < length <= min(_HEADER_LIMIT_BYTES, size - 8):
            said = f"header said to be {length}" if length >= 0 else "too short for a header"
            raise UserError(f"{path}: {size} bytes, {said}; not a safetensors file, or cut short: get it again")
        text = file.read(length)
    try:
        entries = {name: _entry(name, said) for name, said in _strict(text, path).items() if name != _NOTES}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = ascii(str(error))[1:-1][:200]
        raise UserError(f"{path}: the safetensors header is not readable ({said}); the file is damaged") from error
    at, found = 8 + length, []
    for name, (dtype, shape, start, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        tensor = Tensor(name, dtype, shape, path, 8 + length + start)
        if end - start != tensor.size:
            raise UserError(f"{path}: {name}: {end - start} bytes for {dtype} {list(shape)}; expected {tensor.size}")
        if tensor.offset != at:
            raise UserError(
                f"{path}: {name} starts at byte {tensor.offset}; expected {at}: tensors overlap or leave gaps"
            )
        at += tensor.size
        found.append(tensor)
    if at != size:
        raise UserError(f"{path}: {size} bytes in the file; the header says {at}: cut short, or changed; get it again")
    return found


def _strict(text: bytes, path: Path) -> dict[str, Any]:
    """A header read as the library reads it: UTF-8, no NaN, no -0, no name twice (Python's json takes all of them)."""

    def refuse(number: str) -> int:
        raise ValueError(f"a number {number[:20]}")

    header = json.loads(
        text.decode("utf-8"),
        object_pairs_hook=lambda pairs: _unique(pairs, path),
        parse_constant=refuse,
        parse_float=refuse,
        parse_int=lambda digits: refuse(digits) if digits.startswith("-") or len(digits) > 20 else int(digits),
    )
    if not text.startswith(b"{") or not isinstance(header, dict):
        raise ValueError("no JSON object")
    notes = header.get(_NOTES, {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError(f"{_NOTES} is not of text")
    "".join([*header, *notes, *notes.values()]).encode()  # a lone surrogate is no text
    return header


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = ascii(next(n for n in names if names.count(n) > 1))[1:-1]
        raise UserError(f"{path}: {twice} is in the header twice; the file is damaged")
    return made


def _entry(name: str, said: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape, (start, end) = said["dtype"], said["shape"], said["data_offsets"]
    if len(said) != 3 or type(shape) is not list or type(said["data_offsets"]) is not list:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets, not {', '.join(said)}")
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"{name}: unknown dtype {dtype!r}")
    if not all(type(n) is int and 0 <= n for n in (*shape, start, end)):
        raise ValueError(f"{name}: shape {shape}, offsets {start}, {end}")
    if prod(n for n in shape if n) * 8 >= _TOO_MANY or max(start, end) >= _TOO_MANY:
        raise ValueError(f"{name}: shape {shape} is of more bytes than there can be")
    return SAFETENSORS_DTYPES[dtype], tuple(shape), start, end


def header(described: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[int], int]:
    """(name, dtype, shape) of a file's tensors -> its header, the byte offset of each tensor, the file's size.

    In ``saved_order``, this is the header that the safetensors library writes, byte for byte.
    """
    names = {torch: name for name, torch in SAFETENSORS_DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, at = [], 0
    for name, dtype, shape in described:
        end = at + prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
        starts.append(at)
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, [first + start for start in starts], first + at


def saved_order(described: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The order in which the safetensors library lays out a file: wide dtypes first, then by name."""
    wide = ["float64", "float32", "bfloat16", "float16"]
    return sorted(described, key=lambda said: (wide.index(said[1]), said[0]))


def shards(sizes: Mapping[str, int], limit_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors: in order, each file within the limit (or one tensor)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, 1)}


def index_json(files: Mapping[str, Sequence[str]], sizes: Mapping[str, int], parameters: int) -> bytes:
    """index.json as transformers writes it."""
    said = {
        "metadata": {"total_parameters": parameters, "total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    return (json.dumps(said, indent=2, sort_keys=True) + "\n").encode()


def side_files(folder: Path) -> dict[str, Path]:
    """Name -> path of config, tokenizer and the like: all but weights, their index, manifest and hidden files."""
    return {path.relative_to(folder).as_posix(): path for path in _side_files(folder)}


def _side_files(folder: Path) -> Iterator[Path]:
    for path in sorted([*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*.jinja")]):
        named = path.name == MANIFEST or path.name.startswith(".") or path.name.endswith(".index.json")
        if named or path.suffix in _WEIGHTS or not path.is_file():
            continue
        refuse_outside(path, folder)
        yield path


def copy_side_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and other small files of a model folder into ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    for name, path in side_files(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; expected a Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
