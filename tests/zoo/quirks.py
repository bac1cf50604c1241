"""Which model types need more than the general shrinking rules, and why?

A quirk overrides config fields of one model type, also where that type is a sub-config. Real checkpoints need
none, their configs fit together; tiny ones must be made to fit, and to show what the family is known for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Quirk:
    """Config fields of one model type; a function among the values is called with the number of layers."""

    why: str
    config: dict[str, Any] = field(default_factory=dict)
    min_layers: int = 1

    def fields(self, layers: int) -> dict[str, Any]:
        return {name: value(layers) if callable(value) else value for name, value in self.config.items()}


def each(*pattern: Any) -> Callable[[int], list[Any]]:
    """A list with one entry per layer that repeats `pattern`."""
    return lambda layers: [pattern[i % len(pattern)] for i in range(layers)]


_BOTH_KINDS = ("sliding_attention", "full_attention")
_NO_ATTENTION = "by default no layer has attention"
_ROTARY = "the rotary part must fit into a tiny head"
_WINDOW = "the window must be even, and shorter than a prompt to matter"
_BLOCK_SPARSE = "below 700 tokens the family itself falls back to full attention"
_GEMMA4 = Quirk("full-attention layers have a head width of their own", {"global_head_dim": 16})
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 32}
_RELATIVE |= {"position_biased_input": False}

QUIRKS: dict[str, Quirk] = {
    "bamba": Quirk(_NO_ATTENTION, {"attn_layer_indices": lambda layers: list(range(1, layers, 2))}),
    "big_bird": Quirk(_BLOCK_SPARSE, {"attention_type": "original_full"}),
    "bigbird_pegasus": Quirk(_BLOCK_SPARSE, {"attention_type": "original_full"}),
    "blt": Quirk("half a million hash embeddings by default", {"encoder_hash_byte_group_vocab": 50}),
    "codegen": Quirk(_ROTARY, {"rotary_dim": 4}),
    "cohere_compass_text": Quirk(
        "by default no layer has a window, and rotary parameters belong to a kind of layer",
        {
            "layer_types": each(*_BOTH_KINDS),
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _BOTH_KINDS},
        },
    ),
    "dbrx": Quirk(
        "its sub-configs are not declared as such",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deberta": Quirk("released models attend to relative positions", _RELATIVE),
    "deberta-v2": Quirk(
        "released models attend to relative positions, in buckets",
        {**_RELATIVE, "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "deepseek_v2": Quirk("by default every layer has experts", {"first_k_dense_replace": 1}),
    "dots1": Quirk(
        "by default no layer has experts",
        {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "dots3_note_text": Quirk(
        "sliding layers have sizes of their own",
        {
            "sliding_window": 5,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
    ),
    "esm": Quirk("the mask token has no default", {"mask_token_id": 4}),
    "esmc": Quirk("grouped queries are refused", {"num_key_value_heads": 4}),
    "falcon_h1": Quirk("mamba has a width of its own", {"mamba_d_ssm": 64}),
    "funnel": Quirk("layers are counted per block of the funnel", {"block_sizes": each(1)}),
    "gemma3n_text": Quirk(
        "the last layers reuse keys and values of earlier layers of their kind",
        {"layer_types": each(*_BOTH_KINDS), "num_kv_shared_layers": 2},
        min_layers=4,
    ),
    "gemma4_assistant": Quirk(
        "per-layer inputs are refused",
        {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    ),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "got_ocr2_vision": Quirk("image sizes", {"image_size": 64, "output_channels": 16}),
    "gpt_neo": Quirk(
        "kinds of layer are counted",
        {"attention_types": lambda layers: [[each("global", "local")(layers), 1]]},
    ),
    "gptj": Quirk(_ROTARY, {"rotary_dim": 4}),
    "granite_speech": Quirk("the adapter would need the package peft", {"has_lora_adapter": False}),
    "granite_speech_plus": Quirk("the adapter would need the package peft", {"has_lora_adapter": False}),
    "granite_speech_encoder": Quirk("audio sizes", {"max_pos_emb": 20, "context_size": 20}),
    "granite_speech_plus_encoder": Quirk("audio sizes", {"max_pos_emb": 20, "context_size": 20}),
    "granitemoehybrid": Quirk(_NO_ATTENTION, {"layer_types": each("linear_attention", "full_attention")}),
    "jamba": Quirk(
        "by default one layer in eight has attention",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "kimi_linear": Quirk("linear attention has sizes of its own", {"linear_head_dim": 8, "linear_num_heads": 4}),
    "layoutlmv3": Quirk(
        "six box embeddings make up the width; the image branch is off",
        {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    ),
    "led": Quirk(_WINDOW, {"attention_window": 4}),
    "lfm2_moe": Quirk("kinds of layer have no default", {"layer_types": each("conv", "full_attention")}),
    "lilt": Quirk("six box embeddings make up the width", {"hidden_size": 48}),
    "longformer": Quirk(_WINDOW, {"attention_window": 4}),
    "longt5": Quirk("the window should be shorter than a prompt", {"local_radius": 3}),
    "mamba2": Quirk("heads make up the inner width", {"num_heads": 4, "head_dim": 16}),
    "markuplm": Quirk(
        "embeddings of fifty levels of XPath by default",
        {
            "max_depth": 4,
            "max_xpath_tag_unit_embeddings": 20,
            "max_xpath_subs_unit_embeddings": 20,
            "tag_pad_id": 0,
            "subs_pad_id": 0,
        },
    ),
    "minimax": Quirk("linear attention should span several blocks", {"block_size": 4}),
    "mobilebert": Quirk("the bottleneck", {"intra_bottleneck_size": 16}),
    "musicgen_decoder": Quirk("fewer codebooks", {"num_codebooks": 2}),
    "musicgen_melody_decoder": Quirk("fewer codebooks", {"num_codebooks": 2}),
    "neomme": Quirk("a quarter of each head turns, by pairs of pairs; image sizes", {"head_dim": 16, "patch_size": 4}),
    "pegasus_x": Quirk("local attention should span several blocks", {"block_size": 4}),
    "perceiver": Quirk(
        "latents have sizes of their own",
        {
            "num_latents": 8,
            "d_latents": 32,
            "num_self_attends_per_block": lambda layers: layers,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
    ),
    "phi4_multimodal_audio": Quirk(
        "audio sizes",
        {
            "nemo_conv_channels": 32,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "bias_max_distance": 20,
        },
    ),
    "phi4_multimodal_vision": Quirk("image sizes", {"image_size": 28, "crop_size": 28}),
    "qwen4_exp_text": Quirk(
        "the indexer's sizes have no default",
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    "recurrent_gemma": Quirk(
        "by default one layer in three has attention", {"block_types": ["recurrent", "attention"]}
    ),
    "reformer": Quirk(
        "layers are a list, hashing needs a seed, and axial positions would have to make up the width",
        {"attn_layers": each("local", "lsh"), "hash_seed": 0, "axial_pos_embds": False},
    ),
    "rembert": Quirk("embeddings have widths of their own", {"input_embedding_size": 16, "output_embedding_size": 24}),
    "roc_bert": Quirk(
        "embeddings of sound and shape",
        {
            "pronunciation_vocab_size": 20,
            "shape_vocab_size": 20,
            "pronunciation_embed_dim": 16,
            "shape_embed_dim": 16,
        },
    ),
    "squeezebert": Quirk("embeddings must have the model's width", {"embedding_size": 32}),
    "t5": Quirk("classifiers shift the tokens themselves", {"decoder_start_token_id": 0}),
    "vibevoice_acoustic_tokenizer_encoder": Quirk(
        "audio sizes", {"depths": [1, 1], "downsampling_ratios": [2], "num_filters": 8}
    ),
    "xmod": Quirk("a language chooses the adapters", {"languages": ["en_XX"], "default_language": "en_XX"}),
    "zamba": Quirk(
        "the shared attention block must occur twice",
        {"layers_block_type": each("linear_attention", "hybrid")},
        min_layers=4,
    ),
    "zamba2": Quirk(
        "the shared attention block should occur twice",
        {"layers_block_type": each("linear_attention", "hybrid")},
        min_layers=4,
    ),
    "zaya": Quirk("more than one expert per token is refused", {"num_experts_per_tok": 1}),
}

_GEMMA4_ASSISTANT = (
    "it does not run alone: all layers borrow keys and values from the model it assists, whose hidden states it reads"
)

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its image tower needs the package timm (the text model is in the zoo as gemma3n_text)",
    "gemma4_assistant": _GEMMA4_ASSISTANT,
    "gemma4_unified_assistant": _GEMMA4_ASSISTANT,
    "layoutlmv2": "its image backbone needs the package detectron2, which PyPI does not have",
}

NOT_IN_BFLOAT16: dict[str, str] = {
    "fnet": "torch has no Fourier transform in bfloat16 on CPU",
    "mra": "transformers mixes float32 into its attention",
    "xlstm": "transformers mixes float32 into its recurrence",
}
