"""How is any transformers config made tiny without knowing its family?

Config classes are dataclasses whose field names follow a few habits, and `SIZES` maps the habits to tiny
values. A field is shrunk only where its default is a positive number: None, False and 0 mean that the family
lacks the part (`ALSO_IF_NONE` names the exceptions). Tiny models still show what real ones have: grouped
queries, every kind of layer of the default config, windows shorter than a prompt, multipliers other than 1.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .quirks import QUIRKS, Quirk, each

VOCABULARY = 97  # prime, so that no other dimension is mistaken for it
WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, NEURONS, EXPERT_NEURONS, POSITIONS = 32, 4, 2, 8, 48, 24, 64

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # in every zoo model
OTHER_SPECIAL, FIRST_WORD = 3, 5  # a family's further special tokens; words start at 5
MULTIPLIER = 0.7  # for multipliers that are 1 by default but not in released models

_SIZES: list[tuple[int, str]] = [
    (VOCABULARY, "vocab_size src_vocab_size tgt_vocab_size audio_vocab_size unpadded_vocab_size"),
    (VOCABULARY, "vocab_size_per_layer_input"),
    (WIDTH, "hidden_size d_model n_embd dim emb_dim embed_dim dim_model hidden_size_global input_size"),
    (WIDTH, "word_embed_proj_dim output_dim out_hidden_size audio_hidden_size encoder_hidden_size lru_width"),
    (HEADS, "num_attention_heads num_heads n_heads n_head attention_heads num_encoder_heads"),
    (HEADS, "encoder_attention_heads decoder_attention_heads swa_num_attention_heads"),
    (HEADS, "num_encoder_attention_heads num_decoder_attention_heads"),
    (KV_HEADS, "num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads"),
    (KV_HEADS, "encoder_num_key_value_heads decoder_num_key_value_heads"),
    (KV_HEADS, "linear_num_key_heads linear_num_value_heads"),
    (HEAD_WIDTH, "head_dim d_kv d_head dim_head attention_head_size kv_channels swa_head_dim v_head_dim"),
    (
        HEAD_WIDTH,
        "qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim index_head_dim",
    ),
    (NEURONS, "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim d_ff d_inner dim_ff dff"),
    (NEURONS, "mlp_dim ffn_hidden_size intermediate_size_mlp dense_intermediate_size feed_forward_size"),
    (EXPERT_NEURONS, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (EXPERT_NEURONS, "expert_ffn_hidden_size shared_experts_intermediate_size downsample_hidden_size"),
    (EXPERT_NEURONS, "moe_shared_expert_intermediate_size router_intermediate_size prediction_head_size"),
    (20, "num_hash_buckets entity_vocab_size num_position_embeddings"),
    (16, "embedding_size embedding_rank q_lora_rank kv_lora_rank o_lora_rank hc_lowrank router_hidden_size"),
    (16, "mamba_d_head mamba_head_dim"),
    (8, "hidden_size_per_layer_input laurel_rank mamba_d_state ssm_state_size state_size mamba_dt_rank"),
    (8, "time_step_rank mamba_chunk_size chunk_size attention_chunk_size"),
    (5, "sliding_window sliding_window_size window_size local_attention attention_window_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num index_topk"),
    (4, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k num_selected_experts moe_top_k"),
    (2, "type_vocab_size index_n_heads mamba_expand expand"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group"),
    (1, "first_k_dense_replace moe_layer_start_index num_dense_layers"),
    (1, "mamba_n_groups n_groups mamba_ngroups"),
    (0, "num_mtp_layers num_nextn_predict_layers"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len max_seq_length max_sequence_length"),
    (POSITIONS, "max_source_positions max_target_positions max_encoder_position_embeddings context_length"),
    (POSITIONS, "max_decoder_position_embeddings max_2d_position_embeddings"),
]
SIZES = {name: value for value, names in _SIZES for name in names.split()}

_LAYERS = "num_hidden_layers num_layers n_layers n_layer layers encoder_layers decoder_layers"
LAYERS = set(f"{_LAYERS} num_encoder_layers num_decoder_layers".split())
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")  # one value per layer
_ALSO_IF_NONE = "vocab_size num_decoder_layers num_experts_per_tok head_dim num_key_value_heads num_kv_heads"
_LINEAR = "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim"
ALSO_IF_NONE = set(f"{_ALSO_IF_NONE} {_LINEAR}".split())


def shrink(config_class: type[PreTrainedConfig], layers: int) -> dict[str, Any]:
    """Keyword arguments that make `config_class` tiny; those of sub-configs are dicts with a model type."""
    quirk = QUIRKS.get(config_class.model_type, Quirk(""))
    defaults, parts = _defaults(config_class), getattr(config_class, "sub_configs_defaults", {})
    kinds = _layer_kinds(config_class, defaults)
    layers = max(layers, quirk.min_layers, *map(len, kinds.values()), 1)

    sizes = SIZES | dict.fromkeys(LAYERS, layers)
    sizes["hidden_dim"] = NEURONS if defaults.keys() & {"hidden_size", "dim"} else WIDTH
    if "kv_lora_rank" in defaults:  # multi-latent attention: one latent serves all heads, nothing is grouped
        sizes["num_key_value_heads"] = HEADS
    tiny: dict[str, Any] = {}
    for name, default in defaults.items():
        if _is_multiplier(name, default):
            tiny[name] = MULTIPLIER
        elif name in sizes and _is_size(name, default):
            tiny[name] = sizes[name]
        elif name in SPECIAL or _is_special_token(name, default):
            tiny[name] = SPECIAL.get(name, OTHER_SPECIAL)
    tiny |= {name: each(*values)(layers) for name, values in kinds.items()}
    for name, spec in parts.items():
        if not spec.optional:
            by_name = spec.config_class is AutoConfig
            sub_class = CONFIG_MAPPING[spec.model_type] if by_name else spec.config_class
            tiny[name] = {"model_type": spec.model_type, **spec.init_kwargs, **shrink(sub_class, layers)}
    for name, value in quirk.fields(layers).items():
        tiny[name] = tiny[name] | value if name in parts else value
    return tiny


def _layer_kinds(config_class: type[PreTrainedConfig], defaults: dict[str, Any]) -> dict[str, list[Any]]:
    """The kinds of layer that the default config names in each per-layer list; tiny models show them all."""
    names = [name for name in LAYER_KINDS if name in defaults]
    config = config_class() if names else None
    kinds = {name: list(dict.fromkeys(getattr(config, name) or [])) for name in names}
    return {name: values for name, values in kinds.items() if values}


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What a config has without being told; before transformers 5.4 configs were plain classes."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: _default(field) for field in dataclasses.fields(config_class)}
    named = inspect.signature(config_class.__init__).parameters.values()
    return dict.fromkeys(SPECIAL) | {one.name: one.default for one in named if one.default is not one.empty}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_size(name: str, default: Any) -> bool:
    return name in ALSO_IF_NONE if default is None else type(default) is int and default > 0


def _is_multiplier(name: str, default: Any) -> bool:
    ends = ("multiplier", "logits_scaling", "scaling_factor", "route_scale")
    return name.endswith(ends) and "dim" not in name and type(default) is float and default == 1.0


def _is_special_token(name: str, default: Any) -> bool:
    """A special token whose default id is a word of the tiny vocabulary, or lies outside it."""
    return name.endswith(("token_id", "token_index")) and type(default) is int and default >= FIRST_WORD
