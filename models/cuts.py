"""How tensor parallelism cuts each core weight: one table, for the files of ranks and for chunks. Imports no torch.

Of megatron-core 0.16.1: ColumnParallelLinear holds rows of the weight, RowParallelLinear columns.
"""

from typing import NamedTuple

from megapatch.models.cli import UserError

WHOLE, ROWS, COLUMNS, HALVES, VOCABULARY = "whole", "rows", "columns", "halves", "vocabulary"
CUTS: dict[str, str] = {  # module and kind -> what a rank holds; HALVES: rows of the upper and of the lower half
    "word_embeddings.weight": VOCABULARY,
    "output_layer.weight": VOCABULARY,
    "position_embeddings.weight": WHOLE,
    "linear_qkv.weight": ROWS,
    "linear_qkv.bias": ROWS,
    "linear_q_proj.weight": ROWS,
    "linear_q_down_proj.weight": ROWS,
    "linear_q_up_proj.weight": ROWS,
    "linear_kv_down_proj.weight": ROWS,
    "linear_kv_up_proj.weight": ROWS,
    "linear_proj.weight": COLUMNS,
    "linear_proj.bias": WHOLE,
    "linear_fc1.weight": HALVES,  # ROWS where the activation is not gated
    "linear_fc1.bias": HALVES,
    "linear_fc2.weight": COLUMNS,
    "linear_fc2.bias": WHOLE,
    "eh_proj.weight": ROWS,
    "router.weight": WHOLE,
    "router.expert_bias": WHOLE,
    "shared_experts.gate_weight": WHOLE,
}
TE_WHOLE = ("linear_q_down_proj.weight", "linear_kv_down_proj.weight")  # every rank has all of it in TE's spec
_NORMS = ("norm.weight", "norm.bias", ".layer_norm_weight", ".layer_norm_bias")


class Region(NamedTuple):
    """A rectangle of a weight: ``rows`` x ``columns`` items at (row, column)."""

    row: int
    column: int
    rows: int
    columns: int


def cut_of(core: str, gated: bool, size: int) -> str:
    """How the weight of this name is cut for ``size`` ranks; ``gated``: whether the model's MLP is.

    What is cut, but is not in the table, is a UserError.
    """
    name = ".".join(core.split(".")[-2:])
    if size > 1 and name not in CUTS and not name.endswith(_NORMS):
        raise UserError(f"{core}: no rule says how tensor parallelism cuts this weight; add it to models/cuts.py")
    cut = CUTS.get(name, WHOLE)
    return ROWS if cut == HALVES and not gated else cut


def regions(cut: str, rows: int, columns: int, rank: int, size: int) -> list[Region]:
    """The regions of a weight that a rank holds, one below the other; ``rows`` padded for VOCABULARY."""
    length = columns if cut == COLUMNS else rows // 2 if cut == HALVES else rows
    if cut == WHOLE:
        return [Region(0, 0, rows, columns)]
    if length % size:
        raise UserError(f"tensor parallelism {size} does not divide the {length} {cut} of a weight")
    share = length // size
    if cut == COLUMNS:
        return [Region(0, rank * share, rows, share)]
    starts = (0, length) if cut == HALVES else (0,)
    return [Region(start + rank * share, 0, share, columns) for start in starts]


def padded_vocabulary(vocab_size: int, divisible_by: int, size: int) -> int:
    """Rows of embedding and output layer as Megatron-LM pads them: a multiple of ``divisible_by`` on every rank."""
    return -(-vocab_size // (divisible_by * size)) * divisible_by * size
