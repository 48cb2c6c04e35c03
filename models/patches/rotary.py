"""Rotary embeddings on a CPU: two temporaries of half the size instead of seven, and no zeros for slices' gradients."""

from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from megapatch.models.layers.fused import rotary
from megapatch.models.patches import Patch

_upstream = rope_utils._apply_rotary_pos_emb_bshd


def apply_rotary(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    """[s, b, n, d] -> [s, b, n, d]; layouts of pairs are left to upstream."""
    if rotary_interleaved or multi_latent_attention:
        return _upstream(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
    return rotary(t, freqs, mscale)


ROTARY = Patch(
    "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
    apply_rotary,
    "2d6f53f0fe6f",
    "upstream rotates by chunks, negations and concatenations, each a pass over memory; a CPU has no fused kernel",
)
