"""An output layer whose rows count by their direction alone: each is scaled to length one when it is used."""

from typing import Any

import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megapatch.models.family import HfConfig


class NormHead(ColumnParallelLinear):
    """x [s, b, h], weight [v/tp, h] -> logits [s, b, v/tp]: what is stored stays as it is; rows are whole at any TP."""

    def forward(self, input_: Tensor, weight: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As upstream; ``weight`` is the embedding where they are tied."""
        return super().forward(input_, F.normalize(self.weight if weight is None else weight, dim=-1), **kwargs)


def normalise_rows(model: GPTModel, hf: HfConfig) -> None:
    """Have the output layer of ``model`` use unit rows: it becomes a NormHead, parameters and hooks as they are."""
    if model.post_process:
        assert type(model.output_layer) is ColumnParallelLinear
        model.output_layer.__class__ = NormHead
