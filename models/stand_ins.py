"""What the names in a checkpoint's pickles may stand for: passive values. Imports no torch, and none of the names."""

import collections
from collections.abc import Callable
from typing import Any

_KEY_DEPTH, _KEY_ITEMS = 2, 32  # a tuple of tuples that are one and the same takes few bytes, and long to hash
_PLAIN = (str, int, float, bool, bytes, type(None))


class Damaged(Exception):
    """The data are no pickle that a checkpoint may hold."""


class Record:
    """Stands in for an object: ``args`` of its constructor, ``fields`` by name, and what else the pickle sets."""

    fields: tuple[str, ...] = ()

    def __init__(self, *args: Any) -> None:
        self.args: tuple[Any, ...] = args
        self.__dict__.update(zip(self.fields, args, strict=False))

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> "Record":
        """The same as cls(*args), without a copy of args, which a pickle may name again and again."""
        made = object.__new__(cls)
        made.args = args
        if args:
            made.__dict__.update(zip(cls.fields, args, strict=False))
        return made

    def set_state(self, state: Any) -> None:
        """What the pickle says of the object after it was made: {name: value}, or the values of ``fields``."""
        if isinstance(state, dict):
            if not all(type(name) is str for name in state):
                raise Damaged("an attribute whose name is no text")
            self.__dict__.update(state)
        elif isinstance(state, tuple):
            self.__dict__.update(zip(self.fields, state, strict=False))

    def is_key(self) -> bool:
        """May it be a key of a dictionary?"""
        return True


class Opaque(Record):
    """Stands in for an object of a class of which only the ``name`` is known; what it holds is not kept."""

    name = ""

    def set_state(self, state: Any) -> None:
        """Nothing is kept."""


class Maker:
    """Stands in for a function: ``make`` of the tuple of its arguments gives the value."""

    def __init__(self, make: Callable[[tuple[Any, ...]], Any]) -> None:
        self.make = make


def is_key(value: Any, depth: int = _KEY_DEPTH) -> bool:
    """May it be hashed? Python does so by recursion, without a limit."""
    if isinstance(value, tuple):
        return depth > 0 and len(value) <= _KEY_ITEMS and all(is_key(item, depth - 1) for item in value)
    return type(value) in _PLAIN or (isinstance(value, Record) and value.is_key())


class Index(Record):
    """Stands in for torch's MetadataIndex: which tensor (fqn), and the offsets of the chunk in it."""

    fields = ("fqn", "offset", "index")
    fqn: str = ""
    offset: tuple[int, ...] | None = None

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and (self.fqn, self.offset) == (other.fqn, other.offset)

    def is_key(self) -> bool:
        """Yes, where it is as torch makes it."""
        return type(self.fqn) is str and (self.offset is None or is_key(self.offset, 1))


class Storage(Record):
    """Stands in for a torch storage: ``args`` as torch.save wrote them."""


class StoredTensor(Record):
    """Stands in for a tensor: ``args`` are storage, storage offset, shape, strides, ..."""


class BytesFile(Record):
    """Stands in for io.BytesIO."""

    fields = ("data", "position")
    data: Any = b""

    def content(self) -> bytes:
        """What it holds; a pickle of protocol 2 writes bytes as text."""
        held = self.data
        if isinstance(held, Encoded):
            held = held.args[0] if type(held.args) is tuple and held.args else None
        if type(held) is str and all(ord(letter) < 256 for letter in held):
            return held.encode("latin1")
        if type(held) is not bytes:
            raise Damaged("a BytesIO of something else than bytes")
        return held


class Encoded(Record):
    """Stands in for bytes that protocol 2 writes as text in latin1."""


class Enumeration(Record):
    """Stands in for a member of an enumeration, or for the class."""


def _member(args: tuple[Any, ...]) -> Enumeration:
    """What ``getattr`` may do: name a member of an enumeration (so Python 3.11.0 to 3.11.3 pickle one)."""
    owner, name = args
    known = isinstance(owner, type) and issubclass(owner, Enumeration | Opaque)
    if not known or type(name) is not str or name.startswith("_"):
        raise Damaged("an attribute that no checkpoint needs")
    return owner(name)


def _first(args: tuple[Any, ...]) -> Any:
    return args[0] if args else None


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
    **_names("__builtin__", "bytes", Maker(lambda args: b"")),  # empty ones in protocol 2
    **_names("builtins", "getattr", Maker(_member)),
    **_names("__builtin__", "getattr", Maker(_member)),
    **_names("collections", "OrderedDict", Maker(lambda args: collections.OrderedDict())),
    **_names("argparse", "Namespace", Record),
    **_names("types", "SimpleNamespace", Record),
    **_names("pathlib", "Path PosixPath PurePosixPath", Record),
    **_names("pathlib._local", "Path PosixPath PurePosixPath", Record),  # Python 3.13
    **_names("io", "BytesIO", BytesFile),
    **_names("_io", "BytesIO", BytesFile),
    **_names("signal", "Signals", Enumeration),
    **_names("_codecs", "encode", Encoded),
    **_names("numpy", "ndarray dtype", Record),
    **_names("numpy.dtypes", "UInt32DType", Record),
    **_names("numpy.core.multiarray", "_reconstruct", Record),
    **_names("numpy._core.multiarray", "_reconstruct", Record),
    # torch: tensors, and the description of a distributed checkpoint
    **{("torch", name): name for name in DTYPES.split()},
    **{("torch", storage): dtype for storage, dtype in STORAGES.items()},
    **_names("torch.storage", "UntypedStorage", "uint8"),
    **_names("torch", "Size", Maker(_first)),
    **_names("torch", "device", Record),
    **_names("torch._utils", "_rebuild_tensor_v2 _rebuild_tensor_v3", StoredTensor),
    **_names("torch._utils", "_rebuild_parameter", Maker(_first)),
    **_names("torch.serialization", "_get_layout", Maker(_first)),
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
