"""mp-families: the architectures there are, as a table."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

from megapatch.models import families, family
from megapatch.models.cli import Common, UserError, opt, run
from megapatch.models.commit import staged_file

log = logging.getLogger(__name__)
EXAMPLES = """examples:
  mp-families
  mp-families --json | grep '"experts": true'
  mp-families --measured differences.jsonl --update README.md   # what scripts/architectures.sh does"""
BEGIN, END = "<!-- made by scripts/architectures.sh -->", "<!-- end of what it made -->"
POSITIONS = {"rope": "RoPE", "learned_absolute": "learned positions", "none": "ALiBi"}
HEAD = ("`model_type`", "models", "kind", "lines", "largest difference of a logit")


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Show every architecture: which models have it, of what kind it is, and how many lines its file has.

    The kind is that of the family's smallest model, in its file; published models of one family may differ in it. With
    --measured, also how far the logits of that model are from the reference's (transformers, or plain PyTorch).
    """

    json: bool = opt("print JSON lines, not a Markdown table", False)
    measured: Optional[Path] = opt(
        "JSON lines with model_type and max_abs_diff, one for each family, from tests/bench/architectures.py", None
    )
    update: Optional[Path] = opt("put the table into this file, between the two marks, instead of printing it", None)

    def __post_init__(self) -> None:
        if self.json and self.update:
            raise ValueError("--update writes a table; leave out --json")


@dataclass(frozen=True)
class Row:
    """What is told of a family."""

    model_type: str
    models: str
    experts: bool
    heads: str  # MLA, or by how many query heads share a key head: MHA none, GQA some, MQA all
    positions: str
    lines: int
    max_abs_diff: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """Of the Markdown table."""
        kind = f"{'experts' if self.experts else 'dense'}, {self.heads}, {self.positions}"
        found = (
            "not measured" if self.max_abs_diff is None else f"{self.max_abs_diff:.1e}" if self.max_abs_diff else "0"
        )
        return f"`{self.model_type}`", self.models, kind, str(self.lines), found


def list_families(options: Options) -> None:
    """Print the table, or put it into a file."""
    rows = list(describe(differences(options.measured) if options.measured else {}))
    if options.json:
        for row in rows:
            print(json.dumps(asdict(row), ensure_ascii=False))
        return
    if options.update is None:
        print(table(rows), end="")
        return
    text = replaced(options.update, table(rows))
    with staged_file(options.update) as stage:
        stage.write_text(text, encoding="utf-8")
    log.info("%d families -> %s", len(rows), options.update)


def describe(measured: dict[str, float]) -> Iterator[Row]:
    """A row for each family, by name."""
    known, files = family.known(), modules()
    for name, found in sorted(known.items()):
        hf = {"model_type": name, "rms_norm_eps": 1e-6, **found.tiny}
        core = found.transformer_config(hf)
        module = files[name]
        assert module.__doc__ and module.__file__, f"{name} is a file that says what it is"
        yield Row(
            model_type=name,
            models=module.__doc__.strip().splitlines()[0].rstrip("."),
            experts=bool(core.get("num_moe_experts")),
            heads=heads(core),
            positions=POSITIONS[family.positions(hf)],
            lines=len(Path(module.__file__).read_text(encoding="utf-8").splitlines()),
            max_abs_diff=measured.get(name),
        )


def modules() -> dict[str, ModuleType]:
    """model_type -> its module; ``family.known`` has imported all."""
    found = [module for name, module in sys.modules.items() if name.startswith(f"{families.__name__}.")]
    return {module.FAMILY.model_type: module for module in found}


def heads(core: dict[str, Any]) -> str:
    """How queries share keys."""
    if core.get("multi_latent_attention"):
        return "MLA"
    groups = core["num_query_groups"]
    return "MQA" if groups == 1 else "MHA" if groups == core["num_attention_heads"] else "GQA"


def differences(path: Path) -> dict[str, float]:
    """model_type -> largest difference of a logit; exactly the families there are."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = {row["model_type"]: float(row["max_abs_diff"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not JSON lines with model_type and max_abs_diff ({error})") from error
    wrong = sorted(found.keys() ^ family.known().keys())
    if wrong:
        raise UserError(f"{path}: measured families and those there are differ in {', '.join(wrong)}; measure again")
    return found


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def replaced(path: Path, made: str) -> str:
    """The text of a file with what lies between the marks replaced."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise UserError(f"{path}: no lines {BEGIN!r} and {END!r}; put them where the table belongs")
    return before + begin + made + end + after


def main(argv: list[str] | None = None) -> int:
    """Run mp-families; the exit status."""
    return run(Options, list_families, prog="mp-families", epilog=EXAMPLES, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
