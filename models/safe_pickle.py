"""Pickles read without running anything, and written without importing what they name. Imports no torch.

A torch_dist checkpoint describes itself in pickles, and a pickle may name any function to call. Here every name is
looked up in ALLOWED: a passive stand-in comes back, nothing is imported, and another name is a UserError.
"""

import collections
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from megapatch.models.cli import UserError


class Record:
    """Stands in for an object: ``args`` of its constructor, ``fields`` by name, and what else the pickle sets."""

    fields: tuple[str, ...] = ()
    args: tuple[Any, ...] = ()

    def __new__(cls, *args: Any, **_: Any) -> "Record":
        made = super().__new__(cls)
        made.args = args
        made.__dict__.update(zip(cls.fields, args, strict=False))
        return made

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        elif isinstance(state, tuple):
            self.__dict__.update(zip(self.fields, state, strict=False))


class Index(Record):
    """Stands in for torch's MetadataIndex: which tensor (fqn), and the offsets of the chunk in it."""

    fields = ("fqn", "offset", "index")
    fqn: str = ""
    offset: tuple[int, ...] | None = None

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and (self.fqn, self.offset) == (other.fqn, other.offset)


class Storage(Record):
    """Stands in for a torch storage: ``args`` as torch.save wrote them."""


class StoredTensor(Record):
    """Stands in for a tensor: ``args`` are storage, storage offset, shape, strides, ..."""


class Enumeration(Record):
    """Stands in for a member of an enumeration, or for the class."""


def _member(owner: Any, name: Any) -> Enumeration:
    """What ``getattr`` may do: name a member of an enumeration (so Python 3.11.0 to 3.11.3 pickle one)."""
    if not (isinstance(owner, type) and issubclass(owner, Enumeration)) or str(name).startswith("_"):
        raise ValueError(f"an attribute {name!r} that no checkpoint needs")
    return Enumeration(name)


def _first(value: Any = None, *_: Any) -> Any:
    return value


def _record(fields: str) -> type[Record]:
    return type("Record", (Record,), {"fields": tuple(fields.split())})


def _names(module: str, names: str, stand_in: Any) -> dict[tuple[str, str], Any]:
    return {(module, name): stand_in for name in names.split()}


DTYPES = (
    "bfloat16 float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool float8_e4m3fn float8_e5m2"
)
STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_CORE, _DCP = "megatron.core.", "torch.distributed.checkpoint."
ALLOWED: dict[tuple[str, str], Any] = {
    # classes without behaviour, and functions that only build values
    **_names("builtins", "set frozenset slice complex bytearray", Record),
    **_names("__builtin__", "set frozenset slice complex bytearray", Record),  # the same in protocol 2
    **_names("collections", "OrderedDict", collections.OrderedDict),
    **_names("argparse", "Namespace", Record),
    **_names("types", "SimpleNamespace", Record),
    **_names("pathlib", "Path PosixPath PurePosixPath", Record),
    **_names("pathlib._local", "Path PosixPath PurePosixPath", Record),  # Python 3.13
    **_names("io", "BytesIO", Record),
    **_names("_io", "BytesIO", Record),
    **_names("builtins", "getattr", _member),
    **_names("__builtin__", "getattr", _member),
    **_names("signal", "Signals", Enumeration),
    **_names("_codecs", "encode", Record),
    **_names("numpy", "ndarray dtype", Record),
    **_names("numpy.dtypes", "UInt32DType", Record),
    **_names("numpy.core.multiarray", "_reconstruct", Record),
    **_names("numpy._core.multiarray", "_reconstruct", Record),
    # torch: tensors, and the description of a distributed checkpoint
    **{("torch", name): name for name in DTYPES.split()},
    **{("torch", storage): dtype for storage, dtype in STORAGES.items()},
    **_names("torch", "Size", _first),
    **_names("torch", "device", Record),
    **_names("torch._utils", "_rebuild_tensor_v2", StoredTensor),
    **_names("torch._utils", "_rebuild_parameter", _first),
    **_names("torch.serialization", "_get_layout", _first),
    **_names(_DCP + "metadata", "MetadataIndex", Index),
    **_names(_DCP + "metadata", "Metadata", _record("state_dict_metadata planner_data storage_data")),
    **_names(_DCP + "metadata", "TensorStorageMetadata", _record("properties size chunks")),
    **_names(_DCP + "metadata", "ChunkStorageMetadata", _record("offsets sizes")),
    **_names(_DCP + "metadata", "TensorProperties", _record("dtype")),
    **_names(_DCP + "metadata", "BytesStorageMetadata StorageMeta", Record),
    **_names(_DCP + "metadata", "_MEM_FORMAT_ENCODING", Enumeration),
    **_names(_DCP + "filesystem", "_StorageInfo", _record("relative_path offset length transform_descriptors")),
    **_names(_DCP + "planner", "SavePlan WriteItem TensorWriteData", Record),
    **_names(_DCP + "planner", "WriteItemType", Enumeration),
    # what megatron-core registers as safe (core/safe_globals.py)
    **_names(_CORE + "dist_checkpointing.strategies.torch", "MCoreMetadata MCoreSavePlan", Record),
    **_names(_CORE + "enums", "ModelType", Enumeration),
    **_names(_CORE + "transformer.enums", "AttnBackend CudaGraphScope", Enumeration),
    **_names(_CORE + "optimizer.optimizer_config", "OptimizerConfig", Record),
    **_names(_CORE + "rerun_state_machine", "RerunDiagnostic RerunMode RerunState", Enumeration),
}


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, where: str, persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self.where, self.persistent = where, persistent

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise UserError(
                f"{self.where}: the pickle names {module}.{name}, which no checkpoint needs; "
                "nothing was run; do not load this checkpoint"
            ) from None

    def persistent_load(self, saved: Any) -> Any:
        if self.persistent is None:
            raise UserError(f"{self.where}: the pickle refers to outside data; the file is damaged")
        return self.persistent(saved)


def load(data: bytes, where: str, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value of a pickle, made of plain values and stand-ins; ``where`` names the file in errors (UserError)."""
    try:
        return _Reader(data, where, persistent).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way; none of them runs anything
        raise UserError(f"{where}: not a readable pickle ({error}); the file is damaged") from error


@dataclass(frozen=True)
class Global:
    """A module's attribute, written by name."""

    module: str
    name: str

    def __call__(self, *args: Any) -> "Call":
        return Call(self, args)


@dataclass(frozen=True)
class Call:
    """What a Global gives for arguments, to be called by the reader."""

    function: Global
    args: tuple[Any, ...]


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

    def persistent_id(self, value: Any) -> Any:
        return value.value if isinstance(value, Persistent) else None

    dispatch[Global] = save_global_name
    dispatch[Call] = save_call


def dump(value: Any) -> bytes:
    """The pickle (protocol 2, which torch's weights_only reader understands) of plain values and Calls."""
    file = io.BytesIO()
    _Writer(file, 2).dump(value)
    return file.getvalue()
