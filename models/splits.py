"""How the layers of a model divide into pipeline stages and their chunks: evenly, or as asked for. No torch."""

import re
from collections.abc import Sequence

from megapatch.models.cli import UserError

Counts = list[list[int]]  # layers of each chunk of each stage, [chunk][stage]
ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")  # names of options
OPTIONS = (*ENDS, "pipeline_model_parallel_layout")
FIRST, LAST, LAYOUT = (f"--{name.replace('_', '-')}" for name in OPTIONS)
_TIMES = (r"\(([^()]*)\)\*(\d{1,4})", r"([Etm|])\*(\d{1,4})")  # (tt|)*3, t*3
_WHOLE = re.compile(r"Et*(\|t*)*m*L")


def by_ends(num_layers: int, pp: int, vpp: int, first: int | None, last: int | None) -> Counts:
    """As many layers everywhere, but for those asked for in the first and the last stage (UserError)."""
    ends = {flag: size for flag, size in ((FIRST, first), (LAST, last)) if size is not None}
    if not ends and num_layers % (pp * vpp):
        name = "--pp x --vpp" if vpp > 1 else "--pp"
        raise UserError(
            f"{name} = {pp * vpp} does not divide the {num_layers} layers of config.json; {FIRST}, {LAST} or {LAYOUT} "
            "divide them unevenly"
        )
    middle, left = pp - len(ends), num_layers - sum(ends.values())
    if left < middle or (left % middle if middle else left):
        said = " and ".join(f"{flag} {size}" for flag, size in ends.items())
        raise UserError(
            f"{said}: {left} of the {num_layers} layers of config.json are left for {middle} other stages, which all "
            "have the same number, at least 1"
        )
    sizes = [left // middle if middle else 0] * pp
    sizes[0] = sizes[0] if first is None else first
    sizes[-1] = sizes[-1] if last is None else last
    for stage, size in enumerate(sizes):
        if size % vpp:
            raise UserError(f"--vpp {vpp} does not divide the {size} layers of stage {stage} into chunks")
    return [[size // vpp for size in sizes] for _ in range(vpp)]


def chunks_of(text: str) -> list[str]:
    """'Et|(tt|)*2mL' -> ['Et', 'tt', 'tt', 'mL'] (ValueError)."""
    plain = re.sub(r"[,\s]", "", text)
    for pattern in _TIMES:
        plain = re.sub(pattern, lambda found: found[1] * int(found[2]), plain)
    if not _WHOLE.fullmatch(plain):
        raise ValueError(
            f"{LAYOUT} {text}: expected E (embedding), t for each layer, m for each layer of multi-token prediction "
            "(in the last chunk) and L (loss), with | between chunks, such as 'Ett|(ttt|)*6tmL'"
        )
    return plain.split("|")


def by_text(text: str, num_layers: int, pp: int) -> Counts:
    """The layers that a text such as 'Et|(tt|)*2L' gives to each chunk (UserError where they are not all)."""
    counts = [chunk.count("t") for chunk in chunks_of(text)]
    if sum(counts) != num_layers:
        raise UserError(f"{LAYOUT} {text}: has {sum(counts)} layers (t), config.json {num_layers}")
    return [counts[start : start + pp] for start in range(0, len(counts), pp)]


def for_core(counts: Sequence[Sequence[int]], predicting: int) -> list[list[str]]:
    """What megatron-core is told: the kinds of layers of each chunk, in order; ``predicting`` at the end."""
    chunks = [["decoder"] * size for chunk in counts for size in chunk]
    chunks[0].insert(0, "embedding")
    chunks[-1] += ["mtp"] * predicting + ["loss"]
    return chunks
