"""Pickles that would make a folder if anything in them ran, and others that no checkpoint holds."""

import functools
import os
import pickle
import struct
import subprocess
from collections.abc import Callable

import hostile
from hostile import Evil, Made, Named, text

MKDIR = b"cposix\nmkdir\n"
NAMESPACE = b"cargparse\nNamespace\n)R"
# what Python's own unpickler runs: each makes the folder whose path it is given
POTENT: dict[str, Callable[[str], bytes]] = {
    "reduce": lambda t: pickle.dumps(Evil(os.mkdir, t)),
    "reduce, protocol 2": lambda t: pickle.dumps(Evil(os.mkdir, t), 2),
    "reduce, protocol 0": lambda t: MKDIR + b"(S" + repr(t).encode() + b"\ntR.",
    "os.system": lambda t: pickle.dumps(Evil(os.system, f"mkdir {t}")),
    "subprocess": lambda t: pickle.dumps(Evil(subprocess.run, ["mkdir", t])),
    "eval": lambda t: pickle.dumps(Evil(eval, f"__import__('os').mkdir({t!r})")),
    "exec": lambda t: pickle.dumps(Evil(exec, f"import os; os.mkdir({t!r})")),
    "getattr of a module": lambda t: (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n("
        + text("os")
        + b"tR"
        + text("mkdir")
        + b"tR("
        + text(t)
        + b"tR."
    ),
    "getattr of an allowed class": lambda t: (
        b"cbuiltins\ngetattr\n(cpathlib\nPath\n" + text("mkdir") + b"tR(cpathlib\nPath\n(" + text(t) + b"tRtR."
    ),
    "getattr of a value": lambda t: (
        b"cbuiltins\ngetattr\n(cpathlib\nPath\n(" + text(t) + b"tR" + text("mkdir") + b"tR)R."
    ),
    "a method of an allowed class": lambda t: (
        b"\x80\x04" + text("pathlib") + text("Path.mkdir") + b"\x93(cpathlib\nPath\n(" + text(t) + b"tRtR."
    ),
    "a module inside an allowed one": lambda t: (
        b"\x80\x04" + text("argparse") + text("_os.mkdir") + b"\x93(" + text(t) + b"tR."
    ),
    "names from the memo": lambda t: (
        b"\x80\x04" + text("mkdir") + b"q\0" + text("posix") + b"q\1h\1h\0\x93(" + text(t) + b"tR."
    ),
    "a name in the memo": lambda t: (
        b"\x80\x04" + MKDIR + b"r\xff\0\0\0(" + text(t) + b"tRj\xff\0\0\0(" + text("x") + b"l."
    ),
    "INST": lambda t: b"(" + text(t) + b"iposix\nmkdir\n.",
    "OBJ": lambda t: b"(" + MKDIR + text(t) + b"o.",
    "NEWOBJ of a class": lambda t: b"cfunctools\npartial\n(" + MKDIR + text(t) + b"t\x81)R.",
    "NEWOBJ_EX": lambda t: pickle.dumps(Evil(functools.partial(os.mkdir, t)), 4),
    "BUILD with __setstate__": lambda t: NAMESPACE + b"}(" + text("__setstate__") + MKDIR + b"ub" + text(t) + b"b.",
    "io.open": lambda t: b"cio\nopen\n(" + text(t) + text("w") + b"tR.",
    "inside a list": lambda t: pickle.dumps([[{"x": (Evil(os.mkdir, t),)}]]),
    "as a key": lambda t: b"}(" + MKDIR + b"(" + text(t) + b"tRK\1u.",
    "inside options": lambda t: hostile.pickled({"args": Made(Named("argparse", "Namespace"), state={"x": evil(t)})}),
    "a tensor rebuilt by a function of its choice": lambda t: (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + MKDIR + b"cbuiltins\nint\n(" + text(t) + b"t}tR."
    ),
    "an array of objects": lambda t: (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\1btR(K\1(K\1tcnumpy\ndtype\n("
        + text("O")
        + b"\x89\x88tR\x89]("
        + MKDIR
        + b"("
        + text(t)
        + b"tRetb."
    ),
    "the last of many names": lambda t: hostile.pickled({"x": [0] * 1000, "y": evil(t)}),
}
# what is no pickle that a checkpoint holds, though nothing in it could run
HARMLESS: dict[str, bytes] = {
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT4": b"\x80\x02\x84\x01\0\0\0.",
    "persistent id of text": b"Px\n.",
    "persistent id of a value": b"K\1Q.",
    "persistent id that names no storage": b"(" + text("storage") + b"K\1" + b"K\1" * 3 + b"tQ.",
    "LONG4 of 2 GiB": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "LONG4 of less than nothing": b"\x8b" + struct.pack("<i", -5) + b"x.",
    "an integer of 100 kB": b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b".",
    "BINBYTES8 of 2**62": b"\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "BINBYTES8 of 2**36": b"\x8e" + struct.pack("<Q", 1 << 36) + b"x.",
    "BINUNICODE8 of 2**63": b"\x8d" + struct.pack("<Q", 1 << 63) + b"x.",
    "BYTEARRAY8 of 2**40": b"\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "BINUNICODE of 4 GiB": b"X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "a buffer from outside": b"\x97.",
    "a tuple nested 300,000 times as a key": b"}" + b")" + b"\x85" * 300_000 + b"K\1s.",
    "a tuple nested 300,000 times in a set": b"\x8f(" + b")" + b"\x85" * 300_000 + b"\x90.",
    "a name nested 300,000 times": b"}ctorch.distributed.checkpoint.metadata\nMetadataIndex\n("
    + text("x") + b")" + b"\x85" * 300_000 + b"tRK\1s.",
    "300,000 marks": b"(" * 300_000,
    "an unhashable key": b"}]K\1s.",
    "a key without value": b"}(K\1u.",
    "attributes without names": NAMESPACE + b"}K\1K\1sb.",
    "a call of a value": b"K\1)R.",
    "a call of a type of numbers": b"ctorch\nbfloat16\n)R.",
    "arguments that are a list": b"cargparse\nNamespace\n]R.",
    "attributes for a number": b"K\1}b.",
    "items for a number": b"K\1K\1a.",
    "an enumeration's hidden name": b"cbuiltins\ngetattr\n(csignal\nSignals\n" + text("__class__") + b"tR.",
    "an empty stack": b"0.",
    "nothing": b"",
    "no end": b"N",
    "junk": b"\xff" * 50,
    "text that is none": b"X\2\0\0\0\xff\xfe.",
    "too many names": b"\x93.",
    "a memo that is empty": b"h\x05.",
}  # fmt: skip


def evil(trap: str) -> Made:
    return Made(Named("posix", "mkdir"), trap)
