"""A parallel layout of a model: which part of which weight each rank holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

from megapatch.models.cuts import TE_WHOLE, VOCABULARY, WHOLE, Region, cut_of, padded_vocabulary, regions
from megapatch.models.family import HfConfig, find, tied_embeddings, vocab_size
from megapatch.models.parallel import Parallel
from megapatch.models.rules import Placed
from megapatch.models.stages import Stages


class Member(NamedTuple):
    """A rank of a stage: its places in tensor, expert, and expert tensor parallelism."""

    tensor: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class Ranks:
    """Sizes of the layout, and the stages of its pipeline; ``vocabulary``: rows as padded for it."""

    tp: int
    ep: int
    etp: int
    stages: Stages
    gated: bool
    num_experts: int
    vocabulary: int
    divisible_by: int
    spec: str

    def members(self) -> Iterator[Member]:
        """The different ranks of each stage, as megatron-core numbers them: tensor parallelism first, then experts."""
        every = (Member(r % self.tp, r // self.etp % self.ep, r % self.etp) for r in range(lcm(self.tp, self._experts)))
        yield from dict.fromkeys(every)

    @property
    def _experts(self) -> int:
        return self.etp * self.ep

    def regions(self, core: str, rows: int, columns: int, member: Member) -> list[Region]:
        """What a rank holds of a weight, one below the other; beyond the vocabulary it is padding."""
        return self._share(core, rows, columns, member.expert_tensor if "{e}" in core else member.tensor)

    def _share(self, core: str, rows: int, columns: int, rank: int) -> list[Region]:
        size = self._size(core)
        cut = WHOLE if self.spec == "te" and core.endswith(TE_WHOLE) else cut_of(core, self.gated, size)
        return regions(cut, self.vocabulary if cut == VOCABULARY else rows, columns, rank, size)

    def _size(self, core: str) -> int:
        """How many ranks share a weight."""
        return self.etp if "{e}" in core else self.tp

    def experts(self, member: Member) -> range:
        """The experts of a rank."""
        share = self.num_experts // self.ep
        return range(member.expert * share, (member.expert + 1) * share)

    def chunks(self, placed: Placed, rows: int, columns: int) -> list[Region]:
        """The different parts of a weight that ranks load."""
        core = placed.rule.core
        shares = (self._share(core, rows, columns, rank) for rank in range(self._size(core)))
        inside = (r._replace(rows=min(r.rows, rows - r.row)) for share in shares for r in share)
        return sorted({region for region in inside if region.rows > 0})


def ranks_of(hf: HfConfig, layout: Parallel, divisible_by: int, spec: str) -> Ranks:
    """The layout of the model of a config.json (UserError when they do not fit)."""
    fields = find(hf).transformer_config(hf)
    layout.check_model(fields)
    return Ranks(
        layout.tp,
        layout.ep,
        layout.expert_tp,
        Stages(
            layout.stage_layers(fields["num_layers"]),
            copied=tied_embeddings(hf),
            predicts=bool(fields.get("mtp_num_layers")),
        ),
        fields["gated_linear_unit"],
        fields.get("num_moe_experts") or 0,
        padded_vocabulary(vocab_size(hf), divisible_by, layout.tp),
        divisible_by,
        spec,
    )
