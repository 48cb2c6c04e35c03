"""Upstream functions replaced at run time, each guarded by a hash of the source it was written for.

megatron-core is never edited. A changed upstream is refused with a message that names the patch, so that an upgrade
lists exactly what has to be read again.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from megapatch.models.cli import UserError


@dataclass(frozen=True)
class Upstream:
    """A function of upstream, ``target`` ("module:Class.method"), on which we rely as the source with this hash has it.

    Its module may promise nothing of it: one that only upstream itself is meant to call.
    """

    target: str
    source_hash: str
    reason: str

    def owner(self) -> tuple[Any, str]:
        """The object that holds the target, and the attribute's name in it."""
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        return reduce(getattr, parents, importlib.import_module(module)), name

    def function(self) -> Any:
        """The function; a changed upstream is a UserError."""
        owner, name = self.owner()
        upstream = getattr(owner, name)
        found = source_hash(upstream)
        if found != self.source_hash:
            raise UserError(
                f"{self.target}: changed upstream (source hash {found}, expected {self.source_hash}); "
                f"install megatron-core 0.16.1, or review what relies on it: {self.reason}"
            )
        return upstream


@dataclass(frozen=True)
class Patch:
    """Replace ``target`` ("module:Class.method") by ``replacement``, written for the upstream source with this hash."""

    target: str
    replacement: Callable[..., Any]
    source_hash: str
    reason: str

    @property
    def upstream(self) -> Upstream:
        """What is replaced."""
        return Upstream(self.target, self.source_hash, self.reason)

    def apply(self) -> None:
        """Put the replacement in place (again is harmless); a changed upstream is a UserError."""
        owner, name = self.upstream.owner()
        if getattr(owner, name) is self.replacement:
            return
        self.upstream.function()
        setattr(owner, name, self.replacement)


def source_hash(function: Callable[..., Any]) -> str:
    """First 12 hex digits of the SHA-256 of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]


def apply(patches: Sequence[Patch]) -> None:
    """Apply every patch."""
    for patch in patches:
        patch.apply()
