"""Files of a few bytes that ask for much: for memory, or for as many steps as there are atoms. One line tells."""

import shutil
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
from hostile import Made, Named, text
from hostile_places import described, in_common, in_rank, make_good, object_of

from megapatch.models import core_files
from megapatch.models.cli import UserError
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.convert.inspect_checkpoint import main as inspect


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


def doubled(depth: int = 60) -> bytes:
    """A list of two lists that are one and the same, and so on: a few bytes, 2**depth numbers when spelled out."""
    return b"]K\1a" + b"q\0]h\0ah\0a" * depth


def wide(depth: int = 3) -> bytes:
    """A tuple of a thousand tuples that are one and the same, and so on."""
    return b")" + b"q\0(" + b"h\0" * 1000 + b"t" + (b"q\0(" + b"h\0" * 1000 + b"t") * (depth - 1)


BOMBS: dict[str, Callable[[Path], Path]] = {
    "iteration in common.pt": lambda r: in_common(r, b"}" + text("iteration") + doubled() + b"s."),
    "a key in common.pt": lambda r: in_common(r, b"}" + wide() + b"K\1s."),
    "checkpoint_version": lambda r: in_rank(
        r, b"}(" + text("model") + b"}" + text("checkpoint_version") + doubled() + b"u."
    ),
    "the model of a rank": lambda r: in_rank(r, b"}" + text("model") + doubled() + b"s."),
    "options": lambda r: in_rank(r, b"}(" + text("model") + b"}" + text("args") + doubled() + b"u."),
    "a BytesIO of a trillion": lambda r: object_of(
        r, hostile.saved(hostile.pickled([Made(Named("_io", "BytesIO"), state=(10**12, 0, None))]))
    ),
    "a BytesIO of other text": lambda r: object_of(
        r,
        hostile.saved(
            hostile.pickled([Made(Named("_io", "BytesIO"), state=(Made(Named("_codecs", "encode"), "\u20ac"), 0))])
        ),
    ),
    "sizes": lambda r: described(r, lambda m: vars(first(m)).update(size=nested(60))),
    "a chunk's offsets": lambda r: described(r, lambda m: vars(first(m).chunks[0]).update(offsets=nested(60))),
    "how it is stored": lambda r: described(
        r, lambda m: vars(next(iter(m.storage_data.values()))).update(transform_descriptors=nested(60))
    ),
    "a tensor of 2**60 layers": lambda r: described(r, lambda m: grown(m)),
}


def nested(depth: int) -> tuple:
    """As ``doubled``, as tuples."""
    value: tuple = (1,)
    for _ in range(depth):
        value = (value, value)
    return value


def first(metadata: object) -> object:
    return metadata.state_dict_metadata["decoder.layers.self_attention.linear_qkv.weight"]


def grown(metadata: object) -> None:
    vars(first(metadata))["size"] = (1 << 60, 128, 32)
    vars(first(metadata).chunks[0])["sizes"] = (1 << 60, 128, 32)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_take_no_time(name, good, tmp_path, capsys):
    source = BOMBS[name](shutil.copytree(good, tmp_path / "copy"))
    capsys.readouterr()
    status = inspect([str(source), "--json"])
    assert status in (0, 1) and capsys.readouterr().err.count("\n") <= 1
    assert status == 1 or name in ("iteration in common.pt", "checkpoint_version", "options")  # which are not needed
    converted = convert(["--source", str(source), "--target", str(tmp_path / "out"), "--dry-run"])
    assert capsys.readouterr().err.count("error:") == converted
    if source.name == "core" and status and name != "a tensor of 2**60 layers":  # which no model asks for
        with pytest.raises(UserError) as error:
            core_files.load_metadata_safely(source / "release")
        assert len(str(error.value)) < 1000
