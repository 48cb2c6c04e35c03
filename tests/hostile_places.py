"""Where a pickle may lie in a checkpoint: each function puts one there and gives the folder to read."""

import pickle
from collections.abc import Callable
from pathlib import Path

import hostile
from hostile import Made, Named

from megapatch.tools.convert.convert import main as convert


def make_good(root: Path) -> Path:
    """A torch_dist checkpoint and a rank's file that pass, in folders core and legacy."""
    hostile.small_folder(root / "hf")
    assert convert(["--source", str(root / "hf"), "--target", str(root / "core")]) == 0
    (root / "core" / "release" / "manifest.json").unlink()
    hostile.rank_file(root / "legacy" / "mp_rank_00" / "model_optim_rng.pt", {"decoder.final_layernorm.weight": (32,)})
    return root


def in_metadata(root: Path, data: bytes) -> Path:
    (root / "core" / "release" / ".metadata").write_bytes(data)
    return root / "core"


def in_common(root: Path, data: bytes) -> Path:
    (root / "core" / "release" / "common.pt").write_bytes(hostile.saved(data))
    return root / "core"


def in_object(root: Path, data: bytes) -> Path:
    return object_of(root, hostile.saved(data))


def object_of(root: Path, file: bytes) -> Path:
    """An ``_extra_state`` with these bytes, in a file of its own."""
    import torch.distributed.checkpoint as dcp

    release = root / "core" / "release"
    metadata = dcp.FileSystemReader(release).read_metadata()
    (release / "evil.distcp").write_bytes(file)
    info = next(info for index, info in metadata.storage_data.items() if "_extra_state" in index.fqn)
    info.relative_path, info.offset, info.length = "evil.distcp", 0, len(file)
    (release / ".metadata").write_bytes(pickle.dumps(metadata))
    return root / "core"


def in_rank(root: Path, data: bytes) -> Path:
    (root / "legacy" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(hostile.saved(data))
    return root / "legacy"


def in_tensor_of_bytes(root: Path, data: bytes) -> Path:
    """As Transformer Engine keeps its state: a pickle in a tensor of bytes."""
    tensor = hostile.pickled(hostile.Tensor("0", (len(data),), "ByteStorage"))
    return object_of(root, hostile.saved(tensor, **{"data/0": data}))


def in_bytes_file(root: Path, data: bytes) -> Path:
    """As Transformer Engine keeps its state: torch.save in a BytesIO."""
    held = Made(Named("_io", "BytesIO"), state=(hostile.saved(data), 0, None))
    return object_of(root, hostile.saved(hostile.pickled([held])))


def in_bytes_as_they_are(root: Path, data: bytes) -> Path:
    """A BytesIO with these bytes."""
    return object_of(root, hostile.saved(hostile.pickled([Made(Named("_io", "BytesIO"), state=(data, 0, None))])))


def described(root: Path, change: Callable[[object], object]) -> Path:
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(root / "core" / "release").read_metadata()
    change(metadata)
    unlinked(root / "core" / "release" / ".metadata")
    (root / "core" / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    return root / "core"


def unlinked(path: Path) -> None:
    """Make a hard link a file of its own."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
