"""Where pipeline parallelism puts each weight: stage, chunk of an interleaved pipeline, and layer in it. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from megapatch.models.rules import CORE, Placed

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class Place(NamedTuple):
    """A weight in a chunk of a stage, by its canonical name there: ``expert`` counts from the rank's first."""

    stage: int
    chunk: int
    layer: int | None
    core: str


@dataclass(frozen=True)
class Stages:
    """``layers``: how many layers each chunk of each stage has, [chunk][stage]."""

    layers: Sequence[Sequence[int]]
    copied: bool = False  # the output layer is tied: the last stage holds a copy of the embedding
    predicts: bool = False  # layers for multi-token prediction, which need the embedding, at the end

    @property
    def pp(self) -> int:
        """The number of stages."""
        return len(self.layers[0])

    @property
    def vpp(self) -> int:
        """Chunks per stage."""
        return len(self.layers)

    @property
    def ends(self) -> tuple[int, int] | None:
        """Layers of the first and of the last stage, where they are not as many as in each of the others."""
        sizes = [sum(chunk[stage] for chunk in self.layers) for stage in range(self.pp)]
        return None if len(set(sizes)) == 1 else (sizes[0], sizes[-1])

    def of(self, placed: Placed) -> Iterator[Place]:
        """Every place that holds a weight."""
        core, last = placed.rule.core, (self.pp - 1, self.vpp - 1)
        if core.startswith(CORE) and placed.layer is not None:
            yield self._of_layer(placed.layer, core)
        elif core.startswith("embedding."):
            yield Place(0, 0, None, core)
            if core == EMBEDDING and self.pp > 1:
                yield from (Place(*last, None, EMBEDDING) for _ in range(self.predicts))
                yield from (Place(*last, None, OUTPUT) for _ in range(self.copied))
        else:
            yield Place(*last, placed.layer, core)

    def _of_layer(self, layer: int, core: str) -> Place:
        counts = [count for chunk in self.layers for count in chunk]
        ends = list(accumulate(counts))
        number = next(n for n, end in enumerate(ends) if layer < end)
        chunk, stage = divmod(number, self.pp)
        return Place(stage, chunk, layer - ends[number] + counts[number], core)
