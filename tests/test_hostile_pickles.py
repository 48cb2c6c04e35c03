"""No pickle runs anything, wherever in a checkpoint it lies and whatever reads it: one line says what it names."""

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
from hostile import Made, Named
from hostile_payloads import HARMLESS, POTENT
from hostile_places import (
    in_bytes_as_they_are,
    in_bytes_file,
    in_common,
    in_metadata,
    in_object,
    in_rank,
    in_tensor_of_bytes,
    make_good,
    object_of,
    unlinked,
)

from megapatch.models import core_files, safe_pickle
from megapatch.models.cli import UserError
from megapatch.tools.convert.convert import main as convert
from megapatch.tools.convert.inspect_checkpoint import main as inspect


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


PLACES = (in_metadata, in_common, in_object, in_rank, in_tensor_of_bytes, in_bytes_file)


@pytest.mark.parametrize("name", POTENT)
def test_the_payloads_work_on_an_unpickler_that_runs_things(name, tmp_path):
    try:
        pickle.loads(POTENT[name](str(tmp_path / "trap")))
    except (pickle.UnpicklingError, TypeError, AttributeError, EOFError, IndexError):
        pass  # after the harm is done
    assert (tmp_path / "trap").exists()


CASES = [(name, place) for name in [*POTENT, *HARMLESS] for place in PLACES]
CASES.remove(("nothing", in_tensor_of_bytes))  # so a module without state saves


@pytest.mark.parametrize("name, place", CASES, ids=lambda case: getattr(case, "__name__", case))
def test_nothing_runs_and_one_line_tells(name, place, good, tmp_path, capsys):
    data = POTENT[name](str(tmp_path / "trap")) if name in POTENT else HARMLESS[name]
    root = shutil.copytree(good, tmp_path / "copy", copy_function=os.link)
    for path in (root / "core" / "release" / ".metadata", root / "core" / "release" / "common.pt"):
        unlinked(path)
    unlinked(root / "legacy" / "mp_rank_00" / "model_optim_rng.pt")
    source = place(root, data)
    capsys.readouterr()
    assert inspect([str(source), "--json"]) == 1
    told = capsys.readouterr()
    problems = [said for _, said in json.loads(told.out)["problems"]] if told.out else told.err.splitlines()
    assert any("nothing was run" in said or "damaged" in said for said in problems), problems
    assert told.err.count("\n") == (0 if told.out else 1)
    converted = convert(["--source", str(source), "--target", str(tmp_path / "out"), "--dry-run"])
    told = capsys.readouterr()
    assert converted == 0 or told.err.count("error:") == 1
    assert converted == 1 or place not in (in_metadata, in_rank)
    if source.name == "core":
        with pytest.raises(UserError) as refused:
            core_files.load_metadata_safely(source / "release")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "trap").exists()


def test_the_way_of_training_and_generation_refuses_before_core_reads(good, tmp_path):
    from megapatch.models.load import load_weights

    for number, (name, payload) in enumerate(POTENT.items()):
        for place in (in_metadata, in_common, in_object):
            root = shutil.copytree(good, tmp_path / f"{number}" / place.__name__)
            source = place(root, payload(str(tmp_path / "trap")))
            with pytest.raises(UserError, match=r"the pickle names|not a readable pickle"):
                load_weights([], source, {})
            assert not (tmp_path / "trap").exists(), name


def test_what_lies_nested_too_deeply_for_recursion_is_told_or_read():
    for data in (b"]" * 200_000 + b"a" * 199_999 + b".", b"}" * 100_000 + b".", b")" + b"\x85" * 300_000 + b"."):
        safe_pickle.load(data, "x")


def test_a_few_bytes_reserve_no_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in (2**31, 2**32 - 1):
        assert safe_pickle.load(b"Nr" + struct.pack("<I", place) + b".", "x") is None
    for data in HARMLESS.values():
        if len(data) < 1000:
            with pytest.raises(UserError):
                safe_pickle.load(data, "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_read_as_python_reads_them(protocol):
    value = {
        "numbers": [0, 1, 255, 256, 65536, -1, 2**31, -(2**40), 2**200, 1.5, True, False, None],
        "texts": ["", "ü", "x" * 300, "\N{SNOWMAN}" * 70_000, "two\nlines"],
        "bytes": [b"\0\xff" * 200] if protocol > 2 else [],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((1, (2,)),)],
        ("a", 1): {2: {}, None: [], 1.5: ()},
    }
    value["again"] = [value["numbers"], value["texts"]]
    assert safe_pickle.load(pickle.dumps(value, protocol), "x") == value


def test_random_bytes_and_damaged_pickles_never_end_in_another_error():
    import random

    chance = random.Random(5)
    good = hostile.pickled({"a": Made(Named("argparse", "Namespace"), state={"b": [1, "x", (2.5, None)]})})
    codes = b"(.NKMJGXhqjrc\x81R)t\x85\x86]ae}sub\x8c\x94\x93\x8f\x90\x91Q0"
    for _ in range(20_000):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = bytes(chance.choices(codes, k=chance.randrange(3)))
        try:
            safe_pickle.load(bytes(data), "x")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500


UNKNOWN = Named("megatron.training.new_things", "Fancy")


@pytest.mark.parametrize(
    "value",
    [
        Made(UNKNOWN, 3),
        UNKNOWN,
        Made(UNKNOWN, state={"deep": [Made(Named("transformer_engine.common.recipe", "Format"), 1)]}),
        Made(Named("builtins", "getattr"), UNKNOWN, "member"),
    ],
)
def test_classes_of_megatron_in_a_run_s_options_are_named_and_not_imported(value, good, tmp_path, capsys):
    options = Made(Named("argparse", "Namespace"), state={"x": value, "tensor_model_parallel_size": 1})
    known = {"attention_backend": Made(Named("megatron.core.transformer.enums", "AttnBackend"), 5)}
    known |= {"params_dtype": Named("torch", "bfloat16")}
    more = {"args": options, "known": Made(Named("argparse", "Namespace"), state=known)}
    path = hostile.rank_file(tmp_path / "c" / "mp_rank_00" / "model_optim_rng.pt", {"a.weight": (2,)}, **more)
    assert inspect([str(tmp_path / "c"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"]["safe"] is True and said["layout"]["tensor_model_parallel_size"] == 1
    assert "not imported: megatron.training.new_things.Fancy" in said["notes"][-1]
    assert said["layout"]["iteration"] == 7 and path.exists()


@pytest.mark.parametrize(
    "more, said",
    [
        ({"other": Made(UNKNOWN, 3)}, "names megatron.training.new_things.Fancy"),
        ({"other": [{"x": UNKNOWN}]}, "names megatron.training.new_things.Fancy"),
        ({"args": Made(Named("megatron.training.tools", "run"), 3)}, "names megatron.training.tools.run"),
        ({"args": Made(Named("megatron.training", "Fancy.method"), 3)}, "names megatron.training.Fancy.method"),
        ({"args": Made(Named("somewhere", "Fancy"), 3)}, "names somewhere.Fancy"),
        ({"args": Made(Named("posix", "system"), "true")}, "names posix.system"),
    ],
)
def test_other_names_are_refused_also_in_options(more, said, tmp_path, capsys):
    hostile.rank_file(tmp_path / "c" / "mp_rank_00" / "model_optim_rng.pt", {"a.weight": (2,)}, **more)
    assert inspect([str(tmp_path / "c"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["safe"] is False and said in found["problems"][-1][1]


def test_what_torch_saves_is_read_with_all_its_types():
    import torch

    value = {"f8": torch.ones(3).to(torch.float8_e4m3fn), "u16": torch.ones(2).to(torch.uint16), "x": io.BytesIO(b"ab")}
    file = io.BytesIO()
    torch.save(value, file)
    from megapatch.models.torch_save import Archive

    archive = Archive(file, 0, len(file.getvalue()), "x")
    found = archive.value()
    assert [archive.region(found[name])[:2] for name in ("f8", "u16")] == [("float8_e4m3fn", (3,)), ("uint16", (2,))]
    assert found["x"].content() == b"ab"


def empty_zip(before: bytes = b"", after: bytes = b"") -> bytes:
    """A harmless torch.save file with other bytes around it."""
    return before + hostile.saved(pickle.dumps([None], 2)) + after


def old_format(trap: str) -> bytes:
    """torch's format before zip files: four pickles one after the other, the first of them a number."""
    number, version, machine = 0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}
    return b"".join(pickle.dumps(part, 2) for part in (number, version, machine)) + POTENT["reduce, protocol 2"](trap)


def two_directories(trap: str) -> bytes:
    """A zip whose end names the directory of another one inside it: Python reads the last, others the named one."""
    evil, good = hostile.saved(POTENT["reduce, protocol 2"](trap)), hostile.saved(pickle.dumps([None], 2))
    return evil + good


def with_records(trap: str, **records: bytes) -> bytes:
    data = POTENT["reduce, protocol 2"](trap)
    return hostile.saved(pickle.dumps([None], 2), **{name: value or data for name, value in records.items()})


READ_OTHERWISE: dict[str, tuple[Callable[[str], bytes], str]] = {
    "an old file before a zip": (lambda t: empty_zip(old_format(t)), "does not start as a zip"),
    "junk before a zip": (lambda t: empty_zip(b"PK\3\4"), "its directory is not where its end says"),
    "junk after a zip": (lambda t: empty_zip(b"", b"x"), "its directory is not where its end says"),
    "a zip before a zip": (two_directories, "its directory is not where its end says"),
    "a comment": (lambda t: empty_zip()[:-2] + b"\1\0x", "its directory is not where its end says"),
    "names that differ in case": (lambda t: with_records(t, **{"DATA.PKL": b""}), "two records of one name"),
    "another folder": (lambda t: moved(with_records(t, **{"data/0": b""})), "records in several folders"),
    "TorchScript": (lambda t: with_records(t, **{"constants.pkl": b""}), "a record 'constants.pkl'"),
    "code": (lambda t: with_records(t, **{"code/x.py": b"x"}), "a record 'code/x.py'"),
}


def moved(file: bytes) -> bytes:
    """Record data/0 in a folder of its own."""
    return file.replace(b"archive/data/0", b"brchive/data/0")


@pytest.mark.parametrize("name", READ_OTHERWISE)
def test_a_file_that_torch_would_read_in_another_way_is_refused(name, good, tmp_path, capsys):
    make, said = READ_OTHERWISE[name]
    root = shutil.copytree(good, tmp_path / "copy")
    source = object_of(root, make(str(tmp_path / "trap")))
    with pytest.raises(UserError, match=said):
        core_files.load_metadata_safely(source / "release")
    capsys.readouterr()
    assert inspect([str(source), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"]["safe"] is False
    assert not (tmp_path / "trap").exists()


def test_torch_does_read_an_old_file_before_a_zip(tmp_path):
    import torch

    with pytest.raises((RuntimeError, TypeError, AttributeError, pickle.UnpicklingError)):
        torch.load(io.BytesIO(empty_zip(old_format(str(tmp_path / "trap")))), weights_only=False)
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("place", [in_tensor_of_bytes, in_bytes_as_they_are], ids=lambda place: place.__name__)
def test_an_old_file_in_a_module_s_state_is_refused(place, good, tmp_path):
    root = shutil.copytree(good, tmp_path / "copy")
    source = place(root, old_format(str(tmp_path / "trap")))
    with pytest.raises(UserError, match="more follows a pickle in a module's state"):
        core_files.load_metadata_safely(source / "release")


@pytest.mark.parametrize("shape", [(), (3,), (70_000,)])
def test_what_torch_and_this_project_write_is_not_taken_for_such_a_file(shape):
    import torch

    from megapatch.models import torch_save, torch_write

    file = io.BytesIO()
    torch.save({"a": torch.ones(shape), "b": io.BytesIO(b"x")}, file)
    blob = torch_write.tensor_blob("float32", shape)
    own = bytearray(blob.size)
    for at, data in blob.parts:
        own[at : at + len(data)] = data
    for data in (file.getvalue(), bytes(own)):
        assert torch_save.Archive(io.BytesIO(data), 0, len(data), "x").value() is not None
