"""Options of mp-pretrain about data: what is trained on, and what it is validated and tested with."""

from dataclasses import dataclass
from typing import Optional

from megapatch.models.cli import UserError, opt

SPLIT = "98,2,0"
PARTS = ("training", "validation", "test")
Shares = list[tuple[float, float] | None]  # of documents, in parts of 1: first and last place for each of PARTS
FILES = "instead of --{}-data-path: files, or a blend"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Pairs of .bin and .idx, or files of text, and how they are divided."""

    data_path: list[str] = opt(
        "prefixes of .bin/.idx pairs, or a blend: WEIGHT PREFIX WEIGHT PREFIX ...", [], nargs="+", metavar="PREFIX"
    )
    data: list[str] = opt(
        "instead of --data-path, for small runs: files of text as mp-preprocess reads them (JSON lines with the key "
        '"text", .txt; also compressed), or a blend: WEIGHT FILE WEIGHT FILE ...; they become tokens once, in '
        "--data-cache-path",
        [],
        nargs="+",
        metavar="FILE",
    )
    valid_data_path: list[str] = opt(
        "prefixes, or a blend, to validate with; --data-path is then for training alone, and --split does not apply",
        [],
        nargs="+",
        metavar="PREFIX",
    )
    valid_data: list[str] = opt(FILES.format("valid"), [], nargs="+", metavar="FILE")
    test_data_path: list[str] = opt(
        "prefixes, or a blend, for an evaluation after the last step, over --eval-iters global batches",
        [],
        nargs="+",
        metavar="PREFIX",
    )
    test_data: list[str] = opt(FILES.format("test"), [], nargs="+", metavar="FILE")
    split: Optional[str] = opt(
        f"shares of --data-path for training, validation, test, by the order of documents (default: {SPLIT}); a third "
        "share is for an evaluation after the last step",
        None,
    )
    workers: Optional[int] = opt(
        "for --data: processes that read it (default: the cores this process may use)", None, metavar="NUMBER"
    )

    def refuse_data(self) -> None:
        """Refuse what excludes each other (ValueError)."""
        files = self.data or self.valid_data or self.test_data
        refused = {
            "give one of --data-path (made by mp-preprocess) and --data (files of text)": (
                bool(self.data_path) == bool(self.data)
            ),
            "--valid-data-path and --valid-data: give one": bool(self.valid_data_path and self.valid_data),
            "--test-data-path and --test-data: give one": bool(self.test_data_path and self.test_data),
            "--split and --valid-data-path: give one; with the latter, all of --data-path is trained on": (
                self.split is not None and self.validates_apart
            ),
            "--workers is for --data; give it to mp-preprocess": self.workers is not None and not files,
        }
        for message in (text for text, wrong in refused.items() if wrong):
            raise ValueError(message)

    @property
    def validates_apart(self) -> bool:
        """Are there data of their own to validate with?"""
        return bool(self.valid_data_path or self.valid_data)

    @property
    def tests_apart(self) -> bool:
        """Are there data of their own to test with?"""
        return bool(self.test_data_path or self.test_data)

    @property
    def tests(self) -> bool:
        """Is there an evaluation after the last step?"""
        return self.tests_apart or self.shares()[2] is not None

    def shares(self) -> Shares:
        """The shares of --data-path, or --data, for each of PARTS; None for none (UserError where it is no split)."""
        if self.validates_apart:
            return [(0.0, 1.0), None, None]
        split = self.split or SPLIT
        try:
            parts = [float(part) for part in split.split(",")]
        except ValueError:
            parts = []
        if not 1 <= len(parts) <= len(PARTS) or min(parts) < 0 or not 0 < sum(parts) < float("inf"):
            raise UserError(f"--split {split}: expected up to three shares with commas between, like {SPLIT}")
        if not parts[0]:
            raise UserError(f"--split {split}: leaves nothing to train on")
        if self.tests_apart and parts[2:] not in ([], [0.0]):
            raise UserError(f"--split {split}: its third share and --test-data-path, or --test-data: give one")
        ends = [sum(parts[:i]) / sum(parts) for i in range(len(parts) + 1)]
        found: Shares = [(ends[i], ends[i + 1]) if part else None for i, part in enumerate(parts)]
        return [*found, None, None][: len(PARTS)]
