"""How tensor parallelism cuts weights, where pipeline parallelism puts them, and what else weights are called.

tests/test_convert_ranks.py compares all of this with megatron-core's own models.
"""

import pytest

from megapatch.models import core_names, cuts
from megapatch.models.cli import UserError
from megapatch.models.cuts import COLUMNS, HALVES, ROWS, VOCABULARY, WHOLE, Region
from megapatch.models.parallel import Parallel
from megapatch.models.rules import Placed, Rule
from megapatch.models.stages import Place, Stages
from megapatch.tools.convert.ranks import Member, ranks_of

LAYER = "decoder.layers.{l}."


@pytest.mark.parametrize(
    "cut, rank, expected",
    [
        (WHOLE, 1, [Region(0, 0, 8, 6)]),
        (ROWS, 1, [Region(4, 0, 4, 6)]),
        (COLUMNS, 1, [Region(0, 3, 8, 3)]),
        (HALVES, 1, [Region(2, 0, 2, 6), Region(6, 0, 2, 6)]),
        (VOCABULARY, 0, [Region(0, 0, 4, 6)]),
    ],
)
def test_a_rank_of_two_holds_these_regions(cut, rank, expected):
    assert cuts.regions(cut, 8, 6, rank, 2) == expected


def test_what_does_not_divide_is_told():
    with pytest.raises(UserError, match="tensor parallelism 3 does not divide the 8 rows of a weight"):
        cuts.regions(ROWS, 8, 6, 0, 3)
    with pytest.raises(UserError, match="tensor parallelism 3 does not divide the 4 halves of a weight"):
        cuts.regions(HALVES, 8, 6, 0, 3)


@pytest.mark.parametrize(
    "name, gated, expected",
    [
        ("embedding.word_embeddings.weight", True, VOCABULARY),
        (LAYER + "mlp.experts.experts.{e}.linear_fc1.weight", True, HALVES),
        (LAYER + "mlp.linear_fc1.bias", False, ROWS),
        (LAYER + "mlp.linear_fc2.bias", False, WHOLE),
        (LAYER + "self_attention.linear_proj.weight", True, COLUMNS),
        (LAYER + "self_attention.linear_qkv.layer_norm_bias", True, WHOLE),
        (LAYER + "post_mlp_layernorm.weight", True, WHOLE),
        ("mtp.layers.0.eh_proj.weight", True, ROWS),
    ],
)
def test_the_table_knows_a_weight_by_its_module(name, gated, expected):
    assert cuts.cut_of(name, gated, 2) == expected


def test_a_weight_that_no_rule_cuts_is_refused_where_it_must_be_cut():
    assert cuts.cut_of(LAYER + "mixer.weight", True, 1) == WHOLE
    with pytest.raises(UserError, match=r"mixer.weight: no rule says how tensor parallelism cuts this weight"):
        cuts.cut_of(LAYER + "mixer.weight", True, 2)


def test_the_vocabulary_is_padded_as_megatron_pads_it():
    assert [cuts.padded_vocabulary(50257, 128, tp) for tp in (1, 2, 8)] == [50304, 50432, 51200]


def places(core: str, stages: Stages, layer: int | None = None) -> list[Place]:
    return list(stages.of(Placed(Rule(core, ("x",)), layer, None)))


def test_stages_and_chunks_hold_the_layers_in_megatron_s_order():
    stages = Stages([[2, 2], [2, 2]], copied=True)
    found = [places(LAYER + "x", stages, layer)[0][:3] for layer in range(8)]
    assert found == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1)]
    uneven = Stages([[1, 3]])
    assert [places(LAYER + "x", uneven, layer)[0][:3] for layer in range(4)] == [
        (0, 0, 0),
        *((1, 0, n) for n in range(3)),
    ]
    assert [p[:2] for p in places("decoder.final_layernorm.weight", stages)] == [(1, 1)]


def test_the_last_stage_holds_a_copy_of_a_tied_embedding_and_one_for_multi_token_prediction():
    name, output = "embedding.word_embeddings.weight", "output_layer.weight"
    assert [p.core for p in places(name, Stages([[2, 2]], copied=True))] == [name, output]
    assert [p.core for p in places(name, Stages([[2, 2]], predicts=True))] == [name, name]
    assert [p.core for p in places(name, Stages([[4]], copied=True, predicts=True))] == [name]


CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize(
    "tp, ep, etp, expected",
    [  # (tensor, expert, expert tensor) of the ranks that differ
        (2, 2, 2, [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1)]),
        (2, 2, 1, [(0, 0, 0), (1, 1, 0)]),
        (1, 4, 1, [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)]),
        (4, 2, 2, [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]),
    ],
)
def test_ranks_are_numbered_as_megatron_core_numbers_them(tp, ep, etp, expected):
    layout = Parallel(tp=tp, ep=ep, etp=etp, sequence_parallel=tp > 1)
    ranks = ranks_of(CONFIG, layout, 128, "te")
    assert list(ranks.members()) == [Member(*numbers) for numbers in expected]
    assert ranks.experts(Member(0, ep - 1, 0)) == range(8 - 8 // ep, 8)


TE_FC1 = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
EXPERT = "decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight"
LATENT = "decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight"


@pytest.mark.parametrize(
    "canonical, spec, experts, expected",
    [
        (TE_FC1, "te", "grouped", TE_FC1),
        (TE_FC1, "local", "grouped", "decoder.layers.0.pre_mlp_layernorm.weight"),
        (LATENT, "local", "grouped", "decoder.layers.0.self_attention.kv_layernorm.weight"),
        (EXPERT, "te", "sequential", "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight"),
        (EXPERT, "local", "sequential", "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight"),
        (EXPERT, "te", "grouped", "decoder.layers.0.mlp.experts.linear_fc1.weight3"),
        (EXPERT, "local", "grouped", "decoder.layers.0.mlp.experts.weight1"),
    ],
)
def test_names_in_a_state_dict(canonical, spec, experts, expected):
    assert core_names.of_rank(canonical, spec, experts).name == expected
    assert expected in [name.name for name in core_names.any_of_rank(canonical)]


@pytest.mark.parametrize(
    "core, expert, written",
    [
        (
            LAYER + "pre_mlp_layernorm.weight",
            None,
            "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        ),  # local, mixtures
        (
            LAYER + "self_attention.linear_q_up_proj.layer_norm_weight",
            None,
            "decoder.layers.2.self_attention.q_layernorm.weight",  # local, latent attention
        ),
        (
            LAYER + "mlp.experts.experts.{e}.linear_fc1.weight",
            5,
            "decoder.layers.2.mlp.experts.experts.5.linear_fc1.weight",  # singleton_local_shards
        ),
    ],
)
def test_names_that_other_specifications_write_are_found(core, expert, written):
    assert written in [name.key for name in core_names.in_torch_dist(Placed(Rule(core, ("x",)), 2, expert))]
