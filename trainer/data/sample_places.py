"""Which samples were read, and where in the data they lie."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

Place = dict[str, Any]  # "prefix": of the .bin/.idx pair, "documents": their numbers in it, and what else is known


class Samples:
    """A dataset that can say where samples come from, and with ``remember`` which were read."""

    def __init__(self, dataset: Any, place: Callable[[Any, int], Place], *, remember: bool) -> None:
        self._dataset, self._place, self._remember = dataset, place, remember
        self.read: set[int] = set()  # since ``read_by_all``

    def __getitem__(self, sample: int) -> Any:
        if self._remember:
            self.read.add(int(sample))
        return self._dataset[sample]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def place(self, sample: int) -> Place:
        """Where a sample comes from."""
        return {"sample": sample} | self._place(self._dataset, sample)

    def read_by_all(self) -> list[int]:
        """The samples that any rank has read since the last call (collective)."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, sorted(self.read))
        self.read.clear()
        return sorted({sample for samples in found for sample in samples})


def in_corpus(dataset: Any, sample: int) -> Place:
    """Of megatron-core's GPTDataset, or a blend of them: pair, documents, and the first one's token it begins at."""
    dataset[sample]  # has it open its indices, which it does late
    if hasattr(dataset, "datasets"):
        which, inner = int(dataset.dataset_index[sample]), int(dataset.dataset_sample_index[sample])
        return in_corpus(dataset.datasets[which], inner)
    row = int(dataset.shuffle_index[sample])
    (first, offset), (last, _) = dataset.sample_index[row], dataset.sample_index[row + 1]
    documents = dataset.document_index[int(first) : int(last) + 1].tolist()
    return {"prefix": dataset.dataset.path_prefix, "documents": documents, "first_token": int(offset)}


def sources(dataset: Any) -> list[str]:
    """Prefixes of the pairs that a dataset of mp-pretrain blends, by number; one where it is no blend."""
    return [each.dataset.path_prefix for each in getattr(dataset, "datasets", [dataset])]


def in_conversations(blend: Any, sample: int) -> Place:
    """Of mp-sft's rows: pair, and the conversations of the row."""
    which, row = blend[sample]
    return {"prefix": blend.names[which], "documents": [int(number) for number in row.conversations]}


def shown(places: list[Place], limit: int = 2) -> str:
    """Places in a few words, for people."""
    some = [f"{p['prefix']} documents {', '.join(map(str, p['documents'][:4]))}" for p in places[:limit]]
    return "; ".join(some) + (f"; {len(places) - limit} more in the log" if len(places) > limit else "")
