"""A model family: everything megapatch knows about one Hugging Face ``model_type``. Imports no torch."""

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from megapatch.models.cli import UserError
from megapatch.models.rules import Placed, Rule, expand

HfConfig = Mapping[str, Any]  # config.json, as read
Source = str | Callable[[HfConfig], Any]  # a key of config.json ("a|b": a or b), or a function of config.json

READS: dict[str, Source] = {  # true of every decoder family: TransformerConfig field <- config.json
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": lambda hf: hf.get("num_key_value_heads") or hf["num_attention_heads"],
    "kv_channels": lambda hf: hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
    "layernorm_epsilon": "rms_norm_eps",
    "init_method_std": lambda hf: hf.get("initializer_range", 0.02),
    "attention_dropout": lambda hf: hf.get("attention_dropout", 0.0),
}
FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",  # a name in build.ACTIVATIONS
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
}
MOE_READS: dict[str, Source] = {
    "num_moe_experts": "num_local_experts|num_experts",  # transformers 5 | 4
    "moe_router_topk": "num_experts_per_tok",
    "moe_aux_loss_coeff": lambda hf: hf.get("router_aux_loss_coef", 0.0),
}
MOE_FIXED: dict[str, Any] = {"moe_router_load_balancing_type": "aux_loss"}
MLA_READS: dict[str, Source] = {  # multi-head latent attention
    "kv_channels": lambda hf: hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"],
    "num_query_groups": "num_attention_heads",
    "q_lora_rank": lambda hf: hf.get("q_lora_rank", 1536),  # null: queries have no latent vector
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "rope_type": lambda hf: {"default": "rope", "yarn": "yarn"}[rope(hf)["rope_type"]],
    "rotary_base": lambda hf: rope(hf)["rope_theta"],
    "rotary_scaling_factor": lambda hf: rope(hf).get("factor") or 1.0,
    "original_max_position_embeddings": lambda hf: (
        rope(hf).get("original_max_position_embeddings") or hf["max_position_embeddings"]
    ),
    "beta_fast": lambda hf: rope(hf).get("beta_fast") or 32.0,
    "beta_slow": lambda hf: rope(hf).get("beta_slow") or 1.0,
    "mscale": lambda hf: rope(hf).get("mscale") or 1.0,
    "mscale_all_dim": lambda hf: rope(hf).get("mscale_all_dim") or 0.0,
}
MLA_FIXED: dict[str, Any] = {"multi_latent_attention": True, "qk_layernorm": True, "apply_rope_fusion": False}
TINY: dict[str, Any] = {  # a model that fits a test: 4 layers, 4 heads of 8
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def written_rope(hf: HfConfig) -> dict[str, Any]:
    """RoPE parameters from either spelling: rope_parameters, or rope_theta with rope_scaling."""
    old = {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}
    return dict(hf.get("rope_parameters") or old)


MOE_MLA_TINY: dict[str, Any] = TINY | {  # latent attention, experts of four groups beside two shared ones
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}


@dataclass(frozen=True)
class Family:
    """One architecture. ``reads`` and ``fixed`` add to READS and FIXED above."""

    model_type: str
    rules: Callable[[HfConfig], tuple[Rule, ...]]
    reads: Mapping[str, Source] = field(default_factory=dict)  # TransformerConfig field <- config.json
    fixed: Mapping[str, Any] = field(default_factory=dict)  # TransformerConfig field <- constant
    only: Mapping[str, Any] = field(default_factory=dict)  # config.json settings with one supported value
    tiny: Mapping[str, Any] = field(default_factory=dict)  # config.json of the smallest useful model, for tests
    vocab_size: Source = "vocab_size"
    max_positions: Source = "max_position_embeddings"  # may give None: no limit
    tied: bool = False  # whether the output layer is the embedding when config.json does not say
    positions: Source = lambda hf: "rope"  # rope, learned_absolute or none
    rope: Callable[[HfConfig], dict[str, Any]] = written_rope  # parameters of the rotary embedding
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3")  # supported ones
    rotary_dim: Source = lambda hf: _read(hf, _head_size(hf))  # of each head; the other dimensions are not rotated
    windows: bool = False  # whether sliding-window attention is supported
    modules: Callable[[HfConfig], Mapping[str, str]] = lambda hf: {}  # slot of layers.spec.Modules <- "module:name"
    letters: Callable[[HfConfig], Mapping[str, int]] = lambda hf: {}  # further shape letters of the rules
    prefix: str = ""  # of the names of weights, which files of the bare model lack
    optional: Mapping[str, Any] = field(default_factory=dict)  # setting -> its value where files lack these layers
    copies: Callable[[HfConfig], Mapping[str, str]] = lambda hf: {}  # names that files hold again -> what they repeat
    buffers: tuple[str, ...] = ("*.rotary_emb.inv_freq",)  # names in files that follow from config.json; wildcards

    def transformer_config(self, hf: HfConfig) -> dict[str, Any]:
        """Keyword arguments for megatron-core's TransformerConfig; an unsupported setting is a UserError."""
        for key, value in self.only.items():
            supported = value if isinstance(value, tuple) else (value,)
            if hf.get(key, supported[0]) not in supported:
                said = " or ".join(map(repr, supported))
                raise UserError(f"config.json: {key} is {hf[key]!r}; {self.model_type} supports {said} only")
        if not self.windows:
            refuse_windows(hf)
        return {**FIXED, **self.fixed, **{k: _read(hf, s) for k, s in {**READS, **self.reads}.items()}}

    def model_rules(self, hf: HfConfig) -> tuple[Rule, ...]:
        """The weight rules that hold for this config.json: a tied output layer has no weight of its own."""
        tied = tied_embeddings(hf)
        return tuple(r for r in self.rules(hf) if not (tied and r.core == "output_layer.weight"))


def vocab_size(hf: HfConfig) -> int:
    """Rows of the embedding."""
    return _read(hf, find(hf).vocab_size)


def positions(hf: HfConfig) -> str:
    """How the model knows positions: rope, learned_absolute or none (no embedding: ALiBi)."""
    return _read(hf, find(hf).positions)


def max_positions(hf: HfConfig) -> int | None:
    """The longest sequence the model was made for; None: no limit."""
    source = find(hf).max_positions
    return source(hf) if callable(source) else next((hf[key] for key in source.split("|") if hf.get(key)), None)


def refuse_length(hf: HfConfig, length: int | None) -> None:
    """UserError where --seq-length is more than the model was made for."""
    longest = max_positions(hf)
    if longest and length and length > longest:
        raise UserError(f"--seq-length {length} is longer than max_position_embeddings of config.json, {longest}")


def placed_rules(hf: HfConfig) -> list[Placed]:
    """Every weight of the model that a config.json describes: the exact set, no more and no less."""
    family = find(hf)
    config = family.transformer_config(hf)
    return expand(family.model_rules(hf), config["num_layers"], config.get("num_moe_experts") or 0)


def stacked_layers(hf: HfConfig) -> bool:
    """True when core stores all layers of a weight as one tensor: all layers are of one kind."""
    return find(hf).transformer_config(hf).get("moe_layer_freq", 1) == 1


def _head_size(hf: HfConfig) -> Source:
    return find(hf).reads.get("kv_channels", READS["kv_channels"])


def _read(hf: HfConfig, source: Source) -> Any:
    if callable(source):
        try:
            return source(hf)
        except KeyError as error:
            raise UserError(
                f"config.json: no {error.args[0]}; is it the config.json of a model of this type?"
            ) from error
    for key in source.split("|"):
        if hf.get(key) is not None:
            return hf[key]
    raise UserError(f"config.json: no {source.replace('|', ' or ')}; is it the config.json of a model of this type?")


def tied_embeddings(hf: HfConfig) -> bool:
    """True when the output layer is the embedding."""
    return bool(hf.get("tie_word_embeddings", find(hf).tied))


def refuse_windows(hf: HfConfig) -> None:
    """Refuse sliding-window attention in any spelling (UserError)."""
    kinds = set(hf.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"} or (hf.get("sliding_window") and hf.get("use_sliding_window", True)):
        raise UserError(
            "config.json: sliding-window attention is not supported for this family; set use_sliding_window to false"
        )


def rope(hf: HfConfig) -> dict[str, Any]:
    """RoPE parameters as transformers 5 names them; a kind that is not supported is a UserError."""
    parameters = find(hf).rope(hf)
    kind = parameters.setdefault("rope_type", parameters.pop("type", "default"))
    if kind not in (kinds := find(hf).rope_kinds):
        raise UserError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(kinds)}")
    if kind == "yarn":
        _refuse_yarn(parameters)
    return parameters


def _refuse_yarn(parameters: Mapping[str, Any]) -> None:
    """Refuse settings of yarn for which transformers and megatron-core compute different scales (UserError)."""
    both = bool(parameters.get("mscale")) == bool(parameters.get("mscale_all_dim"))
    for wrong, said in {
        "factor is missing": not parameters.get("factor"),
        "original_max_position_embeddings is missing": not parameters.get("original_max_position_embeddings"),
        "attention_factor is set": parameters.get("attention_factor") is not None,
        "truncate is false": not parameters.get("truncate", True),
        "one of mscale and mscale_all_dim is missing or 0": not both,
    }.items():
        if said:
            raise UserError(f"config.json: rope type 'yarn': {wrong}; this is not supported")


def refuse_rope(hf: HfConfig) -> None:
    """Refuse kinds of RoPE that no layer here computes (UserError)."""
    if positions(hf) == "rope":
        rope(hf)


def inverse_frequencies(hf: HfConfig) -> list[float]:
    """Rotary inverse frequencies [d/2]; llama3 scaling as in transformers' modeling_rope_utils."""
    p, dim = rope(hf), _read(hf, find(hf).rotary_dim)
    plain = [p["rope_theta"] ** (-i / dim) for i in range(0, dim, 2)]
    if p["rope_type"] == "default":
        return plain
    if p["rope_type"] == "linear":
        return [f / p["factor"] for f in plain]
    low, high, trained = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]

    def scaled(f: float) -> float:
        turns = trained * f / (2 * math.pi)  # of this frequency over the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - smooth) * f / p["factor"] + smooth * f

    return [scaled(f) for f in plain]


@cache
def known() -> dict[str, Family]:
    """Every family by model_type; each module in models/families defines one FAMILY."""
    from megapatch.models import families

    names = sorted(m.name for m in pkgutil.iter_modules(families.__path__, families.__name__ + "."))
    found = [importlib.import_module(name).FAMILY for name in names]
    return {f.model_type: f for f in found}


def find(hf: HfConfig) -> Family:
    """The family of a config.json (UserError when there is none)."""
    kind = hf.get("model_type")
    if kind not in known():
        raise UserError(f"config.json: model_type {kind!r} is not supported; supported: {', '.join(sorted(known()))}")
    return known()[kind]
