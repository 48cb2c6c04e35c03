"""What was found in a folder of weights: its tensors, what it says of itself, and what is wrong with it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from megapatch.models.cli import UserError
from megapatch.models.torch_save import ITEM_BYTES


class Item(NamedTuple):
    """A tensor; ``parts`` of it lie apart (chunks), the first of them in ``file``; ``state``: not a weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    parts: int = 1
    state: bool = False

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass
class Contents:
    """A folder, told before it is judged. ``problems``: (complete or safe, what is wrong)."""

    kind: str
    folder: Path
    items: list[Item] = field(default_factory=list)
    objects: int = 0
    layout: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    foreign: set[str] = field(default_factory=set)  # classes in the options of a run, not known here
    problems: list[tuple[str, str]] = field(default_factory=list)

    def attempt(self, verdict: str, step: Callable[..., Any], *arguments: Any) -> Any:
        """What ``step`` gives; its complaint becomes a problem of this verdict, and None is given."""
        try:
            return step(*arguments)
        except UserError as error:
            self.problems.append((verdict, str(error)))
            return None
